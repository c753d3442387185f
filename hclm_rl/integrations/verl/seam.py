"""What the adapter leans on in verl, looked at before it registers: a sentence when verl has moved."""

# pyright: reportMissingImports=false
# (verl is no dependency)

import inspect
from importlib.metadata import version

LEANS_ON = {  # method of verl's PPOTrainer: its parameters
    "_setup": ["self"],
    "_compute_advantage": ["self", "batch", "metrics"],
    "_update_actor": ["self", "batch", "metrics"],
    "_save_checkpoint": ["self"],
    "_load_checkpoint": ["self"],
}
LOSS = ["config", "model_output", "data", "dp_group"]


def refuse_other_verl() -> None:
    """Raises one sentence that names what is not as in verl 0.9.1."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from verl.workers.utils.losses import ppo_loss

    moved = [
        name
        for name, parameters in LEANS_ON.items()
        if not hasattr(PPOTrainer, name) or list(inspect.signature(getattr(PPOTrainer, name)).parameters) != parameters
    ]
    if list(inspect.signature(ppo_loss).parameters) != LOSS:
        moved.append("ppo_loss")
    if moved:
        raise RuntimeError(
            f"verl {version('verl')} has other parameters in {', '.join(moved)} than 0.9.1, which hclm_rl knows"
        )
