"""Model switching: the card's row of entropies, one model alone is plain generation, and what was read is counted."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hclm_rl.decoding.model_switching import ModelSwitching, Switch, Switched, switched
from hclm_rl.decoding.rows import Drawn, draw

PROMPT = [3, 4, 5, 6]


def test_the_switches_of_the_card():
    switch = Switch(ModelSwitching(threshold=1.0, window=3, stay=2))
    models = ["SL"[switch.next_is_large(bits)] for bits in (0.2, 0.4, 3.0, 2.0, 0.5, 0.1, 0.1, 0.1)]
    assert "".join(models) == "SSLLLSSS"


@pytest.fixture(scope="module")
def small(policy: str) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(policy).eval()


@pytest.fixture(scope="module")
def large(small: LlamaForCausalLM) -> LlamaForCausalLM:
    config = type(small.config)(**{**small.config.to_dict(), "num_hidden_layers": 2})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("is_large", [False, True])
def test_one_model_alone_is_plain_generation(is_large: bool, small: LlamaForCausalLM, large: LlamaForCausalLM):
    settings = ModelSwitching(threshold=-1.0 if is_large else float("inf"), stay=0)
    one = {"max_new_tokens": 10, "ends": [1]}
    found = switched(settings, small, large, PROMPT, random.Random(0), **one)
    [plain] = draw(large if is_large else small, [PROMPT], [random.Random(0)], [10], ends=[1], pad=0)
    assert found.response.ids == plain.ids and set(found.is_large) == {is_large}
    assert found.response.entropies == pytest.approx(plain.entropies, abs=1e-5)
    # greedy: token for token what transformers does
    greedy = switched(settings, small, large, PROMPT, random.Random(0), **one, temperature=0.0)
    theirs = (large if is_large else small).generate(
        input_ids=torch.tensor([PROMPT]), max_new_tokens=10, do_sample=False, attention_mask=torch.ones(1, 4).long()
    )[0, 4:]
    assert greedy.response.ids == theirs.tolist()[: len(greedy.response.ids)]
    # the small model reads the prompt first in any case; then one of the two reads all but the last token
    written = len(found.response.ids)
    assert (found.small_reads, found.large_reads) == ((4, 4 + written - 1) if is_large else (4 + written - 1, 0))


def test_between_the_two_each_token_is_its_models_own(small: LlamaForCausalLM, large: LlamaForCausalLM):
    settings = ModelSwitching(threshold=3.0, window=2, stay=2)
    asked = {"max_new_tokens": 30, "ends": []}
    found = switched(settings, small, large, PROMPT, random.Random(1), **asked, temperature=0.0)
    assert 0 < sum(found.is_large) < 30
    for t, is_large in enumerate(found.is_large):  # what a pass without a cache over the text so far says
        model = large if is_large else small
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPT, *found.response.ids[:t]]])).logits[0, -1]
        assert logits.argmax().item() == found.response.ids[t]
    # each reads a token once at most
    assert found.small_reads <= 4 + 29 and found.large_reads <= 4 + 29


def test_the_share_of_compute():
    found = Switched(response=Drawn(ids=[1] * 7), is_large=[False] * 7, small_reads=10, large_reads=4)
    # (10 * 100 + 4 * 1000) / (1000 * (4 + 6))
    assert found.compute(100, 1000, prompt=4) == pytest.approx(0.5)


def test_what_is_refused(small: LlamaForCausalLM):
    with pytest.raises(ValueError, match=r"window must be at least 1 and stay at least 0, got 0 and 10"):
        ModelSwitching(window=0)
    other = LlamaForCausalLM(type(small.config)(**{**small.config.to_dict(), "vocab_size": 30}))
    with pytest.raises(ValueError, match=r"needs two models with one tokenizer, and their vocabularies have 26 and 30"):
        switched(ModelSwitching(), small, other, PROMPT, random.Random(0), max_new_tokens=2, ends=[1])
