"""Entropy control in RL fine-tuning of language models, on top of TRL."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .chain import Chain, Link, NotFinite
    from .coefficients import Constant, Cosine, Linear, OnCollapse, ProportionalIntegral, StepToTarget
    from .collapse import CollapseCallback, CollapseDetector
    from .config import GRPOConfig, RLOOConfig, build_chain, known_terms
    from .trainer import GRPOTrainer, RLOOTrainer
    from .types import Effect, Quantiles, Rollout, RolloutEffect, Term, TokenBatch, Total, Transcript

__version__ = "0.1.0"

# Imported on first use: torch and TRL take seconds, which `hclm-rl methods` need not wait for.
_HOMES = {
    "chain": ("Chain", "Link", "NotFinite"),
    "coefficients": ("Constant", "Cosine", "Linear", "OnCollapse", "ProportionalIntegral", "StepToTarget"),
    "collapse": ("CollapseCallback", "CollapseDetector"),
    "config": ("GRPOConfig", "RLOOConfig", "build_chain", "known_terms"),
    "trainer": ("GRPOTrainer", "RLOOTrainer"),
    "types": ("Effect", "Quantiles", "Rollout", "RolloutEffect", "Term", "TokenBatch", "Total", "Transcript"),
}

__all__ = [
    "Chain",
    "CollapseCallback",
    "CollapseDetector",
    "Constant",
    "Cosine",
    "Effect",
    "GRPOConfig",
    "GRPOTrainer",
    "Linear",
    "Link",
    "NotFinite",
    "OnCollapse",
    "ProportionalIntegral",
    "Quantiles",
    "RLOOConfig",
    "RLOOTrainer",
    "Rollout",
    "RolloutEffect",
    "StepToTarget",
    "Term",
    "TokenBatch",
    "Total",
    "Transcript",
    "build_chain",
    "known_terms",
]


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module 'hclm_rl' has no attribute '{name}'")
