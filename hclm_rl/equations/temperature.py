"""The entropy of softmax(z), and the temperature at which softmax(z / tau) has a given one."""

import torch
from jaxtyping import Float
from torch import Tensor

COLDEST, HOTTEST = 1e-30, 1e30  # below is the top word, above the uniform distribution; float32 ends at 1e38


def tempered(logits: Float[Tensor, "*N V"], temperature: float) -> Float[Tensor, "*N V"]:
    """log softmax(z / temperature), in float32 and without overflow for any temperature above 0."""
    wide = logits.float()
    wide = wide - wide.amax(dim=-1, keepdim=True)
    return (wide / min(max(temperature, COLDEST), HOTTEST)).log_softmax(dim=-1)


def entropy_of(logits: Float[Tensor, "*N V"]) -> Float[Tensor, "*N"]:
    """H = -sum_v p_v log p_v in nats, p = softmax(logits); a word at -inf is ruled out and adds 0."""
    logps = logits.float().log_softmax(dim=-1)
    return -torch.where(logps > -torch.inf, logps.exp() * logps, 0).sum(dim=-1)


def temperature_at_entropy(
    logits: Float[Tensor, "N V"], target: Float[Tensor, "N"], low: float, high: float, steps: int = 20
) -> Float[Tensor, "N"]:
    """tau in [low, high] with H(z / tau) = target, by `steps` bisections; the nearer end where there is none.

    H(z / tau) rises with tau. In float32 whatever the logits: in half precision the bisection would stall.
    """
    wide, low, high = logits.float(), max(low, COLDEST), min(high, HOTTEST)
    below, above = torch.full_like(target, low), torch.full_like(target, high)
    is_low, is_high = target <= entropy_of(wide / low), target >= entropy_of(wide / high)
    for _ in range(steps):
        middle = (below + above) / 2
        is_short = entropy_of(wide / middle.unsqueeze(-1)) < target
        below, above = torch.where(is_short, middle, below), torch.where(is_short, above, middle)
    return torch.where(is_low, low, torch.where(is_high, high, (below + above) / 2))
