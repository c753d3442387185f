"""What a recipe's keys may hold: every mistake is one sentence with the key, and what is right arrives as it stands."""

import os
from pathlib import Path

import pytest

from hclm_rl.recipe import arguments
from hclm_rl.recipe.arguments import make_parser, parse
from hclm_rl.recipe.limits import LIMITS, refuse_out_of_range
from hclm_rl.recipe.moved import MOVED
from hclm_rl.recipe.packages import missing_packages
from hclm_rl.recipe.reading import DEEPEST

BASE = {"use_cpu": "true", "bf16": "false", "report_to": "none", "task": "coins"}


def recipe(folder: Path, text: str) -> list[str]:
    """A recipe of BASE and `text`, whose keys take the place of those of BASE."""
    file = folder / "recipe.yaml"
    kept = [f"{key}: {value}" for key, value in BASE.items() if not any(x.startswith(key) for x in text.splitlines())]
    file.write_text("\n".join([*kept, text, ""]))
    return ["--config", str(file)]


WRONG = {
    # lists, text and mappings, each where another belongs
    "trace_steps: 2": "trace_steps must be list[int] | None, got int 2",
    'trace_steps: "2"': "trace_steps must be list[int] | None, got str '2'",
    "task: 3": "task must be str | None, got int 3; write it in quotes",
    "run_name: 2024": "run_name must be str | None, got int 2024; write it in quotes",
    "reward_funcs: 3": "reward_funcs must be list[str] | None, got int 3",
    "model_init_kwargs: fast": "model_init_kwargs must be a mapping, on the command line as JSON, got the text 'fast'",
    "datasets: [3]": "datasets must be list[dict], got list [3]",
    "lora_target_modules: {a: 1}": "lora_target_modules must be list[str] | None, got dict {'a': 1}",
    "hub_token: 123456": "hub_token must be str | None, got int <hidden>; write it in quotes",
    # numbers
    "gradient_accumulation_steps: 0": "gradient_accumulation_steps must be at least 1, got 0",
    "num_generations: 0": "num_generations must be at least 2, got 0",
    "num_iterations: 0": "num_iterations must be at least 1, got 0",
    "per_device_train_batch_size: 0": "per_device_train_batch_size must be at least 1, got 0",
    "steps_per_generation: 0": "steps_per_generation must be at least 1, got 0",
    "max_steps: 0": "max_steps must be at least 1, or -1 for num_train_epochs, got 0",
    "learning_rate: .nan": "learning_rate must be at least 0, got nan",
    "learning_rate: inf": "learning_rate must be at least 0, got inf",
    "top_p: 0": "top_p must be in (0, 1], got 0",
    "seed: -1": "seed must be in [0, 4.29497e+09], got -1",
    "beta: -1\ntemperature: 0": "temperature must be more than 0, got 0; beta must be at least 0, got -1",
    f"seed: {10**400}": "seed has a whole number beyond 2^63",
    f"seed: 0x{'f' * 5000}": "seed has a whole number beyond 2^63",
    f"seed: {'9' * 5000}": "Exceeds the limit (4300 digits)",
    f"entropy_terms: [{{clip_cov: {{ratio: {10**400}}}}}]": "entropy_terms has a whole number beyond 2^63",
    "num_generations:": "these settings do not go together: TypeError",
    # words
    "watch_collapse: loud": "watch_collapse must be one of 'off', 'warn', 'stop', got 'loud'",
    "watch_collapse: on": "watch_collapse must be one of 'off', 'warn', 'stop', got bool True",
    "loss_type: grop": "loss_type must be one of 'grpo', 'dapo', ",
    "lr_scheduler_type: cosin": "lr_scheduler_type must be one of 'linear', 'cosine', ",
    "run_name: off": "run_name must be str | None, got bool False; YAML reads on, off, yes and no as true and false",
    # what transformers and torch would say once training begins
    "lr_scheduler_kwargs: {nope: 1}": "lr_scheduler_type 'linear' with lr_scheduler_kwargs {'nope': 1}: get_linear",
    "lr_scheduler_type: cosine_with_min_lr": "with lr_scheduler_kwargs none: One of min_lr or min_lr_rate",
    "lr_scheduler_type: warmup_stable_decay": "missing 1 required positional argument: 'num_decay_steps'",
    "lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {lr_end: 1.0e-5}": "lr_end (1e-05) must be smaller than",
    "lr_scheduler_type: polynomial\nlearning_rate: 0": "lr_end (1e-07) must be smaller than initial lr (0",
    "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1.0e-7}\nlearning_rate: 0": "_rate must be",
    "optim_args: x": "optim_args must be names and values, as in 'rank=8, scale=2', got 'x'",
    "optim_args: a=1,b=": "optim_args must be names and values, as in 'rank=8, scale=2', got 'b='",
    "log_level: loud": "log_level must be one of detail, debug, info, warning, error, critical, passive, got 'loud'",
    "gradient_checkpointing_kwargs: {nope: 1}\ngradient_checkpointing: true": "ing_kwargs has no 'nope'; torch's",
    "top_k: -2": "top_k must be at least 0, got -2",
    # keys
    "on: 1": "a key must be text, got bool True; YAML reads on, off, yes and no as true and false",
    "3: 1": "a key must be text, got int 3",
    "seed: 1\nseed: 2": "the key 'seed' stands twice, in lines 5 and 6: keep one of them",
    "task_kwargs: {prompts: 3, prompts: 4}": "the key 'prompts' stands twice, in lines 4 and 4",
    "sede: 1\nbetta: 2": "unknown keys 'sede' in the recipe (nearest: seed, ",
    "allow_custom_code: true": "allow_custom_code is --allow_custom_code on the command line only",
    "torch_dtype: bfloat16": "unknown key 'torch_dtype' in the recipe (it is called dtype)",
    # shapes
    f"entropy_terms: {'[' * 25}{']' * 25}": f"entropy_terms is nested too deeply: {DEEPEST} levels are allowed",
    f"entropy_terms: {'[' * 3000}{']' * 3000}": f"is nested too deeply: {DEEPEST} levels are allowed",
    "task_kwargs: &a [*a]": f"task_kwargs is nested too deeply: {DEEPEST} levels are allowed",
    "run_name: 2024-13-45": "month must be in 1..12",
    "run_name: 2024-12-24": "run_name must be str | None, got date",
    "env: [A]": "env must be names and values",
    'env: {"A=B": 1}': "A=B",
    # terms
    "entropy_terms: [..]": "no entropy term at '..': a dotted path is names with dots between",
    "entropy_terms: [null]": "an entry of entropy_terms is a name or one {name: {hyper-parameter: value}}, got None",
    "entropy_terms: [hclm_rl.types.Term]": "'hclm_rl.types.Term' is not an entropy term",
    "entropy_terms: [{entropy_bonus: {coef: {kind: step_to_target, target: -1}}}]": "target must not be negative",
    "entropy_terms: [entropy_advantage, tool_bonus]": "put 'tool_bonus' before 'entropy_advantage'",
    # packages
    "report_to: tensorbord": "report_to must be none, all or some of tensorboard, ",
    # code that no dotted path names
    "trust_remote_code: true": "trust_remote_code runs code that comes with a model: add --allow_custom_code",
    "model_init_kwargs: {use_kernels: true}": "use_kernels runs code that comes with a model",
    'model_init_kwargs: \'{"trust_remote_code": true}\'': "trust_remote_code runs code that comes with a model",
    "attn_implementation: some/kernel": "attn_implementation 'some/kernel' fetches a kernel, which is code",
    "env: {LD_PRELOAD: x.so}": "env: LD_PRELOAD can change which code runs",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=[each[:50] for each in WRONG])
def test_a_wrong_recipe_is_one_sentence(text: str, tmp_path: Path):
    with pytest.raises(ValueError) as error:
        parse("grpo", recipe(tmp_path, text))
    assert WRONG[text] in str(error.value)
    assert len(str(error.value)) < 1000


def test_what_is_repeated_by_aliases_ends(tmp_path: Path):
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    nested = "\n".join(f"  {row}" for row in rows)
    with pytest.raises(ValueError, match="task_kwargs has more than 100000 values"):
        parse("grpo", recipe(tmp_path, f"task_kwargs:\n{nested}"))


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        (
            "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 0.1}",
            "lr_scheduler_kwargs",
            {"min_lr": 0.1},
        ),
        ("optim_args: rank=8, scale=2", "optim_args", "rank=8, scale=2"),
        ("gradient_checkpointing_kwargs: {preserve_rng_state: false}", "gradient_checkpointing", True),
        ("watch_collapse: off", "watch_collapse", "off"),  # YAML reads False
        ("reward_funcs: think_format_reward", "reward_funcs", ["think_format_reward"]),
        ("task_kwargs: {prompts: 3}", "task_kwargs", {"prompts": 3}),
        ("save_strategy: no", "save_strategy", "no"),
        ("learning_rate: 1e-6", "learning_rate", 1e-6),  # text in YAML
        ("scale_rewards: false", "scale_rewards", "none"),  # as TRL has it
        ("epsilon_high: .inf", "epsilon_high", float("inf")),
    ],
)
def test_what_is_meant_arrives(text: str, key: str, value: object, tmp_path: Path):
    arguments, config, _, _ = parse("grpo", recipe(tmp_path, text))
    found = vars(arguments).get(key, vars(config).get(key))
    assert getattr(found, "value", found) == value


def test_flags_are_written_whole_and_the_unknown_ones_are_said_with_the_recipes(tmp_path: Path):
    line = recipe(tmp_path, "sede: 1")
    with pytest.raises(ValueError, match=r"unknown keys 'sede' in the recipe .*, 'learning_rat' on the command line"):
        parse("grpo", [*line, "--learning_rat", "1"])
    with pytest.raises(ValueError, match="--config came twice"):
        parse("grpo", [*line, *line])


def test_the_environment_is_set_where_it_changes_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_PROJECT", "before")
    parse("grpo", recipe(tmp_path, "env: {WANDB_PROJECT: 7}"))
    assert os.environ["WANDB_PROJECT"] == "7"
    monkeypatch.setenv("MY_OWN", "before")
    parse("grpo", [*recipe(tmp_path, "env: {MY_OWN: 7}"), "--allow_custom_code"])
    assert os.environ["MY_OWN"] == "7"


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_the_tables_follow_the_versions_that_are_supported(algorithm):
    known = make_parser(algorithm).known()
    assert not MOVED.keys() & known.keys()
    if algorithm == "grpo":
        assert not LIMITS.keys() - known.keys()
    for sentence in MOVED.values():  # "it is called X": X is there
        if "it is called " in sentence:
            assert sentence.removeprefix("it is called ").split(",")[0] in make_parser("grpo").known()


def test_the_defaults_are_within_their_limits():
    for algorithm in ("grpo", "rloo"):
        namespace, _ = make_parser(algorithm).parse_known_args([])
        refuse_out_of_range(vars(namespace))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel needs liger_kernel: pip install liger-kernel"),
        ({"report_to": ["wandb"]}, "report_to: wandb needs a package that is missing: pip install wandb"),
        ({"report_to": "tensorboard"}, "report_to: tensorboard needs a package that is missing: "),
        (
            {"reward_funcs": ["accuracy_reward"]},
            "reward_funcs: accuracy_reward needs math_verify: pip install ",
        ),
        ({"optim": "paged_adamw_8bit"}, "optim: paged_adamw_8bit needs bitsandbytes: pip install bitsandbytes"),
        ({"use_vllm": True}, "use_vllm needs vllm: pip install 'hclm-rl[vllm]'"),
    ],
)
def test_a_missing_package_is_named(settings: dict, sentence: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hclm_rl.recipe.packages.is_there", lambda module: False)
    [said] = missing_packages(settings)
    assert said.startswith(sentence)
    monkeypatch.setattr("hclm_rl.recipe.packages.is_there", lambda module: True)
    assert list(missing_packages(settings)) == []


def test_nothing_is_missing_for_what_is_off():
    assert list(missing_packages({"use_vllm": False, "report_to": "none", "optim": "adamw_torch", "task": None})) == []


def test_a_machine_without_an_accelerator_trains_on_its_cpu_unless_more_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(arguments.torch.accelerator, "is_available", lambda: False)
    line = ["--task", "coins", "--output_dir", str(tmp_path), "--report_to", "none"]
    assert parse("grpo", line)[1].use_cpu
    assert parse("grpo", [*line, "--run_name", "bf16"])[1].use_cpu  # a value, and no flag
    assert not arguments.is_left_to_cpu({"task", "bf16"}) and not arguments.is_left_to_cpu({"use_cpu"})
    assert not parse("grpo", [*line, "--bf16", "false"])[1].use_cpu  # transformers finds the CPU by itself
    monkeypatch.setattr(arguments.torch.accelerator, "is_available", lambda: True)
    assert not arguments.is_left_to_cpu({"task"})
