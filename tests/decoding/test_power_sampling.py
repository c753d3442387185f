"""Power sampling: the card's two-token text by hand, and the exact power distribution of a model that is enumerated."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM

from hclm_rl.decoding import PowerSampling
from hclm_rl.decoding.power_sampling import log_acceptance
from hclm_rl.decoding.rows import Drawn, draw, streams_of

END, LONGEST, PROMPT = 0, 3, [1, 2]  # words: the end of text, a and b
ASKED = {"max_new_tokens": LONGEST, "ends": [END], "pad": END}


def drawn(p: list[float], q: list[float]) -> Drawn:
    """A text of as many tokens, with their probabilities under the model and the proposal."""
    return Drawn(ids=[1] * len(p), logps=[math.log(x) for x in p], drawn_logps=[math.log(x) for x in q])


def test_the_acceptance_of_the_card():
    # p(a) = .6, p(a|a) = .5, p(a|b) = .9; the proposal token by token is p^4, normalised
    first, after_b = 0.6**4 / (0.6**4 + 0.4**4), 0.9**4 / (0.9**4 + 0.1**4)
    aa = drawn([0.6, 0.5], [first, 0.5])
    ba = drawn([0.4, 0.9], [1 - first, after_b])
    assert log_acceptance(aa, ba, 0, 4.0) == pytest.approx(1.658152, abs=1e-6)
    assert math.exp(log_acceptance(ba, aa, 0, 4.0)) == pytest.approx(0.190491, abs=1e-6)
    # detailed balance: .245464 * .164923 * 1 = .508994 * .417526 * .190491
    there = 0.245464 * math.exp(sum(ba.drawn_logps))
    back = 0.508994 * math.exp(sum(aa.drawn_logps)) * math.exp(log_acceptance(ba, aa, 0, 4.0))
    assert there == pytest.approx(0.040483, abs=1e-6) == back


def test_a_shorter_text_has_fewer_places_to_choose_from():
    two, one = drawn([0.6, 0.5], [0.6, 0.5]), drawn([0.4], [0.4])
    # at alpha 1 with the model as its own proposal all but the places cancels: log(2 / 1)
    assert log_acceptance(two, one, 0, 1.0) == pytest.approx(math.log(2))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=3, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=1.0, pad_token_id=None, bos_token_id=None, eos_token_id=END,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def probabilities(model: LlamaForCausalLM) -> dict[tuple[int, ...], float]:
    """Of all fifteen texts of at most three words: seven that end and eight that do not."""
    ended = [(*start, END) for n in range(LONGEST) for start in itertools.product((1, 2), repeat=n)]
    found = {}
    for text in [*ended, *itertools.product((1, 2), repeat=LONGEST)]:
        with torch.no_grad():
            logps = model(torch.tensor([[*PROMPT, *text]])).logits[0].double().log_softmax(-1)
        found[text] = math.exp(sum(logps[len(PROMPT) - 1 + t, word].item() for t, word in enumerate(text)))
    assert sum(found.values()) == pytest.approx(1.0)
    return found


def fit(texts: list[tuple[int, ...]], weights: dict[tuple[int, ...], float]) -> float:
    """The p-value of chi-square, rare texts taken together."""
    n, total, counts = len(texts), sum(weights.values()), Counter(texts)
    hoped = {text: n * weight / total for text, weight in weights.items()}
    rare = [text for text, count in hoped.items() if count < 5]
    pairs = [(counts[text], hoped[text]) for text in hoped if text not in rare]
    if rare:
        pairs.append((sum(counts[text] for text in rare), sum(hoped[text] for text in rare)))
    return chisquare(*np.array(pairs).T).pvalue


@pytest.mark.parametrize("blocks, stops_at_end", [(1, True), (2, False)])
def test_the_chain_draws_from_the_exact_power_distribution(
    blocks: int, stops_at_end: bool, model: LlamaForCausalLM, probabilities: dict
):
    n, alpha = 800, 2.0
    power = PowerSampling(alpha=alpha, moves=8, blocks=blocks, stops_at_end=stops_at_end)
    found = power(model, [PROMPT] * n, streams_of(1, range(n)), **ASKED)
    sharp = {text: p**alpha for text, p in probabilities.items()}
    assert fit([tuple(each.response.ids) for each in found], sharp) > 1e-3
    assert all(each.moves == 8 * blocks and 0 < each.accepted <= each.moves for each in found)
    # token by token at temperature 1 / alpha is another distribution, which as many texts tell apart
    cold = draw(model, [PROMPT] * n, streams_of(2, range(n)), [LONGEST] * n, ends=[END], pad=END, temperature=1 / alpha)
    assert fit([tuple(each.ids) for each in cold], sharp) < 1e-4


def test_at_alpha_one_it_is_plain_sampling(model: LlamaForCausalLM, probabilities: dict):
    n = 800
    found = PowerSampling(alpha=1.0, moves=2, blocks=1)(model, [PROMPT] * n, streams_of(3, range(n)), **ASKED)
    assert fit([tuple(each.response.ids) for each in found], probabilities) > 1e-3
    still = PowerSampling(alpha=1.0, moves=0, blocks=1)(model, [PROMPT] * 50, streams_of(4, range(50)), **ASKED)
    plain = draw(model, [PROMPT] * 50, streams_of(4, range(50)), [LONGEST] * 50, ends=[END], pad=END)
    assert [each.response.ids for each in still] == [each.ids for each in plain]
    assert [each.tokens for each in still] == [len(each.ids) for each in plain]


def test_batch_mates_change_nothing(model: LlamaForCausalLM):
    power, prompts = PowerSampling(alpha=3.0, moves=3, blocks=2), [[1], [2, 1, 2], [1, 1], [2]]

    def responses(rows: list[int]) -> list[tuple[list[int], int, int]]:
        found = power(model, [prompts[i] for i in rows], streams_of(0, rows), **{**ASKED, "max_new_tokens": 8})
        return [(each.response.ids, each.tokens, each.accepted) for each in found]

    together = responses([0, 1, 2, 3])
    assert [responses([i])[0] for i in range(4)] == together
    assert len({str(each) for each in together}) > 1


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"alpha must be more than 0 and finite, got 0\.0"):
        PowerSampling(alpha=0.0)
    with pytest.raises(ValueError, match=r"moves must be at least 0 and blocks at least 1, got -1 and 16"):
        PowerSampling(moves=-1)
