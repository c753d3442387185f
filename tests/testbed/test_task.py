import pytest

from hclm_rl.recipe.arguments import TASKS
from hclm_rl.testbed import find_task
from hclm_rl.testbed.coins import make_task
from hclm_rl.testbed.task import known_tasks


def small_task():
    return make_task(prompts=4, eval_prompts=2)


def not_a_task():
    return "coins"


def test_a_task_is_found_by_module_name_or_dotted_path():
    assert len(find_task("coins", prompts=4, eval_prompts=2).train_dataset) == 4
    assert len(find_task(f"{__name__}.small_task").train_dataset) == 4


def test_an_unknown_name_lists_the_nearest_and_the_help_all():
    assert tuple(known_tasks()) == TASKS
    with pytest.raises(ValueError, match=r"no task 'coin'; the nearest are coins, .*`hclm-rl grpo --help` lists all"):
        find_task("coin")
    # a module of the testbed that makes no task
    with pytest.raises(ValueError, match="no task 'sampling'"):
        find_task("sampling")
    with pytest.raises(ValueError, match=r"no task 'no_such_lab\.tasks\.easy'"):
        find_task("no_such_lab.tasks.easy")


def test_a_function_that_returns_something_else_is_refused():
    with pytest.raises(TypeError, match=r"must return a hclm_rl\.testbed\.Task, got str"):
        find_task(f"{__name__}.not_a_task")
