"""The public names of chain/coefficients.py: strength of a link over time."""

from .chain.coefficients import *  # noqa: F403
