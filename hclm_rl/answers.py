"""What recipes name by `hclm_rl.answers.<function>`: responses/answers.py."""

from .responses.answers import *  # noqa: F403
