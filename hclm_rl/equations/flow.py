"""Which tokens' updates move the policy's entropy, and weights that hold its change inside a band

A policy with probabilities p_v over the vocabulary has the entropy H = -sum p log p; raising the logit of v by x
changes H by -x S_v, with the discriminator

    S_v = p_v (log p_v + H)                                            (Wang et al., 2026, arXiv:2602.03392)

The policy gradient of a token a with advantage A and ratio 1 moves its logits along A (onehot(a) - p), hence H by

    e = -A (S_a - sum_v p_v S_v)                                       per unit of step, exactly, to first order

e < 0: the token's own update burns entropy. What updates of other tokens do to the same logits through shared
parameters is left out, so the unit of e is not nats per optimiser step: `Ledger` (ledger.py) learns the factor between
the two from the entropies that the run then shows. `head_influence` sees one way in which tokens share parameters, the
output head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..types import Metric, Rollout, TokenBatch, Total
from .clipped_sum import solve_clipped_sum
from .functional import Scalar, covariance_contributions, in_double, per_token
from .selections import drawn, quota


def step_covariances(rollout: Rollout) -> tuple[Float[Tensor, "M T"], Bool[Tensor, "M T"]]:
    """(cov_t = (A_t - mean A)(log p_t - mean log p), mask) of the rows of all processes, at the sampling policy.

    The means are over all tokens of the step: `covariance_contributions` of everything that was gathered.
    """
    mask = rollout.everywhere(rollout.mask)
    advantages = rollout.everywhere(per_token(rollout.advantages, rollout.mask))
    return covariance_contributions(rollout.everywhere(rollout.scored()[0]), advantages, mask), mask


def discriminator(logps: Float[Tensor, "*S"], entropy: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """S_a = p_a (log p_a + H) of the sampled tokens; its sign is that of p_a - exp(-H)."""
    return logps.exp() * (logps + entropy)


def mean_discriminator(logps: Float[Tensor, "n V"]) -> Float[Tensor, "n"]:
    """sum_v p_v S_v, from the whole distribution: the functional to give to `over_vocab`."""
    p = logps.exp()
    of_each = p * logps
    entropy = -of_each.sum(dim=-1)
    return (p * of_each).sum(dim=-1) + entropy * p.square().sum(dim=-1)  # sum p^2 log p + H sum p^2: no more copies


def entropy_influence(
    logps: Float[Tensor, "N T"],
    entropy: Float[Tensor, "N T"],
    mean: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
) -> Float[Tensor, "N T"]:
    """e = -A (S_a - `mean`), `mean` = sum_v p_v S_v; 0 off the mask. Nats per unit of step along the token's logits."""
    return torch.where(mask, -advantages * (discriminator(logps, entropy) - mean), 0)


def mean_entropy(rollout: Rollout) -> float:
    """Nats, over the tokens of all processes with a finite one; NaN without any."""
    entropy = rollout.scored()[1]
    counted = rollout.mask & entropy.isfinite()
    summed = (torch.where(counted, entropy, 0), counted.to(entropy))
    total, count = rollout.total(torch.stack([in_double(x).sum() for x in summed])).tolist()
    return total / count if count else math.nan


def policy_influence(
    rollout: Rollout, advantages: Float[Tensor, "N T"], share: float = 1.0
) -> tuple[float, Float[Tensor, "N T"]]:
    """(`mean_entropy`, `entropy_influence` of this process's tokens); influences may be not finite.

    Of each token by itself: `share` is `head_influence`'s.
    """
    (logps, entropy), mean = rollout.scored(), rollout.over_vocab(mean_discriminator)
    return mean_entropy(rollout), entropy_influence(logps, entropy, mean, advantages, rollout.mask)


def halves(rollout: Rollout) -> Bool[Tensor, "N"]:
    """Every second prompt of the step, or where there is one alone every second response."""
    group = rollout.everywhere(rollout.group)
    group = torch.arange(len(group), device=group.device) if (group == group[0]).all() else group
    return rollout.here(group) % 2 == 1


def drawn_share(mask: Bool[Tensor, "M T"], share: float, generator: torch.Generator) -> Bool[Tensor, "M T"]:
    """`share` of the tokens under the mask, rounded up, each as likely as the others."""
    return drawn(mask, quota(share, mask, "up"), generator)


def mean_gradient(rollout: Rollout, tokens: Bool[Tensor, "N T"]) -> Float[Tensor, "V D"]:
    """G = d mean H / d weight of the output head, over these tokens of all processes; 0 of none."""
    whole, count = rollout.total(rollout.entropy_by_head(tokens)), rollout.total(tokens.sum())
    return whole.div_(count.clamp(min=1))  # in place, for it is as large as the head


def head_influence(
    rollout: Rollout, advantages: Float[Tensor, "N T"], share: float = 1.0
) -> tuple[float, Float[Tensor, "N T"]]:
    """(`mean_entropy`, the head kernel's influence of this process's tokens).

    e = A (onehot(a) - p)^T G h, exactly what the token's gradient at the output head changes the mean entropy by that
    has the gradient G = d mean H / dW there, to first order: h its hidden state, G (V, D) that of the other half of
    the prompts (`halves`), so that no token is judged by what it says of itself. One G at a time, an all-reduce each.
    Of that half's tokens only `share` is read, in (0, 1], drawn over all processes: G is a mean, and a mean of drawn
    tokens estimates it without bias, with 1 / sqrt(share) times the error.
    """
    mask, odd, acts = rollout.mask, halves(rollout).unsqueeze(1), advantages != 0
    slope = torch.zeros_like(rollout.scored()[0])
    for of, others in ((mask & odd, mask & ~odd), (mask & ~odd, mask & odd)):
        read = others if share == 1 else rollout.here(drawn_share(rollout.everywhere(others), share, rollout.generator))
        slope = slope + rollout.slope_by_head(mean_gradient(rollout, read), of & acts).to(slope)  # 0 elsewhere
    return mean_entropy(rollout), torch.where(mask, advantages * slope, 0)


Through = Literal["logits", "head"]
# what of a token's update is followed to the entropy: its move of its own logits, or that of the output head
INFLUENCES: Final = {"logits": policy_influence, "head": head_influence}


def finite_part(
    influence: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> tuple[Float[Tensor, "N T"], Bool[Tensor, "N T"], Total]:
    """(the influences, 0 where not finite; the tokens that count; a metric: the number of those that do not)."""
    counted = mask & influence.isfinite()
    ignored = Total(sums=((mask & ~counted).sum().float(),), form=float)
    return torch.where(counted, influence, 0), counted, ignored


def loss_weights(rollout: Rollout) -> Float[Tensor, "N T"]:
    """How much each token counts in the policy loss, 1 on average over the tokens; 0 off the mask.

    1 where the loss is a mean over tokens; where it is one over sequences of their means, n / (R len) for a token of
    a response of `len` tokens, with n tokens and R responses on all processes. Times the correction for the sampler,
    where the loss has one: a token that it masks counts 0.
    """
    mask = rollout.mask
    weights = mask.to(rollout.scored()[0] if rollout.logps is not None else torch.float32)
    if rollout.loss_mean == "sequences":
        lengths = mask.sum(dim=1, keepdim=True)
        tokens, responses = rollout.total(torch.stack([lengths.sum(), lengths.new_tensor(len(mask))]))
        weights = weights * (tokens / responses / lengths.clamp(min=1))
    if rollout.sampler_ratio is not None:
        weights = torch.where(mask, weights * rollout.sampler_ratio, 0)
    return weights


def standard_error(mean: float, squares: float, count: float) -> float:
    """Of a mean over `count` tokens whose squares sum to `squares`, as if they were independent."""
    return math.sqrt(max(squares / count - mean * mean, 0.0) / count) if count else 0.0


def without_gradient(batch: TokenBatch, influence: Float[Tensor, "B T"]) -> dict[str, Metric]:
    """`clipped`: what of the optimiser step's mean influence lay on tokens that the loss clips, if it clips any."""
    if batch.is_clipped is None:
        return {}
    sums = torch.where(batch.is_clipped & batch.mask, influence, 0).sum(), batch.mask.sum().to(influence)
    return {"clipped": Total(sums=sums, form=lambda lost, count: lost / count if count else 0.0)}


@dataclass(frozen=True)
class Sides:
    """Sums of a step's influences, over all processes: what raises entropy, what burns it, and their squares."""

    raising: Scalar  # sum of e > 0, >= 0
    burning: Scalar  # sum of e < 0, <= 0
    count: Scalar  # tokens

    @property
    def net(self) -> Scalar:
        """Mean over the tokens: what the step as it stands would do."""
        return (self.raising + self.burning) / self.count.clamp(min=1)


def sides(influence: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], total: Callable[[Tensor], Tensor]) -> Sides:
    """`influence` is 0 off the mask. One all-reduce. `total` adds a tensor (3,) over processes."""
    e = in_double(influence)
    return Sides(*total(torch.stack([e.clamp(min=0).sum(), e.clamp(max=0).sum(), mask.sum().to(e)])))


def uniform_weights(of: Sides, low: float, high: float) -> tuple[float, float]:
    """(w of raising tokens, w of burning tokens), in [0, 1], with low <= net <= high where that can be reached.

    The net is linear in either weight, so the band's edge is met in closed form: below `low` the burning side is
    scaled down, above `high` the raising side, and neither is touched inside the band. Refuses `low` above `high`.
    """
    if not low <= high:
        raise ValueError(f"low must not be above high, got {low} and {high}")
    count = max(of.count.item(), 1.0)
    up, down = of.raising.item() / count, of.burning.item() / count
    if up + down < low and down < 0:
        return 1.0, min(max((low - up) / down, 0.0), 1.0)
    if up + down > high and up > 0:
        return min(max((high - down) / up, 0.0), 1.0), 1.0
    return 1.0, 1.0


def least_weights(
    influence: Float[Tensor, "N T"],
    of: Sides,
    low: float,
    high: float,
    total: Callable[[Tensor], Tensor],
    floor: float = 0.0,
) -> Float[Tensor, "N T"]:
    """The weights in [floor, 1] nearest to 1, sum (w - 1)^2 least, whose net lies inside the band.

    Off the band the solution is w = clip(1 - x |e|, floor, 1) on the side that leads out of it and 1 on the other, with
    one x >= 0 for all tokens (Lagrange); clipped_sum.py finds it in at most three all-reduces, in none where nothing is
    asked. All tokens of that side at `floor` where even that does not reach the band. `total` adds tensors of
    any shape over processes. Refuses `low` above `high`.
    """
    if not low <= high:
        raise ValueError(f"low must not be above high, got {low} and {high}")
    count, net = max(of.count.item(), 1.0), of.net.item()
    if low <= net <= high:
        return torch.ones_like(influence)
    e, raising, burning = in_double(influence), of.raising.item(), of.burning.item()
    is_leading_out = e < 0 if net < low else e > 0
    # what the side that leads out may sum to, in absolute value
    whole, target = (-burning, raising - low * count) if net < low else (raising, high * count - burning)
    x = solve_clipped_sum(e[is_leading_out].abs(), target, floor, whole, total)
    return torch.where(is_leading_out, (1 - x * e.abs()).clamp(min=floor), 1.0).to(influence)
