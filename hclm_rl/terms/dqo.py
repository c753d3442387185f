"""DQO, Diversity Quality Optimization: 2025, arXiv:2509.04784"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.functional import widest
from ..equations.geometry import means_of_step, require_finite_states
from ..equations.gram import unexplained
from ..equations.rows import mean_of_responses
from ..responses.answers import own_last_words
from ..responses.names import find_function
from ..responses.right_answers import is_right, tell_of_unclear_rewards
from ..types import Direction, Rollout, RolloutEffect, Term

POLICY = "policy"
RIDGE = 1.0  # against unit norms; the paper's


@dataclass(frozen=True, kw_only=True)
class Dqo(Term):
    """Pays each response for the volume that it adds to those of its group: a determinant of their embeddings.

    phi_i is the embedding of response i at unit norm, L_ij = <phi_i, phi_j> over the group's k responses

        R'_i = R_i + alpha d_i      d_i = log det(L + I) - log det(L_-i + I) in [log((k + 1) / k), log 2] nats

    d_i = -log(1 - l_i), l_i the ridge leverage [L (L + I)^-1]_ii: the nearest prior work to `group_log_det`, which has
    the policy's centred states, a fine ridge, and a weight on right answers in the place of a sum with the reward. With
    k 4 a copy and a response unlike all others are .47 alpha apart, so alpha is to be of the size of the reward's own
    spread. In groups of equal reward GRPO's division makes the bonus the whole advantage. Responses without a token or
    a score have no part.

    Not verified, since no code was at hand: the paper's embedder, the unit norm (it follows from the stated bound), and
    that the bonus joins the reward before GRPO's normalisation.

    Args:
        alpha: in rewards a nat, >= 0; the paper's best is 0.5 to 1, 2 costs it pass@1
        features: "policy", the mean last hidden state that predicted the tokens, ours; or the dotted path of a function
            text -> vector, as the paper has an external sentence embedder, which cuts long responses
        right_only: True: only right responses are paid; ours. False, the paper's, pays wrong but unusual ones too
        centred: True: the group's mean is taken off the embeddings before their norm; ours, for embeddings of texts
            that share one large direction
        right_at: of `right_only`, the reward from which a response is right; None: 1, with a warning where rewards are
            not 0 or 1

    Metrics:
        volume (nats): mean over the responses of d, what each adds to the log-determinant of its group. Healthy: does
            not fall for long. Else: the responses of a group grow alike
        spread (nats): its standard deviation over the responses
    """

    seeks: ClassVar[Direction | None] = "more"
    shapes_rewards: ClassVar[bool] = True

    alpha: float = 1.0
    features: str = POLICY
    right_only: bool = False
    centred: bool = False
    right_at: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be >= 0 and finite, got {self.alpha}")
        if self.features != POLICY:
            find_function(self.features, "function that embeds a text")

    @property
    def needs_scores(self) -> bool:
        return self.features == POLICY

    @property
    def needs_hidden(self) -> bool:
        return self.features == POLICY

    def sampled_moments(self) -> tuple[Callable[..., Tensor], ...]:
        """With `features: policy` the mean state of each response, (N, D); else none."""
        return (mean_of_responses,) if self.features == POLICY else ()

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        mask, rewards = rollout.mask, rollout.rewards
        counts = mask.any(dim=1) & ~rewards.isnan()
        order = rollout.everywhere(rollout.group).argsort(stable=True).view(-1, rollout.group_rewards.size(1))
        own = rollout.here(order.flatten().argsort())  # this process's rows among those of the groups
        if self.features == POLICY:
            features = means_of_step(rollout)
        else:
            features = embedded(rollout.texts, self.features).to(mask.device)
        phi, is_in = (rollout.everywhere(x)[order] for x in (features, counts))
        volume = -unexplained(self._directions(phi, is_in), RIDGE).log()
        is_paid = counts
        if self.right_only:
            tell_of_unclear_rewards("dqo", rollout, self.right_at, memory)
            is_paid = counts & is_right(rewards, self.right_at)
        bonus = torch.where(is_paid, self.alpha * volume.flatten()[own].to(rewards), 0)
        count = is_in.sum().clamp(min=1)
        mean = torch.where(is_in, volume, 0).sum() / count
        deviation = (torch.where(is_in, volume - mean, 0).square().sum() / count).sqrt()
        return RolloutEffect(rewards=rewards + bonus, metrics={"volume": mean, "spread": deviation})

    def _directions(self, phi: Float[Tensor, "P G D"], is_in: Bool[Tensor, "P G"]) -> Float[Tensor, "P G D"]:
        """At unit norm; zeros for those left out, and where nothing is left of an embedding."""
        inside = is_in.unsqueeze(2)
        phi = torch.where(inside, phi, 0)
        require_finite_states(phi.square().sum())
        if self.centred:
            mean = phi.sum(dim=1, keepdim=True) / inside.sum(dim=1, keepdim=True).clamp(min=1)
            phi = torch.where(inside, phi - mean, 0)
        norm = phi.norm(dim=2, keepdim=True)
        return phi / torch.where(norm > 0, norm, 1)


def embedded(texts: Sequence[str | Sequence[dict]], path: str) -> Float[Tensor, "N D"]:
    """What a stranger's function makes of the responses, of a chat of its last turn. Refuses all but finite vectors."""
    embed: Callable[[str], object] = find_function(path, "function that embeds a text")
    rows = []
    for text in texts:
        vector = torch.as_tensor(embed(text if isinstance(text, str) else own_last_words(text)))
        if vector.dim() != 1 or not vector.isfinite().all() or (rows and len(vector) != len(rows[0])):
            wanted = f" as long as the first, {len(rows[0])}" if rows else ""
            raise ValueError(
                f"'{path}' must give a vector of finite numbers{wanted}, got the shape {tuple(vector.shape)} for "
                f"{text!r:.60}"
            )
        rows.append(vector.detach().cpu().to(widest(torch.device("cpu"))))
    return torch.stack(rows)
