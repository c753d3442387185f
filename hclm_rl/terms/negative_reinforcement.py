"""W-REINFORCE, NSR and PSR, reinforcement by sign: Zhu et al., 2025, arXiv:2506.01347"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.flow import loss_weights
from ..equations.functional import in_double
from ..responses.right_answers import is_right, tell_of_unclear_rewards
from ..types import Direction, Rollout, RolloutEffect, Term


@dataclass(frozen=True, kw_only=True)
class NegativeReinforcement(Term):
    """Wrong responses are pushed down with weight 1, right ones up with little or none: no group, no baseline.

    "weighted" (W-REINFORCE): A = lam for right, -1 for wrong; "negative" (NSR): -1 for wrong, right ones are left out;
    "positive" (PSR): 1 for right, wrong ones are left out. With a softmax policy a wrong token of probability p moves
    its logit by -(1 - p) and every other v's by p_v, so mass goes to what the model already held plausible. A does not
    centre: groups that are all wrong train, which is the point, and so do those that are all right, unlike under GRPO;
    a filter of groups without deviation takes most of it away. Wrong answers are longer, so that under a token mean lam
    is one of tokens, not of responses. Truncated and unread responses count as wrong and push down good beginnings:
    mask_truncated_completions. With several updates per rollout the lower clip is what stops a wrong token from going
    to 0: leave epsilon as it is. On small models "negative" raises the entropy without bound. What nothing scored gets
    A = 0. The paper's runs have an entropy bonus of 0.001 from the default of their code.

    Args:
        form: of the paper's three
        lam: of "weighted", at least 0; the README's, 1 in their config; 0 is "negative" over the mean of all
        mean_over: "all": what is left out counts in the loss's mean; "kept": the mean is over what is not left out, of
            the whole step, as in the authors' code, so the step grows as fewer are wrong
        right_at: the reward from which a response is right; None: 1, with a warning where rewards are not 0 or 1

    Metrics:
        right (share): of the responses that are right
        kept (share): of the responses that have a gradient. Healthy: above 0. Else: at 0 nothing is learnt: take
            another `form`
    """

    sets_baseline: ClassVar[bool] = True
    shapes_advantages: ClassVar[bool] = True

    form: Literal["weighted", "negative", "positive"] = "weighted"
    lam: float = 0.1
    mean_over: Literal["all", "kept"] = "all"
    right_at: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.lam < math.inf:
            raise ValueError(f"lam must be finite and at least 0, got {self.lam}")
        if self.form == "weighted" and self.mean_over == "kept":
            raise ValueError("mean_over: kept belongs to form: negative or positive; weighted leaves nothing out")

    @property
    def seeks(self) -> Direction | None:  # pyright: ignore[reportIncompatibleVariableOverride] (the form decides)
        return "less" if self.form == "positive" or (self.form == "weighted" and self.lam > 1) else "more"

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        tell_of_unclear_rewards("negative_reinforcement", rollout, self.right_at, memory)
        rewards = rollout.rewards
        right, scored = is_right(rewards, self.right_at), ~rewards.isnan()
        pays = {"weighted": (self.lam, -1.0), "negative": (0.0, -1.0), "positive": (1.0, 0.0)}[self.form]
        kept = scored & {"weighted": scored, "negative": ~right, "positive": right}[self.form]
        up, down = rewards.new_tensor(pays)
        advantages = torch.where(right, up, torch.where(scored, down, 0.0))
        if self.mean_over == "kept":
            advantages = advantages * self._share(rollout, kept).to(rewards)
        shares = {"right": right, "kept": kept}
        return RolloutEffect(
            advantages=advantages, metrics={name: in_double(each).mean() for name, each in shares.items()}
        )

    def _share(self, rollout: Rollout, kept: Bool[Tensor, "N"]) -> Float[Tensor, ""]:
        """What the loss's mean over the whole step has, over what of it is kept; 1 where nothing is."""
        weights = in_double(loss_weights(rollout))
        whole, of_kept = rollout.total(torch.stack([weights.sum(), weights[kept].sum()]))
        return torch.where(of_kept > 0, whole / torch.where(of_kept > 0, of_kept, 1), 1)
