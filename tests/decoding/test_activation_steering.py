"""Activation steering: the card's vector, plain generation at strength 0, the same with and without a cache."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hclm_rl.decoding.activation_steering import (
    ActivationSteering,
    action_entropy,
    last_states,
    responses_under,
    steering_vector,
    sweep,
)
from hclm_rl.decoding.rows import draw, streams_of

PROMPTS = [[3, 4, 5], [6, 7, 8, 9], [10, 11]]
STATES = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]], [[0.0, 2.0], [1.0, 1.0], [5.0, 0.0]]])
ENTROPIES = torch.tensor([[math.log(2), 0.3, 0.0], [0.5, 0.0, 0.1]])


def test_the_vector_of_the_card():
    u = steering_vector(STATES, ENTROPIES)
    torch.testing.assert_close(u, torch.tensor([-0.627688, -0.184005]), atol=1e-6, rtol=0)
    moved = torch.tensor([1.0, 1.0]) + 2 * u
    torch.testing.assert_close(moved, torch.tensor([-0.255377, 0.631990]), atol=2e-6, rtol=0)


def test_the_entropy_of_actions_leaves_out_what_cannot_be_read():
    assert action_entropy(["a"] * 15 + ["b"] * 8 + [None] * 2) == pytest.approx(0.646091, abs=1e-6)
    assert action_entropy([None, None]) == 0.0


def test_what_says_nothing_is_refused():
    with pytest.raises(ValueError, match=r"needs at least 2 steps a run, got 1"):
        steering_vector(STATES[:, :1], ENTROPIES[:, :1])
    with pytest.raises(ValueError, match=r"entropies that are all 0"):
        steering_vector(STATES, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"strength must be finite, got inf"):
        ActivationSteering(strength=math.inf)


@pytest.fixture(scope="module")
def model(policy: str) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(policy).eval()


def test_the_states_are_those_of_the_last_prompt_token(model: LlamaForCausalLM):
    found = last_states(model, PROMPTS, 0, pad=0)
    for state, prompt in zip(found, PROMPTS, strict=True):
        [alone] = last_states(model, [prompt], 0, pad=0)
        torch.testing.assert_close(state, alone, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # the one layer's output goes through the last norm into the head
        logits = model.lm_head(model.model.norm(found[:1]))
        torch.testing.assert_close(logits[0], model(torch.tensor(PROMPTS[:1])).logits[0, -1], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"layer must be in 0 to 0, got 3"):
        last_states(model, PROMPTS, 3, pad=0)


def test_steering_is_the_same_with_and_without_a_cache_and_at_zero_plain(model: LlamaForCausalLM):
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))

    def responses(strength: float, **settings: bool) -> list[list[int]]:
        steering = ActivationSteering(strength=strength, layer=0)
        given = (model, vector, PROMPTS, streams_of(0, range(3)), [12] * 3)
        return [each.ids for each in responses_under(steering, *given, ends=[1], pad=0, **settings)]

    plain = [each.ids for each in draw(model, PROMPTS, streams_of(0, range(3)), [12] * 3, ends=[1], pad=0)]
    assert responses(0.0) == plain
    steered = responses(3.0)
    assert steered != plain and responses(3.0, use_cache=False) == steered
    assert [each.ids for each in draw(model, PROMPTS, streams_of(0, range(3)), [12] * 3, ends=[1], pad=0)] == plain


def test_the_first_token_is_that_of_the_moved_state(model: LlamaForCausalLM):
    vector = torch.randn(16, generator=torch.Generator().manual_seed(1))
    steering, prompt = ActivationSteering(strength=2.0, layer=0), PROMPTS[0]
    with torch.no_grad():
        wanted = model.lm_head(model.model.norm(last_states(model, [prompt], 0, pad=0) + 2 * vector))
        with steering.steering(model, vector, len(prompt)):
            found = model(torch.tensor([prompt])).logits
        plain = model(torch.tensor([prompt])).logits
    torch.testing.assert_close(found[0, -1], wanted[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[0, :-1], plain[0, :-1])  # the tokens before the last are left alone
    # 2 |u| over the root mean square of lengths 3 and 4: sqrt(25 / 2)
    states = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert steering.relative(torch.tensor([0.6, 0.8]), states) == pytest.approx(2 / math.sqrt(12.5))


def test_a_sweep_shows_what_each_strength_does(model: LlamaForCausalLM):
    vector = 5 * torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(2)), dim=0)

    def action(ids: list[int]) -> int | None:
        return ids[0] % 2 if ids[0] > 1 else None

    asked = {"completions": 12, "max_new_tokens": 2, "ends": [1], "pad": 0}
    found = sweep([0.0, 1.0, 4.0], 0, model, vector, PROMPTS, action, **asked)
    assert [each["strength"] for each in found] == [0.0, 1.0, 4.0]
    assert found[0]["relative"] == 0 and found[2]["relative"] == pytest.approx(4 * found[1]["relative"])
    drawn = draw(model, [PROMPTS[0]] * 12, streams_of(0, range(12)), [2] * 12, ends=[1], pad=0)
    alone = sweep([0.0], 0, model, vector, PROMPTS[:1], action, **asked)[0]
    assert alone["action_entropy"] == pytest.approx(action_entropy([action(each.ids) for each in drawn]))
    assert len({each["token_entropy"] for each in found}) == 3
