"""InfoPO against its card (arXiv:2603.00656): numbers, a loop written from the definition, and the traps."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from hclm_rl import Transcript
from hclm_rl.terms.info_po import InfoPo, by_turn

from ..term_batches import TOKENIZER, WORDS, Processes, first_stage, fit, make_step, reading, rollout, transcript_of

NAN = math.nan
# turns of 2, 2 and 1 tokens with IG 0.6, 0.2; of 2, 1 and 2 tokens with IG -0.1, 0.4; a tool's token between turns
MASK = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [1, 1, 0, 1, 0, 1, 1]]).bool()
GAIN = torch.tensor([[9.0, 9.0, NAN, 0.5, 0.7, NAN, 0.2], [9.0, 9.0, NAN, -0.1, NAN, 0.3, 0.5]], dtype=torch.float64)
INTRINSIC = [0.798294, 0.798294, -0.319318, -0.319318, 0, -1.157527, -1.157527, 1.357100, 0, 0]


def shaped(rewards: list[float], term: InfoPo | None = None, **changes):
    """Stage 1 on the card's batch, one group of two; each reply, once hidden, costs the next turn its gain."""
    rewards_of = torch.tensor(rewards, dtype=torch.float64)
    scale = rewards_of.std() + 1e-6
    ids = torch.zeros(MASK.shape).long()
    view = rollout(make_step(dtype=torch.float64), slice(0, 2))
    seen: list[Transcript] = []

    def score(transcript: Transcript) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(transcript)
        return -torch.where(MASK, GAIN, 0.0), torch.zeros(MASK.shape)

    view = replace(
        view,
        ids=ids,
        mask=MASK,
        logps=torch.zeros(MASK.shape, dtype=torch.float64),
        entropy=torch.zeros(MASK.shape, dtype=torch.float64),
        group=torch.zeros(2).long(),
        rewards=rewards_of,
        group_rewards=rewards_of.expand(2, 2),
        advantages=torch.nan_to_num((rewards_of - rewards_of.mean()) / scale),
        ref_logps=None,
        transcript=transcript_of(ids, MASK),
        score=score,
        **changes,
    )
    return first_stage(term or InfoPo(placeholder="4"), view, {}, group_size=2), seen


def test_the_cards_example_with_equal_rewards():
    # Ao = 0 and g = 1/2: A = 0.05 Ai; printed to six digits: half of the last one
    first, seen = shaped([0.0, 0.0])
    expected = [0.039915, 0.039915, -0.015966, -0.015966, 0, -0.057876, -0.057876, 0.067855, 0, 0]
    assert first.advantages[MASK].tolist() == pytest.approx(expected, abs=5e-7)
    assert len(seen) == 2 and first.metrics["link/gate"].item() == 0.5
    assert first.metrics["link/information"].item() == pytest.approx((0.6 + 0.2 - 0.1 + 0.4) / 4)
    assert first.affected["link"][MASK].tolist() == [True] * 4 + [False] + [True] * 3 + [False] * 2


def test_the_cards_intrinsic_advantages():
    # g = 1/2, so beta = 2 leaves Ai itself; its deviation 0.816493 is below max(so, 1) = 1, so it is not bounded
    first, _ = shaped([0.0, 0.0], InfoPo(beta=2.0, placeholder="4"))
    assert first.advantages[MASK].tolist() == pytest.approx(INTRINSIC, abs=5e-7)


def test_the_cards_example_with_a_mixed_group_is_plain_grpo():
    first, _ = shaped([1.0, 0.0])
    assert first.advantages[MASK].tolist() == pytest.approx([0.707106] * 5 + [-0.707106] * 5, abs=6e-7)


def test_the_cards_example_with_graded_rewards():
    first, _ = shaped([0.52, 0.50])
    expected = [0.741364, 0.741364, 0.693334, 0.693334, 0.707057]
    expected += [-0.756802, -0.756802, -0.648734, -0.707057, -0.707057]
    assert first.advantages[MASK].tolist() == pytest.approx(expected, abs=6e-7)
    assert first.metrics["link/gate"].item() == pytest.approx(0.429757, abs=5e-7)


def test_a_response_without_a_reward_has_no_part():
    # the second response was not scored: the first one's turns alone are standardised, IG / |turn| .3, .3, .1, .1
    first, _ = shaped([0.0, NAN], InfoPo(beta=2.0, placeholder="4"))
    values = torch.tensor([0.3, 0.3, 0.1, 0.1], dtype=torch.float64)
    intrinsic = (values - values.mean()) / (values.std() + 1e-6)
    spread = torch.tensor([*intrinsic, 0.0], dtype=torch.float64).std() + 1e-6
    expected = intrinsic * (1 / spread).clamp(max=1)  # g = 1/2 and beta = 2
    assert first.advantages[0][MASK[0]].tolist() == pytest.approx([*expected.tolist(), 0.0], abs=1e-9)
    assert first.advantages[1][MASK[1]].tolist() == [0.0] * 5


def test_each_reply_is_overwritten_alone_and_in_place():
    mask = torch.tensor([[1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0]]).bool()
    ids = torch.arange(11).unsqueeze(0)
    seen = []

    def score(transcript):
        seen.append(transcript)
        return torch.zeros(transcript.ids.shape), torch.zeros(transcript.ids.shape)

    view = rollout(make_step(), slice(0, 1))
    present = torch.tensor([[1] * 10 + [0]]).bool()
    transcript, zeros = replace(transcript_of(ids, mask), present=present), torch.zeros(1, 11)
    view = replace(view, ids=ids, mask=mask, logps=zeros, entropy=zeros, ref_logps=None)
    view = replace(view, transcript=transcript, score=score)
    term = InfoPo(placeholder="let me", template_before=1, template_after=0)
    term.on_rollout(view, {})
    let, me = WORDS.index("let"), WORDS.index("me")
    # tokens 1 and 6 are the template's; the placeholder's last word is repeated, or it is cut
    assert seen[0].ids.tolist() == [[0, 1, let, me, me, 5, 6, 7, 8, 9, 10]]
    assert seen[1].ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, let, 8, 9, 10]]
    assert len(seen) == 2  # the last reply has no turn after it
    assert torch.equal(seen[0].present, present) and torch.equal(seen[0].prompt_ids, view.transcript.prompt_ids)
    seen.clear()
    InfoPo(placeholder="let me", template_before=1, template_after=2).on_rollout(view, {})
    assert seen[0].ids.tolist() == [[0, 1, let, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert torch.equal(seen[1].ids, ids)  # nothing is left of the second reply: no credit


def test_text_without_tools_is_left_alone():
    def score(transcript):
        raise AssertionError("no reply, no pass")

    view = rollout(make_step(), score=score)
    first = first_stage(InfoPo(), view, {})
    assert torch.equal(first.advantages[view.mask], view.advantages.unsqueeze(1).expand(view.mask.shape)[view.mask])
    assert first.affected["link"].sum() == 0


def holes(step, seed: int):
    """A tool wrote the second, third or fourth token of each response."""
    column = 1 + (torch.arange(len(step.mask)) + seed) % 3
    return replace(step, mask=step.mask.scatter(1, column.unsqueeze(1), False))


def by_the_card(step, rewards, beta: float, temperature: float, placeholder: int) -> dict[tuple[int, int], float]:
    """The card's steps with lists; the toy policy is asked for one row and one reply at a time."""
    credit: dict[tuple[int, int], float] = {}
    for row in range(len(step.ids)):
        runs: list[list[int]] = []
        for t, counts in enumerate(step.mask[row].tolist()):
            if counts and (t == 0 or not step.mask[row, t - 1]):
                runs.append([])
            if counts:
                runs[-1].append(t)
        for action, following in itertools.pairwise(runs):
            ids = step.ids[row : row + 1].clone()
            ids[0, action[-1] + 1 : following[0]] = placeholder
            without = reading(transcript_of(ids, step.mask[row : row + 1]), step.head)[0]
            gain = sum((step.old_logps[row, t] - without[t]).item() for t in following) / len(following)
            for t in action:
                credit[row, t] = gain / len(action)
    intrinsic = dict.fromkeys([tuple(at) for at in step.mask.nonzero().tolist()], 0.0)
    for group in range(2):
        mine = {at: value for at, value in credit.items() if at[0] // 4 == group}
        mean = sum(mine.values()) / max(len(mine), 1)
        spread = math.sqrt(sum((v - mean) ** 2 for v in mine.values()) / (len(mine) - 1)) if len(mine) > 1 else 1.0
        intrinsic |= {at: (value - mean) / (spread + 1e-6) for at, value in mine.items()}
    outcome = {at: step.advantages[at[0]].item() for at in intrinsic}

    def spread_of(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) + 1e-6

    bound = min(1.0, max(spread_of([*outcome.values()]), 1.0) / spread_of([*intrinsic.values()]))
    shaped = {}
    for at, value in intrinsic.items():
        of_group = rewards[at[0] // 4 * 4 : at[0] // 4 * 4 + 4]
        mean = sum(of_group) / 4
        d = math.sqrt(sum((r - mean) ** 2 for r in of_group) / 3)
        shaped[at] = outcome[at] + beta / (1 + math.exp(d / temperature)) * bound * value
    return shaped


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_a_loop(seed):
    step = holes(make_step(seed, torch.float64), seed)
    term = InfoPo(beta=0.7, temperature=0.8, placeholder="4")
    text = transcript_of(step.ids, step.mask)
    view = rollout(step, transcript=text, score=lambda text: (reading(text, step.head), None))
    first = first_stage(term, view, {})
    expected = by_the_card(step, step.rewards.tolist(), 0.7, 0.8, WORDS.index("4"))
    assert first.affected["link"].sum() > 3
    for at, value in expected.items():
        assert first.advantages[at].item() == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_processes_score_equally_often():
    step = holes(make_step(3), 3)
    alone = first_stage(InfoPo(placeholder="4"), rollout(step), {})
    processes = Processes(2)
    calls = [0, 0]

    def counting(rank):
        view = processes.views(step, [6, 5])[rank]

        def score(transcript):
            calls[rank] += 1
            return view.score(transcript)

        return first_stage(InfoPo(placeholder="4"), replace(view, score=score), {})

    both = processes.run(counting)
    assert calls[0] == calls[1] > 0
    pieces = torch.cat([fit(each.advantages, 6) for each in both])
    assert torch.equal(pieces[step.mask], alone.advantages[step.mask])


def test_the_placeholder_is_text_of_the_tokenizer():
    assert TOKENIZER("let me", add_special_tokens=False)["input_ids"] == [WORDS.index("let"), WORDS.index("me")]


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"beta": -0.1}, "beta must be >= 0 and finite, got -0.1"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"gamma": 0.0}, "gamma must be in (0, 1], got 0.0"),
        ({"gamma": 1.1}, "gamma must be in (0, 1], got 1.1"),
        ({"placeholder": " "}, "placeholder must be text, got ' '"),
        ({"template_before": -1}, "template_before and template_after must be >= 0, got -1, 0"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        InfoPo(**wrong)
    assert str(error.value) == sentence


def test_the_outcome_by_turns():
    # turns of 2, 2 and 1 tokens with gamma 1/2: 1/4, 1/2 and 1, of mean (2/4 + 2/2 + 1) / 5 = 1/2; of 2, 1 and 2 tokens
    # the same way: (2/4 + 1/2 + 2) / 5 = 3/5. A mixed group's gate is shut, so the outcome alone is left
    first, _ = shaped([1.0, 0.0], InfoPo(gamma=0.5, placeholder="4"))
    expected = [0.5, 0.5, 1, 1, 2, -0.25 / 0.6, -0.25 / 0.6, -0.5 / 0.6, -1 / 0.6, -1 / 0.6]
    assert first.advantages[MASK].tolist() == pytest.approx([x * 0.707106 for x in expected], abs=2e-6)
    means = [first.advantages[row][MASK[row]].mean().item() for row in (0, 1)]
    assert means == pytest.approx([0.707106, -0.707106], abs=1e-6)


def test_without_discount_the_outcome_is_left_to_the_bit():
    lengths = torch.tensor([[2.0, 3.0, 7.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert by_turn(lengths, 1.0).tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert by_turn(lengths, 1e-300).isfinite().all()
