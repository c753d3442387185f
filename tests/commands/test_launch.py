"""The training job: from a recipe to the files of a run, and what is said about a bad recipe."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import trl
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from hclm_rl.commands import launch, loading
from hclm_rl.commands.callbacks import UntrainedTeller
from hclm_rl.commands.launch import main
from hclm_rl.commands.loading import split_of
from hclm_rl.equations.entropy_sgd import EntropySgd
from hclm_rl.recipe.arguments import parse
from hclm_rl.recipe.weights import entropy_sgd_of
from hclm_rl.testbed.policy import policy_path

ROOT = Path(__file__).parents[2]
RECIPE = """\
task: coins
task_kwargs: {prompts: 8, eval_prompts: 4}
eval_samples: 8
entropy_terms:
  - entropy_bonus: {coef: 0.01}
max_steps: 2
num_generations: 4
per_device_train_batch_size: 8
learning_rate: 1e-3
bf16: false
gradient_checkpointing: false
use_cpu: true
logging_steps: 1
save_strategy: "no"
disable_tqdm: true
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_run_leaves_log_summary_recipe_and_model(algorithm: str, recipe: Path, tmp_path: Path):
    out = tmp_path / "run"
    assert main(algorithm, ["--config", str(recipe), "--output_dir", str(out), "--seed", "3"]) == 0
    log, summary = log_of(out), summary_of(out)
    assert [entry["step"] for entry in log] == [1, 2, 2]  # the last is the Trainer's closing entry
    assert all(entry["max_steps"] == 2 for entry in log)
    assert all(0 < entry["entropy"] < 3.83 for entry in log[:2])  # log(46 words) = 3.829 nats
    assert log[0]["entropy_bonus/coef"] == 0.01
    assert (summary["algorithm"], summary["seed"], summary["steps"], summary["processes"]) == (algorithm, 3, 2, 1)
    assert summary["terms"] == [{"entropy_bonus": {"coef": 0.01}}]
    assert summary["overrides"] == f"--output_dir {out} --seed 3"
    about = json.loads((out / "run.json").read_text())
    assert (about["overrides"], about["seed"], about["steps"]) == (summary["overrides"], 3, 2)
    assert summary["versions"]["trl"] == trl.__version__
    assert set(summary["before"]["means"]) >= {"token_entropy", "pass@1", "pass@8", "distinct_correct"}
    assert (out / "recipe.yaml").read_text() == RECIPE
    assert (out / "model.safetensors").is_file()


def test_a_run_from_the_recipe_in_its_own_folder_ends_with_recipe_and_summary(recipe: Path, tmp_path: Path):
    out = tmp_path / "run"
    line = ["--output_dir", str(out), "--eval_samples", "0", "--no_save_final"]
    assert main("grpo", ["--config", str(recipe), *line]) == 0
    assert main("grpo", ["--config", str(out / "recipe.yaml"), *line, "--seed", "4"]) == 0
    assert (out / "recipe.yaml").read_text() == (out / "earlier-1/recipe.yaml").read_text() == RECIPE
    assert summary_of(out)["seed"] == 4 and summary_of(out / "earlier-1")["seed"] != 4


def test_each_task_of_the_testbed_brings_its_own_policy(tmp_path: Path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE.replace("task: coins", "task: products"))
    assert main("grpo", ["--config", str(recipe), "--output_dir", str(out), "--eval_samples", "0"]) == 0
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 14
    assert all(0 < entry["entropy"] < 2.64 for entry in log_of(out)[:2])  # log(14 words) = 2.639 nats


def test_a_policy_that_does_not_move_measures_the_same_before_and_after(recipe: Path, tmp_path: Path):
    out = tmp_path / "run"
    line = ["--config", str(recipe), "--output_dir", str(out), "--learning_rate", "0", "--no_save_final"]
    assert main("grpo", [*line, "--entropy_terms", "[]"]) == 0
    summary = summary_of(out)
    assert summary["terms"] == [] and not (out / "model.safetensors").exists()
    assert summary["before"] == summary["after"]
    assert (summary["before"]["prompts"], summary["before"]["samples"]) == (4, 8)
    assert not any("entropy_bonus" in key for key in log_of(out)[0])


def test_a_killed_run_resumes_and_its_log_has_each_step_once(recipe: Path, tmp_path: Path):
    out = tmp_path / "run"
    line = ["--config", str(recipe), "--output_dir", str(out), "--max_steps", "4", "--eval_samples", "0"]
    line += ["--save_strategy", "steps", "--save_steps", "2"]
    assert main("grpo", line) == 0
    whole = log_of(out)
    log = out / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:4])[:-9])  # killed while step 4 was written
    for checkpoint in (out / "checkpoint-2", "true"):  # at step 2, then at the end, where nothing is left to do
        assert main("grpo", [*line, "--resume_from_checkpoint", str(checkpoint)]) == 0
        resumed = [entry for entry in log_of(out) if "train_runtime" not in entry]
        assert [entry["step"] for entry in resumed] == [1, 2, 3, 4]
        assert [entry["entropy"] for entry in resumed] == [entry["entropy"] for entry in whole[:4]]


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def test_a_resume_that_is_refused_leaves_the_folder_as_it_was(recipe: Path, tmp_path: Path, capsys):
    """With a checkpoint of a job that was killed while it saved; by every spelling of the folder."""
    out = tmp_path / "run"
    line = ["--config", str(recipe), "--output_dir", str(out), "--eval_samples", "0", "--no_save_final"]
    assert main("grpo", [*line, "--save_strategy", "steps", "--save_steps", "1", "--trace_every", "1"]) == 0
    (out / "checkpoint-99").mkdir()
    (out / "checkpoint-99/model.safetensors").touch()
    before, half = content_of(out), "checkpoint-99' is no complete checkpoint: it has no trainer_state.json"
    refused = {
        "--resume_from_checkpoint": (str(out / "checkpoint-99"), half),
        "--entropy_terms": ("[]", "was written with the entropy terms ['entropy_bonus'], this run has none; resume"),
        "--model_name_or_path": ("no/where", "could not be loaded"),
    }
    for key, (value, sentence) in refused.items():
        given = {"--resume_from_checkpoint": "true", key: value}
        assert main("grpo", [*line, *(part for pair in given.items() for part in pair)]) == 2
        err = capsys.readouterr().err
        assert sentence in err and err.splitlines()[-1].startswith("hclm-rl grpo: "), err
        assert content_of(out) == before
    assert main("grpo", [*line, "--max_steps", "3", "--resume_from_checkpoint", f"{out}/"]) == 0
    assert summary_of(out)["steps"] == 3
    assert [entry["step"] for entry in log_of(out) if "train_runtime" not in entry] == [1, 2, 3]


def test_a_second_run_in_the_same_folder_is_refused(recipe: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    parent = psutil.Process(os.getppid())
    owner = {"host": socket.gethostname(), "process": parent.pid, "started": parent.create_time()}
    (out / "run.lock").write_text(json.dumps(owner))
    line = ["--config", str(recipe), "--output_dir", str(out), "--eval_samples", "0"]
    assert main("grpo", line) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"hclm-rl grpo: another run is at work in {out} (process {parent.pid} on ")
    assert [each.name for each in out.iterdir()] == ["run.lock"]
    (out / "run.lock").unlink()
    assert main("grpo", line) == 0
    assert not (out / "run.lock").exists()


def test_a_sharded_model_is_measured_once_it_is_wrapped_and_not_where_a_run_is_resumed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "is_sharded", lambda trainer: True)
    line = ["--config", str(recipe), "--output_dir", str(tmp_path / "run"), "--save_strategy", "steps"]
    assert main("grpo", [*line, "--save_steps", "1", "--no_save_final"]) == 0
    first, log = summary_of(tmp_path / "run"), log_of(tmp_path / "run")
    assert first["before"]["means"] != first["after"]["means"] and first["before"]["samples"] == 8
    assert main("grpo", [*line, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-1")]) == 0
    second = summary_of(tmp_path / "run")
    assert second["before"] is None and second["after"] == first["after"]
    monkeypatch.undo()
    whole = ["--config", str(recipe), "--output_dir", str(tmp_path / "whole")]
    assert main("grpo", whole) == 0  # what is measured, and how, leaves training as it is
    assert [entry["loss"] for entry in log_of(tmp_path / "whole")[:2]] == [entry["loss"] for entry in log[:2]]


def test_a_run_that_trains_nothing_says_so_once(caplog: pytest.LogCaptureFixture):
    teller, state = UntrainedTeller(), TrainerState(global_step=3)
    args = SimpleNamespace(mask_truncated_completions=True, max_completion_length=5)
    for share in (0.9, 1.0, 1.0):
        teller.on_log(args, state, TrainerControl(), {"completions/clipped_ratio": share})  # type: ignore[arg-type]
    assert caplog.messages == [
        "nothing is trained at step 3: every response was cut off at max_completion_length 5, and "
        "mask_truncated_completions leaves such responses out; raise max_completion_length"
    ]
    caplog.clear()
    UntrainedTeller().on_log(
        SimpleNamespace(mask_truncated_completions=False, max_completion_length=5),  # type: ignore[arg-type]
        state, TrainerControl(), {"completions/clipped_ratio": 1.0},
    )  # fmt: skip
    assert caplog.messages == []


def test_all_cut_off_and_masked_is_said_by_the_command(recipe: Path, tmp_path: Path, caplog):
    flags = ["--max_completion_length", "3", "--mask_truncated_completions", "true", "--eval_samples", "0"]
    assert main("grpo", ["--config", str(recipe), "--output_dir", str(tmp_path / "cut"), *flags]) == 0
    assert sum("nothing is trained at step 1" in told for told in caplog.messages) == 1


def test_fsdp1_is_not_measured(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(loading, "is_fsdp1", lambda config: True)
    assert main("grpo", ["--config", str(recipe), "--output_dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("hclm-rl grpo: eval_samples under FSDP1 was never tried: use FSDP2")
    assert not (tmp_path / "run").exists()


def always_half(completions: list[str], **columns: object) -> list[float]:
    return [0.5 for _ in completions]


def test_rewards_and_terms_of_the_users_own_by_dotted_path(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "own_floor.py").write_text(
        "from dataclasses import dataclass\nfrom hclm_rl import Effect, Term\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Floor(Term):\n"
        "    def __call__(self, batch, memory):\n        return Effect(loss=-batch.entropy)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    line = ["--config", str(recipe), "--output_dir", "run", "--entropy_terms", '[{"own_floor.Floor": {"coef": 0.5}}]']
    line += ["--reward_funcs", f"{__name__}.always_half"]
    assert main("grpo", line) == 2 and "own_floor" not in sys.modules
    assert "'own_floor.Floor' is code from outside the library" in capsys.readouterr().err
    assert main("grpo", [*line, "--allow_custom_code"]) == 0
    first = log_of(tmp_path / "run")[0]
    assert first["Floor/coef"] == 0.5 and first["reward"] == 0.5 and first["reward_std"] == 0


def test_yaml_flags_and_text_that_is_a_number(recipe: Path):
    arguments, config, model, _ = parse(
        "grpo", ["--config", str(recipe), "--seed", "5", "--task_kwargs", '{"seed": 1}']
    )
    assert (config.learning_rate, config.seed, config.max_steps) == (1e-3, 5, 2)  # 1e-3 is text in YAML
    assert arguments.task_kwargs == {"seed": 1}
    assert model.model_name_or_path is None


MISTAKES = {
    "lerning_rate: 1": "unknown key 'lerning_rate' in the recipe; the nearest known ones are learning_rate, ",
    "max_steps: 2.5": "max_steps must be int, got float 2.5",
    "learning_rate: [1]": "learning_rate must be float, got list [1]",
    "learning_rate: fast": "argument --learning_rate/--learning-rate: invalid float value: 'fast'",
    "beta: {": "recipe.yaml is not valid YAML",
    "task: coin": "no task 'coin'; the nearest are coins, ",
    "task_kwargs: {promts: 3}": "task_kwargs of 'coins': make_task() got an unexpected keyword argument 'promts'",
    "task:": "eval_samples needs a task",
    "task:\neval_samples: 0": "the reward is missing: set reward_funcs (accuracy_reward, ",
    "task:\neval_samples: 0\nreward_funcs: accuracy_reward": "the data set is missing: set task",
    "dataset_name: some/data": "the task 'coins' brings its own prompts: drop dataset_name, or drop task",
    "reward_funcs: accuracy": "unknown reward function 'accuracy'; the nearest are accuracy_reward, ",
    "reward_funcs: nowhere.reward": "the reward function 'nowhere.reward' is code from outside the library, which ",
    "model_name_or_path: no/where": "model_name_or_path 'no/where' could not be loaded: ",
    "resume_from_checkpoint: true": "resume_from_checkpoint: no checkpoint at '",
    "entropy_terms: [clip_kov]": "unknown entropy term 'clip_kov'; the nearest are clip_cov, ",
    "entropy_terms: [qae, qae]": "two entropy terms are called 'qae'",
    "entropy_terms: [{clip_cov: {ratio: 1e-6}}]": "clip_cov: ratio must be float, got str '1e-6'; YAML reads",
    "entropy_coef: 0.1": "TRL's entropy_coef beside entropy_terms",
    "num_generations: 3": "generation_batch_size",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_a_mistake_is_one_sentence_on_stderr_and_exit_code_2(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    keys = {line.split(":")[0] for line in change.splitlines()}
    kept = [line for line in RECIPE.splitlines() if line.split(":")[0] not in keys]
    if "entropy_terms" in keys:
        kept.remove("  - entropy_bonus: {coef: 0.01}")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("\n".join([*kept, change, ""]))
    monkeypatch.chdir(tmp_path)
    assert main("grpo", ["--config", "recipe.yaml"]) == 2
    err = capsys.readouterr().err
    assert MISTAKES[change] in err and err.startswith("hclm-rl grpo: ") and err.count("\n") == 1
    assert not (tmp_path / "trainer_output" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["--config", "nope.yaml"], "no recipe at 'nope.yaml'"),
        (["--config"], "--config needs the path of a recipe"),
        (
            ["--task", "coins", "--allow_custom_code", "--reward_funcs", "nowhere.reward"],
            "no reward function at 'nowhere.reward': No module named 'nowhere'",
        ),
        (["--taks", "coins"], "unknown key 'taks' on the command line; the nearest known ones are task, "),
        (["coins"], "unexpected argument 'coins'"),
        (["--task_kwargs", "{a"], "task_kwargs on the command line is JSON"),
    ],
)
def test_a_mistake_on_the_command_line_likewise(line: list[str], sentence: str, capsys: pytest.CaptureFixture):
    assert main("grpo", ["--use_cpu", "--bf16", "false", *line]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"hclm-rl grpo: {sentence}") and err.count("\n") == 1


def test_the_script_ends_with_exit_code_2_without_a_traceback(recipe: Path):
    command = [sys.executable, "recipes/grpo.py", "--config", str(recipe), "--lerning_rate", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("hclm-rl grpo: unknown key 'lerning_rate'") and done.stderr.count("\n") == 1


def test_the_cpu_configuration_starts_two_processes_that_train_together(recipe: Path, tmp_path: Path):
    recipe.write_text(RECIPE.replace("use_cpu: true\n", ""))  # the configuration alone must do it
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml"]
    command += ["recipes/grpo.py", "--config", str(recipe), "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert summary_of(tmp_path / "run")["processes"] == 2
    # 2 steps of 8 responses on each of 2 processes, in groups of 4: 8 prompts of 10 tokens, 32 responses of 2 to 17
    tokens = log_of(tmp_path / "run")[1]["num_tokens"]
    assert 2 * 2 * 8 * (10 + 2) <= tokens <= 2 * 2 * 8 * (10 + 17)


def test_a_missing_split_is_named_with_its_key():
    with pytest.raises(ValueError, match="the data set has no split 'test', only train; set dataset_test_split"):
        split_of(DatasetDict(train=Dataset.from_dict({"prompt": ["a"]})), "test", "dataset_test_split")


def test_tokens_and_keys_never_reach_what_a_run_writes(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("WANDB_API_KEY", "before")
    kwargs = '{"token": "hf_in_kwargs"}'
    given = "hub_token: hf_in_recipe\nrun_name: of-hf_in_recipe\nenv:\n  WANDB_API_KEY: wb_in_env\ntrace_steps: [1]\n"
    recipe.write_text(given + RECIPE)
    out = tmp_path / "run"
    line = ["--config", str(recipe), "--output_dir", str(out), "--eval_samples", "0", "--no_save_final"]
    line += ["--hub_token=hf_on_line", "--model_init_kwargs", kwargs, "--project", "hf_in_recipe"]
    assert main("grpo", line) == 0
    written = {file.name: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert {"recipe.yaml", "summary.json", "log.jsonl", "step-00001.parquet"} <= written.keys()
    for secret in (b"hf_in_recipe", b"wb_in_env", b"hf_on_line", b"hf_in_kwargs"):
        assert not [name for name, text in written.items() if secret in text]
    assert b"hub_token: <hidden>" in written["recipe.yaml"] and b"WANDB_API_KEY: <hidden>" in written["recipe.yaml"]
    overrides = summary_of(out)["overrides"]
    assert (
        "--hub_token=<hidden>" in overrides and '"token": "<hidden>"' in overrides and "--eval_samples 0" in overrides
    )


ROWS = {
    "task_kwargs: {prompts: 0}": "task_kwargs of 'coins': prompts must be in 1 to 1000000, got 0",
    "task_kwargs: {prompts: 1000000000}": "prompts must be in 1 to 1000000, got 1000000000",
    "task_kwargs: {prompts: many}": "task_kwargs of 'coins': ",
    "task_kwargs: {3: 4}": "task_kwargs of 'coins': a key must be text, got 3",
    "task_kwargs: {prompts: 1}": "the data has 1 prompt and a generation batch takes 2 (generation_batch_size 8",
    "generation_batch_size: 64": "the data has 8 prompts and a generation batch takes 16 (generation_batch_size 64",
    "reward_funcs: get_soft_overlong_punishment\nsoft_overlong_length: 99": "begins after 80 tokens",
    "reward_funcs: get_soft_overlong_punishment\nsoft_overlong_cache: 99": "soft_overlong_cache must be at most ",
    "remove_unused_columns: true": "'correct_payment' asks for 'coins', and the data has the columns prompt",
    "reward_weights: [1.0, 2.0]": "reward_weights has 2 numbers for 1 reward functions",
    "output_dir: /dev/null/run": "output_dir '/dev/null/run' cannot be written to: ",
}


@pytest.mark.parametrize("change", ROWS)
def test_what_cannot_train_is_said_before_a_model_is_loaded(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loading, "GRPOTrainer", None)  # no trainer, no model
    keys = {line.split(":")[0] for line in change.splitlines()}
    kept = [line for line in RECIPE.splitlines() if line.split(":")[0] not in keys]
    (tmp_path / "recipe.yaml").write_text("\n".join([*kept, change, ""]))
    monkeypatch.chdir(tmp_path)
    assert main("grpo", ["--config", "recipe.yaml"]) == 2
    err = capsys.readouterr().err
    assert ROWS[change] in err and err.count("\n") == 1


def takes_completions_alone(completions: list[str]) -> list[float]:
    return [0.0 for _ in completions]


def asks_for_a_column(completions: list[str], solution: list[str], **kwargs) -> list[float]:
    return [float(one == other) for one, other in zip(completions, solution, strict=True)]


def asks_for_one_prompt(prompt: str, completions: list[str], **kwargs) -> list[float]:
    return [float(prompt in one) for one in completions]


def test_a_reward_function_that_cannot_be_called_is_refused():
    arguments, config, _, _ = parse("grpo", ["--task", "coins", "--use_cpu", "--bf16", "false"])
    with pytest.raises(ValueError, match=r"must take prompts, completions, .*: got an unexpected keyword argument"):
        loading.find_reward(f"{__name__}.takes_completions_alone", arguments, config)
    assert loading.find_reward(f"{__name__}.always_half", arguments, config) is always_half
    assert loading.find_reward(f"{__name__}.asks_for_a_column", arguments, config) is asks_for_a_column
    loading.refuse_missing_columns([asks_for_a_column], Dataset.from_dict({"prompt": ["a"], "solution": ["b"]}))
    with pytest.raises(ValueError, match="asks for 'solution', and the data has the columns prompt"):
        loading.refuse_missing_columns([asks_for_a_column], Dataset.from_dict({"prompt": ["a"]}))
    # TRL hands on every column but this one
    with pytest.raises(ValueError, match="asks for 'prompt'; TRL gives it as 'prompts', a list"):
        loading.refuse_missing_columns([asks_for_one_prompt], Dataset.from_dict({"prompt": ["a"]}))


def test_an_evaluation_at_the_start_has_its_prompts(tmp_path: Path):
    line = ["--task", "coins", "--use_cpu", "--bf16", "false", "--eval_on_start"]
    arguments, config, _, mixture = parse("grpo", line)
    assert loading.train_and_held_out(loading.load_task(arguments), arguments, config, mixture)[1] is not None
    arguments, config, _, mixture = parse("grpo", line[:-1])
    assert loading.train_and_held_out(loading.load_task(arguments), arguments, config, mixture)[1] is None


def test_data_that_cannot_be_read_is_a_sentence(tmp_path: Path):
    (tmp_path / "a.csv").write_text("prompt\na\n")
    (tmp_path / "b.csv").write_text("question\na\n")  # files of other columns
    arguments, _, _, mixture = parse("grpo", ["--dataset_name", str(tmp_path), "--use_cpu", "--bf16", "false"])
    with pytest.raises(ValueError, match=r"^dataset_name '.*' could not be loaded: .+"):
        loading.load_datasets(arguments, mixture)


def test_data_without_prompts_or_rows_is_refused():
    with pytest.raises(ValueError, match="the data has no column 'prompt', only question: rename"):
        loading.refuse_rows(Dataset.from_dict({"question": ["a"]}), "the data")
    with pytest.raises(ValueError, match="the data has no rows"):
        loading.refuse_rows(Dataset.from_dict({"prompt": []}), "the data")


@pytest.mark.parametrize(
    ("flags", "length", "paid"),
    [
        # a fifth of 100 is 20: from 80 on (80 - 90) / 20 = -1/2
        (["--max_completion_length", "100"], 90, -0.5),
        (["--max_completion_length", "100"], 80, 0.0),
        # from 60 on (60 - 90) / 40 = -3/4
        (["--max_completion_length", "100", "--soft_overlong_cache", "40"], 90, -0.75),
        # of 80 tokens a fifth is 16: at 72 (64 - 72) / 16 = -1/2; beyond 80 -1
        (["--max_completion_length", "100", "--soft_overlong_length", "80"], 72, -0.5),
        (["--max_completion_length", "100", "--soft_overlong_length", "80"], 90, -1.0),
    ],
)
def test_the_overlong_punishment_follows_the_runs_length(flags: list[str], length: int, paid: float):
    arguments, config, _, _ = parse("grpo", ["--use_cpu", "--bf16", "false", *flags])
    reward = loading.find_reward("get_soft_overlong_punishment", arguments, config)
    assert callable(reward) and reward(completion_ids=[[1] * length]) == [paid]


def test_sigma_reparam_trains_and_writes_a_plain_model(recipe: Path, tmp_path: Path):
    line = ["--config", str(recipe), "--output_dir", str(tmp_path / "run"), "--eval_samples", "0"]
    assert main("grpo", [*line, "--sigma_reparam", "true"]) == 0
    written = load_file(tmp_path / "run/model.safetensors")
    started = load_file(f"{policy_path()}/model.safetensors")
    assert written.keys() == started.keys() - {"lm_head.weight"}  # tied to the embedding
    moved = {name for name, value in written.items() if (value - started[name].float()).abs().max() > 1e-4}
    assert any("q_proj" in name for name in moved)


def test_entropy_sgd_makes_an_outer_step_every_so_many(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(EntropySgd, "_outer", lambda self, parameter, group: made.append(group["lr"]))
    line = ["--config", str(recipe), "--output_dir", str(tmp_path / "run"), "--eval_samples", "0", "--no_save_final"]
    assert main("grpo", [*line, "--entropy_sgd", '{"inner_steps": 2}', "--lr_scheduler_type", "constant"]) == 0
    # once in two steps for each tensor but the head, which is the embedding
    assert set(made) == {1e-3} and len(made) == len(load_file(f"{policy_path()}/model.safetensors")) - 1


def test_entropy_sgd_may_have_a_learning_rate_of_its_own():
    assert entropy_sgd_of({"inner_steps": 5}).given(learning_rate=1e-3, seed=4)["lr"] == 1e-3
    own = entropy_sgd_of({"lr": 0.5}).given(learning_rate=1e-3, seed=4)
    assert (own["lr"], own["seed"], own["inner_steps"]) == (0.5, 4, 20)


@pytest.mark.parametrize(
    "line, sentence",
    [
        (["--entropy_sgd", '{"inner_steps": 3}'], "max_steps must be a multiple of inner_steps 3, got 2"),
        (["--entropy_sgd", '{"inner": 3}'], "entropy_sgd has no hyper-parameter 'inner'"),
        (["--entropy_sgd", '{"momentum": 1.0}'], "entropy_sgd: momentum must be in [0, 1), got 1.0"),
        (
            ["--entropy_sgd", '{"lr": 0.0}'],
            "entropy_sgd: lr and inner_lr must be more than 0 and finite, got 0.0 and 0.1",
        ),
        (["--sigma_reparam", "true", "--save_strategy", "steps"], "set save_strategy to 'no'"),
        (["--sigma_reparam", "true", "--use_peft", "true"], "under names of its own: drop use_peft"),
    ],
)
def test_what_the_weights_of_a_run_cannot_be(line: list[str], sentence: str, recipe: Path, capsys):
    assert main("grpo", ["--config", str(recipe), "--output_dir", "runs/never", *line]) == 2
    assert sentence in capsys.readouterr().err
