"""The public names of watch/collapse.py and watch/callback.py: sees a collapse of the entropy coming."""

from .watch.callback import CollapseCallback as CollapseCallback
from .watch.collapse import *  # noqa: F403
