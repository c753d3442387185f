"""The seam: TRL's trainers with entropy terms; the only folder that leans on TRL's private names.

`grpo.py` and `rloo.py` are the two trainers, `mixin.py` what they override of TRL's. What they do there: `stage_one.py`
reads a generation batch, `stage_two.py` a micro-batch in the middle of the loss, `hooks.py` and `head.py` look into the
model, `scoring.py` scores other texts, `step.py` ends a step, `evaluation.py` evaluates; `run.py` holds their state.
`reset.py` is a callback of its own, which resets the reference model.
"""

import trl
from packaging.version import Version

if not Version("1.16") <= Version(trl.__version__) < Version("1.17"):
    raise ImportError(
        f"hclm_rl works with trl>=1.16,<1.17, and trl {trl.__version__} is installed: pip install 'trl>=1.16,<1.17'"
    )

from .evaluation import Responses
from .grpo import GRPOTrainer
from .rloo import RLOOTrainer

__all__ = ["GRPOTrainer", "RLOOTrainer", "Responses"]
