"""ARM, Advantage Re-weighting Mechanism (of ProGRPO): Li et al., 2026, arXiv:2602.05281"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.functional import exactly, in_double, widest
from ..types import Direction, Rollout, RolloutEffect, Term, Transcript


@dataclass(frozen=True, kw_only=True)
class Arm(Term):
    """Pays confident responses less and rare ones more: A_i <- A_i + alpha (c(q) - c(o_i)), for right and wrong alike.

    c = exp(mean log p of the `fraction` least likely tokens, ceil(fraction n) of n, at least one) at the sampling
    policy, in (0, 1]; c(o_i) of the response, c(q) of its prompt without the first token. No shift where all rewards of
    the group are 0. A group that is all correct has A = 0 and is moved by the shift alone, unless a filter drops it
    before. Not centred: where prompts are less predictable than responses it is a net push down, and a large alpha
    turns right answers' advantages negative: watch `flips`. Costs a forward pass over the prompts. Written from the
    abstract and secondary readings.

    Args:
        alpha: >= 0, bounds the shift; ours, in none of our sources, which call it sensitive: try 0.1 to 0.5
        fraction: of the response's tokens, in (0, 1]; the paper's value, its rounding ours
        prompt_fraction: of the prompt's, in (0, 1]; ours; 1.0 is the plain inverse perplexity
        shift_when: "any_correct": where some reward is not 0, the formula as quoted; "mixed_only": where the rewards
            differ

    Metrics:
        prompt_confidence (probability): mean c(q) of the prompts, in (0, 1]
        response_confidence (probability): mean c(o) of the responses, in (0, 1]. Healthy: not near 1. Else: near 1 the
            policy is sure of everything, and the shift is c(q) - 1 for all
        shift (advantage): mean shift alpha (c(q) - c(o)). Healthy: near 0. Else: it is not centred; a net push down
            calls for a smaller `alpha`
        flips (share): of the advantages whose sign the shift changed. Healthy: near 0. Else: right answers are pushed
            down; lower `alpha`
    """

    needs_scores: ClassVar[bool] = True
    needs_rescoring: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "more"
    shapes_advantages: ClassVar[bool] = True

    alpha: float = 0.3
    fraction: float = 0.2
    prompt_fraction: float = 0.2
    shift_when: Literal["any_correct", "mixed_only"] = "any_correct"

    def caveats(self) -> list[str]:
        small = [f"{name} {vars(self)[name]:g}" for name in ("fraction", "prompt_fraction") if vars(self)[name] < 0.02]
        if not small:
            return []
        return [f"{' and '.join(small)}: a mean over one token in 50 or fewer is noise; the paper has one in 5"]

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be finite and >= 0, got {self.alpha}")
        for name in ("fraction", "prompt_fraction"):
            if not 0 < vars(self)[name] <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {vars(self)[name]}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        response = confidence(rollout.scored()[0], rollout.mask, self.fraction)
        prompt = self._of_prompts(rollout)
        shift = self.alpha * (prompt - response)  # NaN where there is no token to be confident of
        is_moved = self._is_moved(rollout.group_rewards) & ~rollout.rewards.isnan() & ~shift.isnan()
        shift = torch.where(is_moved, shift, 0.0).to(rollout.advantages.dtype)
        before = rollout.advantages
        after = before + (shift if before.dim() == 1 else shift.unsqueeze(1))
        first = (before, after) if before.dim() == 1 else (before[:, 0], after[:, 0])
        return RolloutEffect(
            advantages=after,
            metrics={
                "prompt_confidence": prompt.nan_to_num(nan=0.0).mean(),
                "response_confidence": response.nan_to_num(nan=0.0).mean(),
                "shift": in_double(shift).mean(),
                "flips": in_double(first[0] * first[1] < 0).mean(),
            },
        )

    def _is_moved(self, group_rewards: Float[Tensor, "N G"]) -> Bool[Tensor, "N"]:
        if self.shift_when == "any_correct":
            return (group_rewards.nan_to_num(nan=0.0) != 0).any(dim=1)
        is_scored = ~group_rewards.isnan()
        largest = torch.where(is_scored, group_rewards, -torch.inf).amax(dim=1)
        return largest > torch.where(is_scored, group_rewards, torch.inf).amin(dim=1)

    def _of_prompts(self, rollout: Rollout) -> Float[Tensor, "N"]:
        """c(q); each prompt is read once where its whole group is on this process."""
        assert rollout.transcript is not None
        ids, mask, size = rollout.transcript.prompt_ids, rollout.transcript.prompt_mask, rollout.group_rewards.size(1)
        if ids.size(1) < 2:
            return torch.full_like(rollout.rewards, torch.nan, dtype=widest(rollout.rewards.device))
        repeats = size if len(ids) % size == 0 else 1
        ids, mask = ids[::repeats], mask[::repeats]
        logps, _ = rollout.score(Transcript.of(ids, mask, ids.size(1) - 1))
        has_log_prob = mask[:, 1:] & mask[:, :-1]  # not the first token, which is read after padding
        return confidence(logps, has_log_prob, self.prompt_fraction).repeat_interleave(repeats)


def confidence(logps: Float[Tensor, "rows T"], mask: Bool[Tensor, "rows T"], fraction: float) -> Float[Tensor, "rows"]:
    """exp(mean of the k smallest log-probs), k = max(1, ceil(fraction n)); NaN for a row without tokens. In double."""
    count = mask.sum(dim=1, keepdim=True)
    k = (fraction * exactly(count) - 1e-9).ceil().clamp(min=1).long().to(mask.device)  # 0.28 * 25 is 7.000000000000001
    lowest = torch.where(mask, in_double(logps), torch.inf).sort(dim=1).values
    is_chosen = (torch.arange(mask.size(1), device=mask.device) < k) & (lowest < torch.inf)
    mean = torch.where(is_chosen, lowest, 0.0).sum(dim=1) / is_chosen.sum(dim=1)
    return mean.exp()
