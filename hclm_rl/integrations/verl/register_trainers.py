"""Makes our trainers known to verl; imported by `plugin` alone."""

# pyright: reportMissingImports=false
# (verl is no dependency)

from verl.trainer.ppo.v1.trainer_base import register_trainer

from .seam import refuse_other_verl
from .trainer import TRAINERS


def register() -> None:
    refuse_other_verl()
    for name, trainer in TRAINERS.items():
        register_trainer(name)(trainer)
