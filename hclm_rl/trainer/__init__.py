"""The seam: TRL's trainers with entropy terms; the only folder that leans on TRL's private names."""

from .mixin import GRPOTrainer, Responses, RLOOTrainer

__all__ = ["GRPOTrainer", "RLOOTrainer", "Responses"]
