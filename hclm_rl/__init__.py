"""Entropy control in RL fine-tuning of language models, on top of TRL."""

from .chain import Chain, Link, NotFinite
from .coefficients import Constant, Cosine, Linear, StepToTarget
from .config import GRPOConfig, RLOOConfig, build_chain, known_terms
from .trainer import GRPOTrainer, RLOOTrainer
from .types import Effect, Quantiles, Rollout, RolloutEffect, Term, TokenBatch, Total

__version__ = "0.1.0"

__all__ = [
    "Chain",
    "Constant",
    "Cosine",
    "Effect",
    "GRPOConfig",
    "GRPOTrainer",
    "Linear",
    "Link",
    "NotFinite",
    "Quantiles",
    "RLOOConfig",
    "RLOOTrainer",
    "Rollout",
    "RolloutEffect",
    "StepToTarget",
    "Term",
    "TokenBatch",
    "Total",
    "build_chain",
    "known_terms",
]
