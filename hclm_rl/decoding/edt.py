"""EDT, entropy-based dynamic temperature: Zhang et al., 2024, arXiv:2403.14541"""

import math
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from ..equations.temperature import HOTTEST, entropy_of

LEAST_ENTROPY = 1e-6  # nats: theta / H at a certain token
LEAST_TEMPERATURE = 1e-3  # below it all but the top word are at probability 0 in float32 anyway


@dataclass(frozen=True, kw_only=True)
class Edt(LogitsProcessor):
    """Samples each token at its own temperature: near the greedy one where the model is certain.

    T = base_temperature base^(theta / H), H the entropy in nats of the model's own distribution at temperature 1.
    Base 0.8 is the paper's by a summary of it; it tunes the other two per task, to values that were not found. Logs
    and normalisations of H other than nats change what theta means. `theta` 0 is plain sampling at `base_temperature`.
    `generate` divides by its own `temperature` afterwards: leave that at 1.

    Trained with, this is another behaviour policy: an importance ratio needs the log-probs of what was sampled.

    Args:
        theta: strength, nats, at least 0; 0.1 is the worked example's, not the paper's
        base_temperature: what T tends to where H is large, more than 0
        base: in (0, 1]; the paper's value; above 1 it would cool the uncertain tokens
    """

    theta: float = 0.1
    base_temperature: float = 1.0
    base: float = 0.8

    def __post_init__(self) -> None:
        if not (0 <= self.theta < math.inf):
            raise ValueError(f"theta must be at least 0 and finite, got {self.theta}")
        if not (0 < self.base_temperature < math.inf):
            raise ValueError(f"base_temperature must be more than 0 and finite, got {self.base_temperature}")
        if not 0 < self.base <= 1:
            raise ValueError(f"base must be in (0, 1], got {self.base}")

    def temperatures(self, scores: Float[Tensor, "N V"]) -> Float[Tensor, "N"]:
        """T = base_temperature * base^(theta / H) of each row, H in nats of its next-token distribution."""
        exponent = (self.theta / entropy_of(scores).clamp(min=LEAST_ENTROPY)).clamp(max=HOTTEST)
        temperature = self.base_temperature * (exponent * math.log(self.base)).exp()
        return temperature.clamp(LEAST_TEMPERATURE, HOTTEST)

    def __call__(self, input_ids: Int[Tensor, "N L"], scores: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        return (scores.float() / self.temperatures(scores).unsqueeze(1)).to(scores.dtype)
