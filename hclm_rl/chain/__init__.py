"""Terms from left to right, their strength over time, what they log and what a checkpoint keeps of them."""

from .chain import Chain, Link, NotFinite, Outcome, RolloutOutcome, blend

__all__ = ["Chain", "Link", "NotFinite", "Outcome", "RolloutOutcome", "blend"]
