"""Stage 2 right behind stage 1, for a trainer whose loss does not call terms; nothing here imports SkyRL."""

from torch import Tensor

from ...chain.chain import Chain
from ..absent import Absent
from ..first_stage import Generated, Shaped
from ..second_stage import logged, second_stage, token_batch
from .arguments import NO_POLICY


def left_by_both(chain: Chain, given: Generated, shaped: Shaped) -> tuple[Tensor, dict[str, float]]:
    """Advantages and metrics after stage 2 as well, to which the policy in the update is unknown.

    The advantages are (B, T). Refuses a term that adds a loss of its own.
    """
    advantages = given.advantages if shaped.advantages is None else shaped.advantages
    absent = Absent.like(advantages, NO_POLICY)
    batch = token_batch(
        shaped.told,
        shaped.rows,
        logps=absent,
        old_logps=absent if given.logps is None else given.logps,
        entropy=absent,
        advantages=advantages,
        mask=given.mask,
        ids=given.ids,
        clips=False,
        ref_logps=given.ref_logps,
    )
    outcome = second_stage(chain, shaped.told, batch, shaped.rows)
    if outcome.losses:
        raise ValueError(f"the entropy term '{next(iter(outcome.losses))}' adds a loss of its own: {NO_POLICY}")
    count = max(int(given.mask.sum()), 1)
    own = {name: value / (count if of == "token" else 1) for name, (value, of) in logged(outcome, given.mask).items()}
    return advantages if outcome.advantages is None else outcome.advantages, shaped.metrics | own
