"""The terms in the form of their authors' code, against plain loops written from the cards, down to the token's loss.

Random batches with gaps in the mask, where a tool wrote, and a policy that has moved since it sampled. What their code
takes per micro-batch is taken so here (statistics="micro_batch"), and the base loss is written out as the cards
have it, so that the trainers' hand-over of advantages is checked along with the weights.
"""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.clip_cov import ClipCov
from hclm_rl.terms.discriminator_clip import DiscriminatorClip
from hclm_rl.terms.entropy_advantage import EntropyAdvantage
from hclm_rl.terms.epo import Epo
from hclm_rl.terms.forking_tokens import ForkingTokens
from hclm_rl.terms.kl_cov import KlCov
from hclm_rl.terms.pear import Pear
from hclm_rl.terms.perplexity_advantage import PerplexityAdvantage
from hclm_rl.terms.position_advantage import PositionAdvantage
from hclm_rl.terms.qae import Qae
from hclm_rl.terms.steer import Steer

from .term_batches import Step, both_stages, first_stage, make_step, rollout, second_stage, surrogate, token_batch

EPS = (0.2, 0.28)
ROWS = slice(1, 7)  # the micro-batch
Place = tuple[int, int]
Token = dict[str, float]
every_seed = pytest.mark.parametrize("seed", range(8))


def batch_with_gaps(seed: int) -> Step:
    """A tool wrote some tokens inside the responses; rewards are 0 or 1, never all equal in a group."""
    step, source = make_step(seed, torch.float64), random.Random(seed)
    mask = step.mask.clone()
    for b, t in ((b, t) for b in range(8) for t in range(1, 5)):
        if mask[b, t + 1 :].any() and source.random() < 0.25:
            mask[b, t] = False
    rewards = [1.0, 0.0, *(float(source.random() < 0.5) for _ in range(2))] * 2
    return replace(step, mask=mask, rewards=torch.tensor(rewards, dtype=torch.float64))


def tokens_of(step: Step, rows: slice = ROWS, clip_range: tuple[float, float] = EPS) -> dict[Place, Token]:
    """What a loop needs to know of each token that counts, by its row in the micro-batch and its slot."""
    found = {}
    for row, b in enumerate(range(8)[rows]):
        for t in step.mask[b].nonzero().squeeze(1).tolist():
            lp, old, a = step.logps[b, t].item(), step.old_logps[b, t].item(), step.advantages[b].item()
            r = math.exp(lp - old)
            clipped = min(max(r, 1 - clip_range[0]), 1 + clip_range[1])
            found[row, t] = {
                "lp": lp,
                "old": old,
                "a": a,
                "h": step.entropy[b, t].item(),
                "old_h": step.old_entropy[b, t].item(),
                "r": r,
                "base": max(-a * r, -a * clipped),
                "is_clipped": -a * clipped > -a * r,
            }
    return found


def losses_and_gradient(term, step: Step, clip_range: tuple[float, float] = EPS, rows: slice = ROWS):
    """Per-token loss and its gradient at the log-probs, of the micro-batch as the trainers would compute it."""
    memory: dict = {}
    first = first_stage(term, rollout(step), memory)
    batch = token_batch(step, rows, clip_range=clip_range)
    outcome = second_stage(term, batch, first, memory, rows)
    shaped = batch.advantages if first.advantages is None else first.advantages[rows].unsqueeze(1)
    shaped = shaped.expand(batch.mask.shape) if outcome.advantages is None else outcome.advantages
    losses = surrogate(batch, shaped) + sum(outcome.losses.values())
    losses[batch.mask].sum().backward()
    places = [tuple(at) for at in batch.mask.nonzero().tolist()]
    gradient = {at: batch.logps.grad[at].item() for at in places}
    return {at: losses[at].item() for at in places}, gradient, outcome


def weighted(tokens: dict[Place, Token], weight: dict[Place, float]) -> tuple[dict, dict]:
    """Loss w * base and its gradient -w A r, none where PPO clips."""
    losses = {at: weight[at] * token["base"] for at, token in tokens.items()}
    moves = {at: 0.0 if token["is_clipped"] else -weight[at] * token["a"] * token["r"] for at, token in tokens.items()}
    return losses, moves


def covariances(tokens: dict[Place, Token]) -> dict[Place, float]:
    """cov_t = (A_t - mean A) (log p_t - mean log p), over the micro-batch."""
    mean_a = sum(token["a"] for token in tokens.values()) / len(tokens)
    mean_lp = sum(token["lp"] for token in tokens.values()) / len(tokens)
    return {at: (token["a"] - mean_a) * (token["lp"] - mean_lp) for at, token in tokens.items()}


@every_seed
def test_clip_cov(seed: int):
    step, wide = batch_with_gaps(seed), (1.0, 1.0)  # the authors' epsilons
    tokens = tokens_of(step, clip_range=wide)
    cov = covariances(tokens)
    candidates = {at for at, token in tokens.items() if not token["is_clipped"] and 0.2 < cov[at] < 2.0}
    assert candidates
    term = ClipCov(statistics="micro_batch", ratio=1.0, lower=0.2, upper=2.0)  # the quota takes all candidates
    losses, gradient, _ = losses_and_gradient(term, step, wide)
    expected = weighted(tokens, {at: 0.0 if at in candidates else 1.0 for at in tokens})
    assert (losses, gradient) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    # a draw of floor(0.1 N), or of as many as there are
    losses, _, _ = losses_and_gradient(replace(term, ratio=0.1), step, wide)
    picked = {at for at in tokens if losses[at] == 0.0 and tokens[at]["base"]}
    assert picked <= candidates and len(picked) == min(max(math.floor(0.1 * len(tokens)), 1), len(candidates))


@every_seed
def test_kl_cov(seed: int):
    step, unclipped = batch_with_gaps(seed), (1e9, 1e9)
    tokens = tokens_of(step, clip_range=unclipped)
    cov = covariances(tokens)
    picked = sorted(tokens, key=cov.get, reverse=True)[: max(1, math.floor(0.2 * len(tokens)))]
    losses, gradient = weighted(tokens, dict.fromkeys(tokens, 1.0))
    for at in picked:
        drift = tokens[at]["lp"] - tokens[at]["old"]
        losses[at] += 0.7 * abs(drift)
        gradient[at] += 0.7 * math.copysign(1, drift)
    found = losses_and_gradient(KlCov(ratio=0.2, beta=0.7, statistics="micro_batch"), step, unclipped)
    assert found[:2] == (pytest.approx(losses), pytest.approx(gradient))


@every_seed
@pytest.mark.parametrize("normalise_by", ["kept", "all"])
def test_forking_tokens(seed: int, normalise_by: str):
    step = batch_with_gaps(seed)
    step = replace(step, entropy=step.entropy.round(decimals=0))  # many ties
    tokens = tokens_of(step)
    k = max(1, int(0.3 * len(tokens) + 0.9999))
    kept = sorted(tokens, key=lambda at: tokens[at]["h"], reverse=True)[:k]  # stable: of equal ones the first
    scale = len(tokens) / k if normalise_by == "kept" else 1.0
    term = ForkingTokens(share=0.3, normalise_by=normalise_by, ties="cut", statistics="micro_batch")
    found = losses_and_gradient(term, step)
    losses, gradient = weighted(tokens, {at: scale if at in kept else 0.0 for at in tokens})
    # the weight is a float32
    assert found[:2] == (pytest.approx(losses, rel=1e-6), pytest.approx(gradient, rel=1e-6))


def steer_changes(tokens: dict[Place, Token]) -> dict[Place, float]:
    """m_t = |A / o * p (1 - p) (ln p + H_old)|."""
    changes = {}
    for at, token in tokens.items():
        p = min(max(math.exp(token["lp"]), 1e-8), 1 - 1e-8)
        o = min(max(math.exp(token["old"]), 1e-8), 1.0)
        changes[at] = abs(token["a"] / o * p * (1 - p) * (math.log(p) + token["old_h"]))
    return changes


def exponential(m: dict[Place, float]) -> dict[Place, float]:
    k = -math.log(0.8) / max(max(m.values()), 0.02)
    return {at: min(max(math.exp(-k * x), 0.8), 1.0) for at, x in m.items()}


def linear(m: dict[Place, float]) -> dict[Place, float]:
    low, high = min(m.values()), max(m.values())
    return {at: min(max(1.2 - (x - low) * (1.2 - 0.8) / (high - low), 0.8), 1.2) for at, x in m.items()}


@every_seed
@pytest.mark.parametrize("weighting", [exponential, linear])
def test_steer(seed: int, weighting: Callable):
    step = batch_with_gaps(seed)
    tokens = tokens_of(step)
    found = losses_and_gradient(Steer(weighting=weighting.__name__, statistics="micro_batch"), step)
    losses, gradient = weighted(tokens, weighting(steer_changes(tokens)))
    assert found[:2] == (pytest.approx(losses), pytest.approx(gradient))


@every_seed
def test_discriminator_clip(seed: int):
    # the authors' code takes the whole batch too: there is no other form
    step = batch_with_gaps(seed)
    everything = tokens_of(step, slice(None))
    s = {at: math.exp(token["old"]) * (token["old_h"] + token["old"]) for at, token in everything.items()}
    mean = sum(s.values()) / len(s)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in s.values()) / len(s))
    weight = {at: float(token["a"] >= 0 or s[at] - mean >= -0.3 * deviation) for at, token in everything.items()}
    assert 0 < sum(weight.values()) < len(weight)
    scale = len(weight) / sum(weight.values())
    losses, gradient = weighted(everything, {at: w * scale for at, w in weight.items()})
    found = losses_and_gradient(DiscriminatorClip(mu=0.3), step, rows=slice(None))
    # the weight is a float32
    assert found[:2] == (pytest.approx(losses, rel=1e-6), pytest.approx(gradient, rel=1e-6))


def turns_of(step: Step, b: int) -> list[list[int]]:
    """The unbroken runs of response tokens of a row."""
    turns: list[list[int]] = []
    for t in step.mask[b].nonzero().squeeze(1).tolist():
        if turns and turns[-1][-1] == t - 1:
            turns[-1].append(t)
        else:
            turns.append([t])
    return turns


@every_seed
@pytest.mark.parametrize("average", ["turns", "tokens"])
@pytest.mark.parametrize("penalty", ["distance", "indicator"])
def test_epo(seed: int, average: str, penalty: str):
    step = batch_with_gaps(seed)
    term = Epo(alpha=0.3, kappa_l=0.8, kappa_r=1.2, penalty=penalty, average=average, schedule="code")
    memory = {"entropy_sum": 2.7, "steps": 3}  # Hbar = 0.9: the band is 0.72 to 1.08
    batch = token_batch(step)
    outcome = second_stage(term, batch, first_stage(term, rollout(step), memory), memory)
    beta = 1 - 0.2 * (1 - math.exp(-2 * batch.step / 75))
    values, slopes = {}, {}
    for at, h in ((tuple(at), batch.entropy[at[0], at[1]].item()) for at in batch.mask.nonzero().tolist()):
        distance = max(0.0, 0.72 - h) + max(0.0, h - 1.08)
        values[at] = h - beta * 0.3 * (distance if penalty == "distance" else float(distance > 0))
        slopes[at] = 1 - beta * 0.3 * ((h > 1.08) - (h < 0.72)) * (penalty == "distance")
    share = {}
    for b in range(8):
        turns = turns_of(step, b)
        share |= {(b, t): 1 / (8 * len(turns) * len(turn)) for turn in turns for t in turn}
    if average == "tokens":
        share = dict.fromkeys(share, 1 / len(share))
    loss = outcome.losses["link"][batch.mask].mean()
    assert loss.item() == pytest.approx(-sum(share[at] * value for at, value in values.items()), rel=1e-6)
    loss.backward()
    gradient = {at: batch.entropy.grad[at].item() for at in share}
    assert gradient == pytest.approx({at: -share[at] * slopes[at] for at in share}, rel=1e-6)


def in_groups(step: Step, values: list[float]) -> list[list[float]]:
    """The values of each response's group."""
    return [values[b - b % step.group_size :][: step.group_size] for b in range(8)]


def mean_of_responses(step: Step, values: torch.Tensor) -> list[float]:
    return [sum(row[counts].tolist()) / int(counts.sum()) for row, counts in zip(values, step.mask, strict=True)]


def advantages_after(term, step: Step) -> list[float]:
    """One advantage a response, as stage 1 leaves them."""
    return first_stage(term, rollout(step), {}, group_size=step.group_size).advantages.tolist()


@every_seed
def test_entropy_advantage(seed: int):
    step = batch_with_gaps(seed)
    means = mean_of_responses(step, step.old_entropy)
    expected = [
        (1 + (sum(group) / 4 - h) / (sum(group) / 4)) * a
        for h, group, a in zip(means, in_groups(step, means), step.advantages.tolist(), strict=True)
    ]
    # the 1e-8 beside the group's mean
    assert advantages_after(EntropyAdvantage(floor=None), step) == pytest.approx(expected, rel=1e-6)
    clipped = [min(max(a, -0.5), 0.5) for a in step.advantages.tolist()]
    assert advantages_after(EntropyAdvantage(form="clip", beta=0.5), step) == pytest.approx(clipped)


def linear_quantile(values: list[float], level: float) -> float:
    ordered, at = sorted(values), level * (len(values) - 1)
    low = math.floor(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


@every_seed
@pytest.mark.parametrize("favours, sign", [("low", -1), ("high", 1)])
def test_perplexity_advantage(seed: int, favours: str, sign: int):
    step = batch_with_gaps(seed)
    perplexities, expected = [-x for x in mean_of_responses(step, step.old_logps)], []
    for own, group, a in zip(perplexities, in_groups(step, perplexities), step.advantages.tolist(), strict=True):
        q1, q3 = linear_quantile(group, 0.25), linear_quantile(group, 0.75)
        kept = [x for x in group if q1 - 1.5 * (q3 - q1) <= x <= q3 + 1.5 * (q3 - q1)]
        mean = sum(kept) / len(kept)
        std = math.sqrt(sum((x - mean) ** 2 for x in kept) / len(kept))
        w = (own - mean) / (std if std > 1e-6 else 1.0)
        expected.append(a * min(max(1 + sign * 0.15 * w, 0.8), 1.2))
    assert advantages_after(PerplexityAdvantage(alpha=0.15, favours=favours), step) == pytest.approx(expected)


@every_seed
def test_position_advantage(seed: int):
    step = batch_with_gaps(seed)
    batch, advantages, _ = both_stages(PositionAdvantage(), step)
    for b in range(8):
        places = step.mask[b].nonzero().squeeze(1).tolist()
        for i, t in enumerate(places):
            a = batch.advantages[b, t].item()
            bonus = min(0.1 / (1 + math.exp(-15 * (i / len(places) - 0.5))), 0.5 * abs(a))
            assert advantages[b, t].item() == pytest.approx(a + (a > 0) * bonus - (a < 0) * bonus)


@every_seed
@pytest.mark.parametrize("level", [0.2, 0.4, 0.6])
def test_qae(seed: int, level: float):
    step = batch_with_gaps(seed)
    rewards, expected, readme = step.rewards.tolist(), [], []
    for own, group in zip(rewards, in_groups(step, rewards), strict=True):
        mean = sum(group) / 4
        scale = math.sqrt(sum((x - mean) ** 2 for x in group) / 3) + 1e-4  # TRL's convention
        baseline = sorted(group)[math.ceil(level * 4 - 1e-9) - 1]
        expected.append((own - baseline) / scale)
        readme.append((own - linear_quantile(group, level)) / scale)
    assert advantages_after(Qae(quantile_k=level), step) == pytest.approx(expected)
    assert advantages_after(Qae(quantile_k=level, interpolate=True), step) == pytest.approx(readme)


@every_seed
@pytest.mark.parametrize("unclosed", ["all", "all_but_last"])
def test_pear(seed: int, unclosed: str):
    step = batch_with_gaps(seed)
    term, expected = Pear(think_end=(3,), unclosed=unclosed), []
    for b in range(8):
        places = step.mask[b].nonzero().squeeze(1).tolist()
        entropy = [step.old_entropy[b, t].item() for t in places]
        ids = [step.ids[b, t].item() for t in places]
        if 3 in ids:
            k = ids.index(3)
            thinking, answer = entropy[:k], entropy[k + 1 :]
        else:
            thinking, answer = entropy if unclosed == "all" else entropy[:-1], []
        penalty = max(0.0, sum(thinking) / max(len(thinking), 1) - sum(answer) / max(len(answer), 1))
        expected.append(min(1.0, 1.0 - penalty) if step.rewards[b] == 1 else 0.0)
    rewards = first_stage(term, rollout(step), {}, group_size=4).rewards.tolist()
    assert rewards == pytest.approx(expected)
