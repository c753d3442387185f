"""The seam: TRL's trainers with entropy terms; the only folder that leans on TRL's private names.

`grpo.py` and `rloo.py` are the two trainers, `mixin.py` what they override of TRL's. What they do there: `stage_one.py`
reads a generation batch, `stage_two.py` a micro-batch in the middle of the loss, `hooks.py` and `head.py` look into the
model, `scoring.py` scores other texts, `step.py` ends a step, `evaluation.py` evaluates; `run.py` holds their state.
`reset.py` is a callback of its own, which resets the reference model.
"""

from ..recipe.trl_range import other_trl

if sentence := other_trl():
    raise ImportError(sentence)

from .evaluation import Responses
from .grpo import GRPOTrainer
from .rloo import RLOOTrainer

__all__ = ["GRPOTrainer", "RLOOTrainer", "Responses"]
