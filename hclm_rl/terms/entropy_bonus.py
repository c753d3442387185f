"""Plain entropy bonus, as in TRL's `entropy_coef`; with the coefficient StepToTarget it is Skywork Open Reasoner 1's
adaptive bonus: He et al., 2025, arXiv:2505.22312"""

from dataclasses import dataclass
from typing import ClassVar

from ..types import Direction, Effect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class EntropyBonus(Term):
    """Rewards uncertainty everywhere: adds -coef * H_t, H_t = -sum_v p_v log p_v in nats, to the loss of every token.

    It lifts the tail of all tokens, noise included. Averaged over the tokens of the whole optimiser step and all
    processes, whatever the base loss averages over, so a coefficient means the same in every run; TRL's own averages
    each micro-batch by itself, which weights short micro-batches more.

    Attributes:
        default_coef: Cui et al., arXiv:2505.22617: the value that held entropy without exploding
    """

    seeks: ClassVar[Direction | None] = "more"
    default_coef: ClassVar[float] = 0.005

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        return Effect(loss=-batch.entropy)
