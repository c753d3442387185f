"""KL among right answers, derived here; nearest: DPH-RL, Li et al., 2025, arXiv:2509.07430"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.functional import widest
from ..equations.rows import sums_of_responses
from ..responses.right_answers import is_right, number_of, prompts_of, tell_of_unclear_rewards
from ..types import Rollout, RolloutEffect, Term


@dataclass(frozen=True, kw_only=True)
class RightKl(Term):
    """Holds the proportions among the right answers to a prompt, and nothing else: which are commoner than they were.

    The gradient of KL(pi(.|x, right) || pi_0(.|x, right)). With s_i = log pi(y_i) - log pi_0(y_i), sums over tokens of
    the sampling policy, over the right responses of a group

        A'_i = A_i - lam (c_i - mean c)    c_i = clip(s_i - mean s, -c, c)

    so the corrections sum to 0: to first order pass@1 stays, and the start's mistakes are not held as a KL to the start
    holds them. Wrong responses keep their A, and so does a group's only right one. A right answer that falls silent is
    not seen any more and so not held (`right_anchor` does that). In long responses s sums many small drifts.

    Args:
        lam: strength, in advantages a nat, at least 0; ours, the card's worked example.
        c: nats, above 0; what s may be from the mean of the group's right ones; ours.
        against: what pi_0 is: "first", the policy that first sampled the same tokens, of which 16 bytes are kept, in
            checkpoints too; "reference", the frozen model of the run's KL penalty (beta above 0).
        right_at: the reward from which a response is right; None: 1, with a warning where rewards are not 0 or 1.

    Metrics:
        groups (share): of the groups with two or more right responses, on which alone it acts. Healthy: above 0. Else:
            it does nothing; `right_anchor` may
        drift (nats): mean over right responses of |s - mean s|, cut at `c`: how far the proportions have moved.
            Healthy: does not rise for long. Else: raise `lam`
    """

    needs_scores: ClassVar[bool] = True
    needs_rescoring: ClassVar[bool] = True  # for the prompts' tokens
    rescores_in_loss: ClassVar[bool] = True
    shapes_advantages: ClassVar[bool] = True

    lam: float = 0.1
    c: float = 5.0
    against: Literal["first", "reference"] = "first"
    right_at: float | None = None

    def __post_init__(self) -> None:
        if not self.lam >= 0:
            raise ValueError(f"lam must not be negative, got {self.lam}")
        if not self.c > 0:
            raise ValueError(f"c must be positive, got {self.c}")

    @property
    def needs_reference(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] (`against` decides)
        return self.against == "reference"

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        tell_of_unclear_rewards("right_kl", rollout, self.right_at, memory)
        mask = rollout.mask
        right = is_right(rollout.rewards, self.right_at) & mask.any(dim=1)
        now = summed(rollout.scored()[0], mask)
        s = now - self._first(rollout, now, right, memory)
        order = rollout.everywhere(rollout.group).argsort(stable=True).view(-1, rollout.group_rewards.size(1))
        own = rollout.here(order.flatten().argsort())  # this process's rows among those of the groups
        of_group = among_right(rollout.everywhere(s)[order], rollout.everywhere(right)[order], self.c)
        correction = self.lam * of_group.flatten()[own].to(rollout.advantages)
        if rollout.advantages.dim() == 2:
            correction = correction.unsqueeze(1)
        several = (rollout.everywhere(right)[order].sum(dim=1) > 1).to(s)
        drift = of_group.abs().sum() / rollout.everywhere(right).sum().clamp(min=1)
        return RolloutEffect(
            advantages=rollout.advantages - correction,
            metrics={"groups": several.mean(), "drift": drift},
        )

    def _first(
        self, rollout: Rollout, now: Float[Tensor, "N"], right: Bool[Tensor, "N"], memory: dict
    ) -> Float[Tensor, "N"]:
        """log pi_0 of each response."""
        if self.against == "reference":
            if rollout.ref_logps is None:
                raise ValueError(
                    "right_kl with against: reference needs the frozen model, which this run does not load: set beta "
                    "above 0, or against: first"
                )
            return summed(rollout.ref_logps, rollout.mask)
        assert rollout.transcript is not None
        texts = zip(prompts_of(rollout.transcript), rollout.ids, rollout.mask, strict=True)
        numbers = torch.tensor([number_of(asked, ids[own].tolist()) for asked, ids, own in texts])
        everyone = rollout.everywhere(numbers.to(now.device)).cpu()
        known = dict(
            zip(memory.get("answers", everyone[:0]).tolist(), memory.get("first", now[:0]).tolist(), strict=True)
        )
        rights, values = rollout.everywhere(right).tolist(), rollout.everywhere(now).tolist()
        for number, counts, value in zip(everyone.tolist(), rights, values, strict=True):
            if counts:
                known.setdefault(number, value)
        memory["answers"] = torch.tensor(list(known), dtype=torch.long)
        memory["first"] = torch.tensor(list(known.values()), dtype=now.dtype)
        found = [known.get(number, value) for number, value in zip(numbers.tolist(), now.tolist(), strict=True)]
        return torch.tensor(found, dtype=now.dtype, device=now.device)


def summed(logps: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N"]:
    """A sum over the padding would depend on the batch's width."""
    return sums_of_responses(logps.detach()[mask], mask).to(logps.device, widest(logps.device))


def among_right(s: Float[Tensor, "P G"], right: Bool[Tensor, "P G"], c: float) -> Float[Tensor, "P G"]:
    """clip(s - mean s, -c, c) less its mean, both over the right ones of each group; 0 elsewhere."""
    count = right.sum(dim=1, keepdim=True).clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        return torch.where(right, x - torch.where(right, x, 0).sum(dim=1, keepdim=True) / count, 0)

    return centred(centred(s).clamp(-c, c))
