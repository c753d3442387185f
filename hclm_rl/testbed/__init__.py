"""The embedded testbed: a task with many right answers, a policy of 110,000 parameters, and what measures both."""

from hclm_rl.testbed.sampling import Evaluation, evaluate
from hclm_rl.testbed.task import Task, find_task

__all__ = ["Evaluation", "Task", "evaluate", "find_task"]
