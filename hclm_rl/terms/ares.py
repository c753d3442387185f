"""ARES, adaptive reasoning by entropy shaping (its RL stage: AEPO): Chen et al., 2025, arXiv:2510.08457"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..equations.functional import in_double, quantile, row_quantile
from ..types import Effect, Rollout, RolloutEffect, Term, TokenBatch

DIFFICULTIES = ("easy", "medium", "hard")
# of easy, medium, hard prompts; the authors' code
MARGIN, KAPPA, SPREAD, CAP, WRONG = (
    (0.15, 0.25, 0.35),
    (2.0, 3.0, 4.0),
    (2.0, 2.5, 3.0),
    (1.0, 1.0, 1.2),
    (0.6, 0.8, 1.0),
)
THRESHOLD_DECAY = 0.99  # of theta, a generation batch
STRENGTH_RATE, LARGEST_STRENGTH = 0.05, 2.0
SECOND_CHANCE_FROM = 0.5  # nats, of the doubt of a response
KL_DECAY, KL_DEAD_ZONE, KL_RATE, KL_STEP, KL_WEIGHTS = 0.97, 0.02, 0.05, 0.2, (1e-4, 1e2)
TURNS = (  # words at which an argument turns or goes on: our choice, shorter than the authors' list of 174
    "actually also although alternatively another assume because besides but check consequently consider conversely "
    "finally first further furthermore hence hmm however if indeed instead let maybe meanwhile moreover nevertheless "
    "next now otherwise perhaps rather recall second similarly since so still suppose then therefore though thus "
    "unless wait whereas whether yet"
)


@dataclass(frozen=True, kw_only=True)
class Ares(Term):
    """Fewer moments of lasting doubt on easy prompts, a middle number on medium ones, more on hard ones.

    N = number of trigger tokens of a response whose W_i, the mean entropy of the next `window` tokens at the sampling
    policy, is at least theta; theta a running median over responses of the quantile of W. A prompt is easy where at
    least 2/3 of its responses are right, medium where 1/3, else hard; T_d is the rounded mean of N over the step's
    prompts of that kind. R = reward + S(N - T_d), `entropy_score`. Where the run has a reference model (beta > 0),
    kl_coef beta_d k3 is added to the loss, beta_d steered to kl_target by kind; times `second_chance` for a wrong
    response to an easy prompt whose doubt, the sum of max(W_i - theta, 0) over its trigger tokens, is at least 0.5
    nats. The authors' code, with exact entropies
    and sampled tokens; its KL is measured here once a generation batch. Wrong answers get S > 0: the gap narrows.

    Args:
        triggers: tokens in lower case without a space before; (): all tokens
        window: tokens, >= 1; the paper's
        level: quantile of W in a response, in (0, 1); the authors'
        correct_from: the reward from which a response is right: for 0/1 rewards
        strength: alpha_d at first, in [0, 2]; the authors'. It moves by at most 0.025 a step
        kl_coef: >= 0; the authors'; beside it TRL's beta acts as ever: make that small
        kl_target: nats a token, > 0; the authors'
        kl_every: generation batches between changes of beta_d, >= 1; the authors count micro-batches
        second_chance: in (0, 1]; the authors' config has 0.67, which never acts in their code: what it reads does not
            reach the actor

    Metrics:
        count (tokens a response): mean number of trigger tokens with lasting doubt
        target (tokens a response): the number that the responses are drawn to, by how hard their prompts are
        score (reward): mean of what is added to the reward
        easy (share): of the prompts at least 2/3 of whose responses are right
        medium (share): of the prompts at least 1/3 but under 2/3 of whose responses are right
        hard (share): of the other prompts. Healthy: not near 1. Else: nothing is learnt from prompts that are never
            solved: take easier ones
    """

    needs_scores: ClassVar[bool] = True
    shapes_rewards: ClassVar[bool] = True

    triggers: tuple[str, ...] = tuple(TURNS.split())
    window: int = 4
    level: float = 0.95
    correct_from: float = 1.0
    strength: float = 0.5
    kl_coef: float = 0.01
    kl_target: float = 0.01
    kl_every: int = 100
    second_chance: float = 1.0

    def __post_init__(self) -> None:
        if self.window < 1 or self.kl_every < 1:
            raise ValueError(f"window and kl_every must be at least 1, got {self.window} and {self.kl_every}")
        if not 0 < self.level < 1:
            raise ValueError(f"level must be in (0, 1), got {self.level}")
        if others := [trigger for trigger in self.triggers if trigger != trigger.lower()]:
            raise ValueError(f"triggers are in lower case, as tokens are compared with them, got {others[0]!r}")
        if not 0 <= self.strength <= LARGEST_STRENGTH:
            raise ValueError(f"strength must be in [0, 2], got {self.strength}")
        if not self.kl_coef >= 0 or not self.kl_target > 0:
            raise ValueError(f"kl_coef must be >= 0 and kl_target > 0, got {self.kl_coef} and {self.kl_target}")
        if not 0 < self.second_chance <= 1:
            raise ValueError(f"second_chance must be in (0, 1], got {self.second_chance}")
        if not math.isfinite(self.correct_from):
            raise ValueError(f"correct_from must be finite, got {self.correct_from}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        size = rollout.group_rewards.size(1)
        # a reward is a constant; float64: what a row sums to must not show how many padded slots it has
        ahead = entropy_ahead(in_double(rollout.scored()[1].detach()), rollout.mask, self.window)
        theta = self._theta(rollout, ahead, memory)
        is_trigger = self._is_trigger(rollout)
        count = in_double((is_trigger & (ahead >= theta)).sum(dim=1))
        rewards = rollout.everywhere(rollout.rewards)
        is_right = rewards >= self.correct_from  # False for NaN
        is_scored = (~rewards.isnan()).view(-1, size)
        accuracy = in_double(is_right.view(-1, size).sum(dim=1)) / is_scored.sum(dim=1)
        kind = torch.where(accuracy >= 2 / 3, 0, torch.where(accuracy >= 1 / 3, 1, 2))
        kind = torch.where(is_scored.any(dim=1), kind, -1)
        means = rollout.everywhere(count).view(-1, size).mean(dim=1)
        for k, name in enumerate(DIFFICULTIES):
            if (kind == k).any():
                mean = float(means[kind == k].mean())
                memory[f"target_{name}"] = round(mean)
                excess = (mean - round(mean)) * (-1 if name == "hard" else 1)
                strength = memory.get(f"strength_{name}", self.strength) + STRENGTH_RATE * excess
                memory[f"strength_{name}"] = min(max(strength, 0.0), LARGEST_STRENGTH)
        own = rollout.here(kind.clamp(min=0).repeat_interleave(size))
        target = count.new_tensor([memory.get(f"target_{name}", 0) for name in DIFFICULTIES])[own]
        strength = count.new_tensor([memory.get(f"strength_{name}", self.strength) for name in DIFFICULTIES])[own]
        score = entropy_score(count, target, strength, own, rollout.rewards >= self.correct_from)
        columns = {}
        if rollout.ref_logps is not None:
            of_row = kind.repeat_interleave(size)
            chance = self._chances(rollout, rollout.here(of_row == 0), torch.where(is_trigger, ahead - theta, 0.0))
            columns["kl_weight"] = chance * self._kl_weights(rollout, of_row, memory)[own]
        shares = {name: in_double(kind == k).mean() for k, name in enumerate(DIFFICULTIES)}
        return RolloutEffect(
            rewards=rollout.rewards + score.to(rollout.rewards.dtype),
            columns=columns,
            metrics={"count": count.mean(), "target": target.mean(), "score": score.mean(), **shares},
        )

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if batch.ref_logps is None or not self.kl_coef:
            return Effect()
        weight = batch.columns["kl_weight"].to(batch.logps.dtype).unsqueeze(1)
        return Effect(loss=self.kl_coef * weight * k3(batch.logps, batch.ref_logps, batch.mask))

    def _is_trigger(self, rollout: Rollout) -> Bool[Tensor, "N T"]:
        if not self.triggers:
            return rollout.mask
        ids = rollout.ids[rollout.mask].unique()
        tokens = rollout.tokenizer.convert_ids_to_tokens(ids.tolist())
        words = [(token or "").lstrip("Ġ▁ ").lower() for token in tokens]  # None for an id that no token has
        wanted = [i for i, word in zip(ids, words, strict=True) if word in self.triggers]
        return rollout.mask & torch.isin(rollout.ids, torch.stack(wanted) if wanted else ids[:0])

    def _theta(self, rollout: Rollout, ahead: Float[Tensor, "N T"], memory: dict) -> float:
        """The threshold of the batches before this one, of this one where it is the first; the memory moves on."""
        quantiles = rollout.everywhere(row_quantile(ahead, ahead.isfinite(), self.level))
        quantiles = quantiles[~quantiles.isnan()]
        if not len(quantiles):
            return memory.get("theta", math.inf)
        median = float(quantile(quantiles, 0.5))
        theta = memory.get("theta", median)
        memory["theta"] = THRESHOLD_DECAY * theta + (1 - THRESHOLD_DECAY) * median if "theta" in memory else median
        return theta

    def _chances(self, rollout: Rollout, is_easy: Bool[Tensor, "N"], above: Float[Tensor, "N T"]) -> Float[Tensor, "N"]:
        """`second_chance` where it acts, else 1; `above` is W - theta at the trigger tokens, NaN where W is."""
        doubt = torch.where(above > 0, above, 0.0).sum(dim=1)
        acts = is_easy & (rollout.rewards < self.correct_from) & (doubt >= SECOND_CHANCE_FROM)
        return torch.where(acts, self.second_chance, 1.0).to(doubt.dtype)

    def _kl_weights(self, rollout: Rollout, kind: Int[Tensor, "all"], memory: dict) -> Float[Tensor, "three"]:
        """beta_d of easy, medium and hard prompts, after this batch's KL."""
        assert rollout.ref_logps is not None
        tokens = rollout.mask.sum(dim=1)
        divergence = (
            k3(in_double(rollout.scored()[0].detach()), in_double(rollout.ref_logps.detach()), rollout.mask).sum(dim=1)
            / tokens
        )
        divergence = rollout.everywhere(divergence)  # NaN for a response without tokens
        memory["batches"] = memory.get("batches", 0) + 1
        for k, name in enumerate(DIFFICULTIES):
            values = divergence[(kind == k) & divergence.isfinite()]
            if not len(values):
                continue
            mean = float(values.mean())
            mean = memory[f"kl_{name}"] = KL_DECAY * memory.get(f"kl_{name}", mean) + (1 - KL_DECAY) * mean
            error = mean / self.kl_target - 1
            if abs(error) < KL_DEAD_ZONE or memory["batches"] % self.kl_every:
                continue
            smooth = (1 - KL_DECAY) * error + KL_DECAY * memory.get(f"error_{name}", 0.0)
            step = KL_RATE * min(max(smooth, -KL_STEP), KL_STEP)
            weight = memory.get(f"weight_{name}", 1.0) * math.exp(step)
            memory[f"error_{name}"] = smooth
            memory[f"weight_{name}"] = min(max(weight, KL_WEIGHTS[0]), KL_WEIGHTS[1])
        return divergence.new_tensor([memory.get(f"weight_{name}", 1.0) for name in DIFFICULTIES])


def entropy_ahead(
    entropy: Float[Tensor, "rows T"], mask: Bool[Tensor, "rows T"], window: int
) -> Float[Tensor, "rows T"]:
    """W_i = mean of H_(i+1) .. H_(i+window); NaN where fewer than `window` response tokens follow without a break."""
    values = torch.nn.functional.pad(torch.where(mask, entropy, 0.0)[:, 1:], (0, window)).unfold(1, window, 1)
    counts = torch.nn.functional.pad(mask[:, 1:], (0, window)).unfold(1, window, 1).all(dim=2) & mask
    return torch.where(counts, values.mean(dim=2), torch.nan)


def k3(logps: Float[Tensor, "*S"], ref_logps: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """KL(pi, ref) of a sampled token, r - 1 - log r with r = p_ref / p; 0 off the mask."""
    log_ratio = torch.where(mask, ref_logps - logps, 0.0)
    return log_ratio.exp() - 1 - log_ratio


def entropy_score(
    count: Float[Tensor, "N"],
    target: Float[Tensor, "N"],
    strength: Float[Tensor, "N"],
    kind: Int[Tensor, "N"],
    is_right: Bool[Tensor, "N"],
) -> Float[Tensor, "N"]:
    """S of N = count against T = target; kind 0, 1, 2 is easy, medium, hard.

    D = N - T, M = max(1, f max(T, 1)), cap = c alpha; right: -min(cap, huber(x) cap / (M + kappa)) with x the excess
    over M of D (easy) or |D| (medium), hard: sigmoid((D + M) / t) cap from D = -M on, below it half that penalty of
    -D - M; wrong: 0.6, 0.8, 1 times sigmoid(max(D - M, 0) / t) cap.
    """
    margin, kappa, spread, limit, wrong = (
        count.new_tensor(values)[kind] for values in (MARGIN, KAPPA, SPREAD, CAP, WRONG)
    )
    distance = count - target
    slack = (margin * target.clamp(min=1.0)).clamp(min=1.0)
    cap = limit * strength

    def penalty(excess: Tensor, scale: float = 1.0) -> Tensor:
        excess = excess.clamp(min=0.0)
        huber = torch.where(excess <= kappa, excess**2 / (2 * kappa), excess - kappa / 2)
        return -torch.minimum(cap, scale * huber / (slack + kappa) * cap)

    reward = torch.where(
        distance >= -slack, torch.sigmoid((distance + slack) / spread) * cap, penalty(-distance - slack, 0.5)
    )
    right = torch.stack([penalty(distance - slack), penalty(distance.abs() - slack), reward]).gather(0, kind[None])[0]
    return torch.where(is_right, right, wrong * torch.sigmoid((distance - slack).clamp(min=0.0) / spread) * cap)
