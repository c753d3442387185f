"""Thousands of random recipes: none ends in a traceback that is not ours, none hangs, none is taken that is wrong."""

from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hclm_rl import build_chain
from hclm_rl.recipe.arguments import make_parser, parse

KEYS = sorted(make_parser("grpo").known())
# (what a key takes, in any combination with the others; what it never takes)
WHOLE = ([1, 2, 7], [0, -1, 1.5, True, [1], {"a": 1}, "two", 10**400, float("nan"), None])
SHARE = ([0.1, 0.9, "0.5"], [-0.1, 1.1, float("nan"), float("inf"), "1,0", [0.5], False])
SWITCH = ([True, False, "yes", "no"], ["maybe", 2, [True], {}, 0.5])
TEXT = (["a", "x/y", "Ünïcode \u202e"], [3, 0.5, ["a"], {"a": 1}, True])
TERMS = (
    [[], ["qae"], [{"clip_cov": {"ratio": 0.5}}], [{"entropy_bonus": {"coef": 0.1}}, "forking_tokens"]],
    ["qae", ["qae", "qae"], [".."], [None], ["os.system"], [{"qae": {"coef": "1e-3"}}], [{"kl_cov": {"ratio": 20}}], 3,
     ["entropy_advantage", "tool_bonus"], [[[["qae"]]]], {"qae": None}, [{"qae": None, "epo": None}], ["hclm_rl.Term"],
     [{"majority_vote": {"answer": "os.system"}}], [{"clip_cov": {True: 0.1}}], [{"qae": {"coef": {"kind": "x"}}}]],
)  # fmt: skip
SPEC = {
    "gradient_accumulation_steps": WHOLE,
    "num_iterations": WHOLE,
    "max_completion_length": (WHOLE[0], WHOLE[1][:-1]),
    "num_generations": ([2, 4, 8], WHOLE[1]),
    "trace_steps": ([[1], [1, 5], None], [2, "2", ["a"], [1.5], {"a": 1}, True, [[1]], [0]]),
    "seed": ([0, 1, 2**32 - 1], [-1, 2**32, 1.5, "x", [1], None]),
    "max_steps": ([-1, 5], [0, -2, 2.5, "x", None]),
    "top_p": SHARE,
    "lora_dropout": SHARE,
    "learning_rate": ([0, 1e-6, "1e-6", 3], [-1, "fast", float("nan"), [1e-6], {}]),
    "temperature": ([0.5, 2], [0, -1, float("inf"), "hot"]),
    "log_completions": SWITCH,
    "save_final": SWITCH,
    "shuffle_dataset": SWITCH,
    "run_name": TEXT,
    "model_name_or_path": TEXT,
    "task": (["coins"], TEXT[1]),
    "reward_funcs": (["think_format_reward", ["think_format_reward"]], [3, True, {"a": 1}, [3]]),
    "watch_collapse": (["off", "warn", "stop", False], ["of", True, 0, ["off"]]),
    "loss_type": (["grpo", "dapo"], ["ppo", 3, True, ["grpo"]]),
    "save_strategy": (["no", "steps", "epoch", False], ["never", True, 3]),
    "task_kwargs": ([{}, {"prompts": 3}, None], [3, "x", [1]]),
    "reset_reference": ([{"every": 3}, None], [3, "x", [1]]),
    "model_init_kwargs": ([{}, '{"a": 1}', None], ["x", 3, [1], {"trust_remote_code": True}]),
    "env": ([{}, {"WANDB_NOTES": "x"}], [3, ["a"], {"LD_PRELOAD": "x"}, {"A=B": 1}, {3: 3}]),
    "entropy_terms": TERMS,
    "warmup_ratio": ([], [0.1]),
    "allow_custom_code": ([], [True, False]),
}  # fmt: skip
BASE = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 8}

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
chosen = st.lists(st.sampled_from(sorted(SPEC)), max_size=5, unique=True)
BOUNDED = {
    "deadline": timedelta(seconds=10),  # of one recipe: none hangs
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


def taken(recipe: dict, file: Path) -> bool:
    """Whether the recipe is accepted; what is refused is one sentence of ours, what is neither is an error."""
    file.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    try:
        _, config, _, _ = parse("grpo", ["--config", str(file)])
        build_chain(config.entropy_terms)
    except (ValueError, OSError, ImportError) as error:
        assert str(error)
        return False
    return True


def check_spec(file: Path, data: st.DataObject) -> None:
    """Every value is right, or at least one is wrong: the recipe is taken, or refused."""
    recipe, is_right = dict(BASE), True
    for key in data.draw(chosen):
        right, wrong = SPEC[key]
        pick_wrong = not right or data.draw(st.integers(0, 3)) == 0
        recipe[key] = data.draw(st.sampled_from(wrong if pick_wrong else right))
        is_right &= not pick_wrong
    assert taken(recipe, file) == is_right, recipe


def check_junk(file: Path, recipe: dict) -> None:
    taken({**BASE, "output_dir": "out", **recipe}, file)


anything = st.dictionaries(
    st.sampled_from(KEYS) | st.text(max_size=10) | st.integers() | st.booleans(), junk, max_size=4
)


@settings(max_examples=200, **BOUNDED)
@given(data=st.data())
def test_a_recipe_is_taken_if_all_of_it_is_right(data: st.DataObject, tmp_path: Path):
    check_spec(tmp_path / "recipe.yaml", data)


@settings(max_examples=100, **BOUNDED)
@given(recipe=anything)
def test_anything_at_all_ends_in_a_sentence(recipe: dict, tmp_path: Path):
    check_junk(tmp_path / "recipe.yaml", recipe)


@pytest.mark.slow
@settings(max_examples=5000, **BOUNDED)
@given(data=st.data())
def test_five_thousand_recipes_of_right_and_wrong_values(data: st.DataObject, tmp_path: Path):
    check_spec(tmp_path / "recipe.yaml", data)


@pytest.mark.slow
@settings(max_examples=5000, **BOUNDED)
@given(recipe=anything)
def test_five_thousand_recipes_of_anything(recipe: dict, tmp_path: Path):
    check_junk(tmp_path / "recipe.yaml", recipe)
