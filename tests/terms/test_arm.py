"""ARM against the card of ProGRPO (arXiv:2602.05281): numbers, a loop written from the definition, and the traps."""

import math
import random
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.arm import Arm, confidence

from ..term_batches import card_step, first_stage, make_step, rollout, whole_texts

NAN = math.nan
PROMPT = [-0.1, -2.0, -0.5, -0.3, -1.0]
RESPONSES = [
    [-0.05, -0.10, -0.20, -0.40, -0.02],
    [-0.30, -1.50, -0.10, -0.60, -0.20],
    [-0.01, -0.02, -0.90, -0.03, -1.10, -0.05, -0.04, -0.02, -0.01, -0.06],
    [-0.70, -0.10, -2.30, -0.20, -0.40],
]
SHIFTS = [-0.160495, -0.026338, -0.069763, 0.010523]


def group_of(responses, rewards, prompt=PROMPT, padding: int = 2):
    """Stage 1's view of one group; the prompt has a token before those of `prompt` and padding before that."""
    width = max(map(len, responses)) + 1
    slots = [row + [NAN] * (width - len(row)) for row in responses]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in responses]
    view, _ = card_step(mask, slots, slots, slots)
    values = torch.tensor(rewards, dtype=torch.float64)
    scored = values[~values.isnan()]
    advantages = torch.nan_to_num((values - scored.mean()) / (scored.std() + 1e-4), nan=0.0)
    ids = torch.zeros(len(rewards), padding + 1 + len(prompt), dtype=torch.long)
    # what is read after padding is garbage
    read = torch.tensor([NAN, -50.0][:padding] + prompt, dtype=torch.float64)

    def score(transcript, scorer="policy"):
        ids, mask, tail = whole_texts(transcript)
        assert scorer == "policy" and tail == ids.size(1) - 1 and mask.shape == ids.shape
        return read.expand(len(ids), -1), torch.zeros(len(ids), tail)

    return replace(
        view,
        advantages=advantages,
        rewards=values,
        group_rewards=values.expand(len(rewards), -1),
        transcript=replace(
            view.transcript, prompt_ids=ids, prompt_mask=(torch.arange(ids.size(1)) >= padding).expand_as(ids)
        ),
        score=score,
    )


def shaped(rewards, responses=RESPONSES, prompt=PROMPT, **settings):
    first = first_stage(Arm(**settings), group_of(responses, rewards, prompt), {}, group_size=len(rewards))
    return first.advantages.tolist(), {name: value.item() for name, value in first.metrics.items()}


def test_the_cards_confidences():
    view = group_of(RESPONSES, [1, 1, 1, 0])
    values = confidence(view.logps, view.mask, 0.2).tolist()
    # printed to six digits: half of the last one
    assert values == pytest.approx([0.670320, 0.223130, 0.367879, 0.100259], abs=5e-7)
    row = torch.tensor([PROMPT], dtype=torch.float64)
    assert confidence(row, torch.ones(1, 5, dtype=torch.bool), 0.2).item() == pytest.approx(0.135335, abs=5e-7)


def test_the_cards_mixed_group():
    before = group_of(RESPONSES, [1, 1, 1, 0]).advantages.tolist()
    assert before == pytest.approx([0.499900, 0.499900, 0.499900, -1.499700], abs=5e-7)
    after, metrics = shaped([1, 1, 1, 0])
    assert after == pytest.approx([0.339405, 0.473562, 0.430137, -1.489177], abs=6e-7)
    assert after[1] > after[0] and metrics["link/flips"] == 0
    assert metrics["link/prompt_confidence"] == pytest.approx(0.135335, abs=5e-7)
    assert metrics["link/response_confidence"] == pytest.approx(
        (0.670320 + 0.223130 + 0.367879 + 0.100259) / 4, abs=5e-7
    )
    assert metrics["link/shift"] == pytest.approx(sum(SHIFTS) / 4, abs=5e-7)


def test_the_cards_uniform_groups():
    after, _ = shaped([1, 1, 1, 1])
    assert after == pytest.approx(SHIFTS, abs=5e-7)
    assert shaped([1, 1, 1, 1], shift_when="mixed_only")[0] == [0.0] * 4
    assert shaped([0, 0, 0, 0])[0] == [0.0] * 4
    mixed = shaped([1, 1, 1, 0])[0]
    assert shaped([1, 1, 1, 0], shift_when="mixed_only")[0] == mixed


def test_a_large_alpha_flips_signs_and_says_so():
    # 0.4999 - 4 * 0.534985 < 0; 0.4999 - 4 * 0.087795 > 0; 0.4999 - 4 * 0.232544 < 0; the wrong one stays negative
    _, metrics = shaped([1, 1, 1, 0], alpha=4.0)
    assert metrics["link/flips"] == 0.5


def test_the_whole_prompt_is_its_inverse_perplexity():
    after, metrics = shaped([1, 1, 1, 1], prompt_fraction=1.0)
    assert metrics["link/prompt_confidence"] == pytest.approx(math.exp(-3.9 / 5))
    assert after[0] == pytest.approx(0.3 * (math.exp(-3.9 / 5) - math.exp(-0.4)))


def test_nothing_to_be_confident_of_shifts_nothing():
    # a prompt of one token, a response without any, an unscored response
    assert shaped([1, 1, 1, 1], prompt=[])[0] == [0.0] * 4
    after, _ = shaped([1, 1, 1, 1], responses=[[], *RESPONSES[1:]])
    assert after[0] == 0.0 and after[1:] == pytest.approx(SHIFTS[1:], abs=5e-7)
    after, _ = shaped([1, NAN, 1, 1])
    assert after[1] == 0.0 and after[2] == pytest.approx(SHIFTS[2], abs=5e-7)


def test_advantages_of_tokens_are_shifted_as_one():
    view = group_of(RESPONSES, [1, 1, 1, 1])
    tokens = torch.arange(44.0, dtype=torch.float64).view(4, 11)
    after = Arm().on_rollout(replace(view, advantages=tokens), {}).advantages
    assert (after - tokens)[0].tolist() == pytest.approx([SHIFTS[0]] * 11, abs=5e-7)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction, prompt_fraction", [(0.2, 0.2), (0.5, 1.0), (1.0, 0.01)])
def test_agrees_with_a_loop(seed, fraction, prompt_fraction):
    source = random.Random(seed)
    size = source.choice([4, 8])
    responses = [[-source.expovariate(1) for _ in range(source.randint(1, 30))] for _ in range(size)]
    prompt = [-source.expovariate(1) for _ in range(source.randint(1, 30))]
    rewards = [1.0] + [source.choice([0.0, 1.0]) for _ in range(size - 1)]

    def c(logps, share):
        k = max(1, math.ceil(round(share * len(logps), 9)))
        return math.exp(sum(sorted(logps)[:k]) / k)

    before = group_of(responses, rewards, prompt).advantages.tolist()
    after, _ = shaped(rewards, responses, prompt, fraction=fraction, prompt_fraction=prompt_fraction, alpha=0.4)
    for i in range(size):
        shift = 0.4 * (c(prompt, prompt_fraction) - c(responses[i], fraction))
        assert after[i] == pytest.approx(before[i] + shift, abs=1e-12)


def test_prompts_are_read_once_a_group():
    seen = []
    view = rollout(make_step())

    def score(transcript, scorer="policy"):
        seen.append(transcript.ids)
        return view.score(transcript)

    whole = Arm().on_rollout(replace(view, score=score), {}).advantages
    assert [len(ids) for ids in seen] == [2]
    # two of a group's four responses: each reads its prompt
    part = rollout(make_step(), slice(4, 6), score=score)
    assert torch.equal(Arm().on_rollout(part, {}).advantages, whole[4:6]) and len(seen[1]) == 2


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"alpha": -0.1}, "alpha must be finite and >= 0, got -0.1"),
        ({"fraction": 0.0}, "fraction must be in (0, 1], got 0.0"),
        ({"prompt_fraction": NAN}, "prompt_fraction must be in (0, 1], got nan"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Arm(**wrong)
    assert str(error.value) == sentence
