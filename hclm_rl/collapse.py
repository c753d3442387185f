"""The public names of watch/collapse.py: sees a collapse of the entropy coming."""

from .watch.collapse import *  # noqa: F403
