"""Terms from left to right, their strength over time, what they log and what a checkpoint keeps of them."""

from .chain import Chain, Link, Outcome, RolloutOutcome, blend
from .door import TermFailed, TermRefused
from .finite import NotFinite

__all__ = ["Chain", "Link", "NotFinite", "Outcome", "RolloutOutcome", "TermFailed", "TermRefused", "blend"]
