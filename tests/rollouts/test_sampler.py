"""The sampler: whose distribution it draws from, what a branch takes over, and what its mates have to do with it."""

import math
import random
from collections import Counter
from itertools import product

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
)

from hclm_rl.rollouts import Branch, Sampler

EOS, PAD, WORDS = 1, 0, 5
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
COMMON = {"vocab_size": WORDS, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD, "initializer_range": 0.5}
KINDS = {
    "llama": LlamaConfig(**COMMON, **SMALL),
    "grouped heads, sliding window": MistralConfig(**COMMON, **SMALL, num_key_value_heads=1, sliding_window=3),
    "learned positions": GPT2Config(**COMMON, n_embd=16, n_layer=2, n_head=2, n_positions=32),
}


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(KINDS[kind], attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return model_of("llama")


def sampler_of(model: PreTrainedModel, longest: int = 8, **changes) -> Sampler:
    return Sampler(model=model, ends=[EOS], pad=PAD, longest=longest, **changes)


def forks(root: Branch, count: int, at: int = 0, name: str = "") -> list[Branch]:
    return [root.fork(at, random.Random(f"{name}/{i}")) for i in range(count)]


def logps_after(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """(V,) log-probs of the next word by a pass over the whole text, without a cache."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(dim=-1)


def distribution(model: PreTrainedModel, text: list[int], length: int) -> dict[tuple[int, ...], float]:
    """The probability of every continuation of at most `length` words; one that ends is shorter."""
    found = {}
    for words in product(range(WORDS), repeat=length):
        words = words[: words.index(EOS) + 1] if EOS in words else words
        if words not in found:
            steps = [logps_after(model, [*text, *words[:t]])[word].item() for t, word in enumerate(words)]
            found[words] = math.exp(sum(steps))
    return found


def fits(drawn: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> bool:
    """A chi-square test at 1e-3; rare outcomes count with the least common other one."""
    counts, n = Counter(drawn), len(drawn)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-4) and counts.keys() <= expected.keys()
    common = [each for each in sorted(expected, key=lambda each: -expected[each]) if n * expected[each] >= 5]
    seen = [counts[each] for each in common]
    due = [n * expected[each] for each in common]
    seen[-1], due[-1] = n - sum(seen[:-1]), n - sum(due[:-1])
    return chisquare(seen, due).pvalue > 1e-3


def test_plain_sampling_has_the_models_distribution(model: PreTrainedModel):
    sampler = sampler_of(model, longest=2)
    root, longer = sampler.begin([[2, 3], [4, 4, 2, 3, 2]])  # the first is padded
    rows = forks(root, 2000)
    sampler.extend([*rows, *forks(longer, 10)])
    assert fits([tuple(each.ids) for each in rows], distribution(model, [2, 3], 2))
    assert not fits([tuple(each.ids) for each in rows], distribution(model, [2, 4], 2))


def test_a_branch_has_the_distribution_behind_its_prefix(model: PreTrainedModel):
    sampler = sampler_of(model, longest=3)
    roots = sampler.begin([[2, 3], [4, 4, 2, 3, 2]])
    parents, others = forks(roots[0], 200, name="p"), forks(roots[1], 5, name="q")
    sampler.extend([*parents, *others])
    parent = next(each for each in parents if len(each.ids) > 1)  # most end at once
    rows = forks(parent, 2000, at=1, name="c")
    sampler.extend([*rows, *(each.fork(1, each.stream) for each in others)])
    drawn = [tuple(each.ids[1:]) for each in rows]
    assert fits(drawn, distribution(model, [2, 3, parent.ids[0]], 2))
    assert not fits(drawn, distribution(model, [2, 3], 2))
    assert {each.ids[0] for each in rows} == {parent.ids[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_noted_of_a_token_is_what_a_pass_without_cache_gives(kind: str):
    model = model_of(kind)
    sampler = sampler_of(model, likeliest=2)
    roots = sampler.begin([[2, 3, 4], [2, 4], [3], [4, 4, 2, 3, 2, 2]])
    rows = [each for i, root in enumerate(roots) for each in forks(root, 2, name=str(i))]
    sampler.extend(rows)
    twice = [each.fork(len(each.ids) // 2, random.Random(f"twice/{i}")) for i, each in enumerate(rows)]
    sampler.extend(twice)
    for each in [*rows, *twice]:
        for t, word in enumerate(each.ids):
            logps = logps_after(model, each.prompt + each.ids[:t])
            assert each.logps[t] == pytest.approx(logps[word].item(), abs=1e-5)
            assert each.entropies[t] == pytest.approx(-(logps.exp() * logps).sum().item(), abs=1e-5)
            best = logps.sort(descending=True).values[:2]
            assert each.of_likeliest[t] == pytest.approx(-(best.exp() * best).sum().item(), abs=1e-5)
        assert len(each.ids) == 8 or each.ids[-1] == EOS


def test_a_row_does_not_depend_on_its_mates(model: PreTrainedModel):
    def row(mates: list[list[int]]) -> tuple[Branch, Branch]:
        sampler = sampler_of(model)
        mine, *others = sampler.begin([[2, 3], *mates])
        first = mine.fork(0, random.Random("first"))
        rest = [each for i, other in enumerate(others) for each in forks(other, 3, name=str(i))]
        sampler.extend([*rest[:2], first, *rest[2:]])
        second = first.fork(1, random.Random("second"))
        sampler.extend([*(each.fork(len(each.ids) - 1, random.Random(7)) for each in rest), second])
        return first, second

    alone, among = row([]), row([[4, 4, 2, 3, 2, 2, 3], [3], [2, 4, 4]])
    for one, other in zip(alone, among, strict=True):
        assert one.ids == other.ids
        torch.testing.assert_close(torch.tensor(one.logps), torch.tensor(other.logps))
        torch.testing.assert_close(torch.tensor(one.entropies), torch.tensor(other.entropies))


def test_tokens_are_counted_where_they_pass(model: PreTrainedModel):
    sampler = sampler_of(model, longest=6)
    [root] = sampler.begin([[2, 3, 4]])
    # the prompt but for its last token, which gives the first draw
    assert (sampler.counts.read, sampler.counts.drawn, sampler.counts.reused) == (2, 0, 0)
    rows = forks(root, 3)
    sampler.extend(rows)
    drawn = sum(len(each.ids) for each in rows)
    assert (sampler.counts.read, sampler.counts.drawn, sampler.counts.reused) == (2, drawn, 3 * 2)
    longest = max(rows, key=lambda each: len(each.ids))
    assert len(longest.ids) == 6
    branch = longest.fork(4, random.Random(0))
    sampler.extend([branch])
    # 3 of the prompt and 4 of the response are known, and the last of these is read for the next draw
    assert sampler.counts.reused == 3 * 2 + 6
    assert (sampler.counts.read, sampler.counts.drawn) == (2, drawn + len(branch.ids) - 4)
    # of what a tool wrote all is read but the last, which gives the next draw; the parent read its third token itself
    told = longest.fork(3, random.Random(1))
    told.take([2, 2])
    sampler.extend([told])
    assert sampler.counts.reused == 3 * 2 + 6 + 6
    assert sampler.counts.read == 2 + 2 - 1


def test_what_a_tool_wrote_is_context_and_not_ones_own(model: PreTrainedModel):
    sampler = sampler_of(model, longest=6)
    [root] = sampler.begin([[2, 3]])
    [row] = forks(root, 1)
    row.take([4, 2])
    sampler.extend([row])
    assert row.ids[:2] == [4, 2] and row.is_own[:2] == [False, False] and all(row.is_own[2:])
    assert row.logps[:2] == [0, 0] and len(row.logps) == len(row.ids)
    assert row.logps[2] == pytest.approx(logps_after(model, [2, 3, 4, 2])[row.ids[2]].item(), abs=1e-5)


def test_settings_of_the_draw_leave_the_log_probs_alone(model: PreTrainedModel):
    sampler = sampler_of(model, longest=4, temperature=2.0, top_k=1)
    [root] = sampler.begin([[2, 3]])
    [row] = forks(root, 1)
    sampler.extend([row])
    for t, word in enumerate(row.ids):
        logps = logps_after(model, [2, 3, *row.ids[:t]])
        assert word == logps.argmax()
        # log softmax(z / 2) of the whole vocabulary
        assert row.logps[t] == pytest.approx((logps / 2).log_softmax(dim=-1)[word].item(), abs=1e-5)


def test_another_temperature_acts_on_the_draw_alone(model: PreTrainedModel):
    sampler = sampler_of(model, longest=1)
    [root] = sampler.begin([[2, 3]])
    rows = forks(root, 2000)
    sampler.extend(rows, temperature=0.5)
    # p^2, normalised
    squares = (2 * logps_after(model, [2, 3])).softmax(dim=-1).tolist()
    assert fits([tuple(each.ids) for each in rows], {(word,): p for word, p in enumerate(squares)})
    assert rows[0].logps[0] == pytest.approx(logps_after(model, [2, 3])[rows[0].ids[0]].item(), abs=1e-5)


def test_nothing_is_drawn_from_the_global_generators(model: PreTrainedModel):
    states = torch.get_rng_state(), random.getstate()
    sampler = sampler_of(model)
    sampler.extend(forks(sampler.begin([[2, 3]])[0], 3))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_a_model_without_keys_and_values_is_refused():
    config = MambaConfig(vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="goes on from the middle of a text, which this model cannot do: its layers"):
        sampler_of(AutoModelForCausalLM.from_config(config))


def test_a_branch_starts_at_a_token_of_its_parent(model: PreTrainedModel):
    [root] = sampler_of(model).begin([[2, 3]])
    with pytest.raises(ValueError, match="a branch starts at one of the 0 tokens of its parent, got 1"):
        root.fork(1, random.Random(0))


def test_a_penalty_on_words_that_stand_in_the_text_does_not_meet_the_padding(model: PreTrainedModel):
    """The end of text is also the padding, as in many models: a longer mate must not make it rarer."""

    def rows(mates: list[list[int]]) -> list[list[int]]:
        sampler = Sampler(model=model, ends=[EOS], pad=EOS, longest=8, repetition_penalty=3.0)
        mine, *others = sampler.begin([[2, 3], *mates])
        some = forks(mine, 8)
        sampler.extend([*some, *(other.fork(0, random.Random(0)) for other in others)])
        return [each.ids for each in some]

    alone = rows([])
    assert rows([[4, 4, 2, 3, 2, 2, 3, 4, 4]]) == alone and len({str(each) for each in alone}) > 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-40])
def test_the_coldest_temperature_is_the_top_word(temperature: float, model: PreTrainedModel):
    sampler = sampler_of(model, longest=3)
    [row] = forks(sampler.begin([[2, 3]])[0], 1)
    sampler.extend([row], temperature=temperature)
    for t, word in enumerate(row.ids):
        assert word == logps_after(model, [2, 3, *row.ids[:t]]).argmax()


def test_scores_that_are_no_distribution_are_refused():
    model = model_of("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    sampler = sampler_of(model)
    with pytest.raises(ValueError, match=r"no distribution to draw token 0 .counted from 0. from: its scores are NaN"):
        sampler.extend(forks(sampler.begin([[2, 3]])[0], 1))


class Zero(random.Random):
    def random(self) -> float:
        return 0.0


def test_the_number_0_draws_no_word_that_is_ruled_out(model: PreTrainedModel):
    sampler = sampler_of(model, longest=1, top_k=1)
    [root] = sampler.begin([[2, 3]])
    row = root.fork(0, Zero())
    sampler.extend([row])
    assert row.ids == [logps_after(model, [2, 3]).argmax().item()] != [0]
