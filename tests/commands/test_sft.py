"""`hclm-rl sft`: a recipe trains and leaves a model; a mistake is one sentence; every recipe parses."""

import json
import os
import socket
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hclm_rl.commands import cli
from hclm_rl.commands.lock import LOCK_NAME, Owner
from hclm_rl.commands.sft import lessons_of, parse
from hclm_rl.sft.config import METHODS, build_method, name_of
from hclm_rl.testbed import coins
from hclm_rl.testbed.policy import policy_path
from hclm_rl.testbed.warm_start_recipe import LESSONS

ROOT = Path(__file__).parents[2]
RECIPES = {file.stem: file for file in sorted((ROOT / "recipes/sft").glob("*.yaml"))}
SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--lessons", "32", "--logging_steps", "1"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_parses_and_says_what_it_is(name: str):
    header = RECIPES[name].read_text().split("\ntask:")[0]
    assert f"#   accelerate launch recipes/sft.py --config recipes/sft/{name}.yaml" in header and "# Numbers" in header
    _, config, *_ = parse(["--config", str(RECIPES[name])])
    assert config.output_dir == f"runs/sft/{name}"
    method = build_method(config.sft_method)
    assert (name == "plain_sft" and method is None) or (method is not None and name_of(method) == name)


def test_every_method_has_a_recipe():
    assert set(RECIPES) == {*METHODS, "plain_sft"}


def test_lessons_are_prompts_with_right_completions():
    rows = lessons_of("coins", seed=0, count=20)
    for row in rows:
        words = row["prompt"].split()
        problem = {"coins": [int(word) for word in words[:3]], "amount": int(words[4])}
        problem["forbidden"] = [int(word) for word in words[6:9]]
        assert words[-1] == ">" and coins.is_correct(problem, row["completion"])


@pytest.mark.parametrize("task", LESSONS)
def test_fewer_lessons_are_the_first_of_more(task: str):
    assert LESSONS[task].texts(3, 4) == LESSONS[task].texts(3, 9)[:4] and len(LESSONS[task].texts(3, 9)) == 9


def test_a_run_leaves_a_model_a_log_and_a_summary(tmp_path: Path):
    line = ["sft", "--config", str(RECIPES["curio_sft"]), "--output_dir", str(tmp_path), *SHORT, "--use_cpu", "true"]
    assert cli.main(line) == 0
    log = [json.loads(row) for row in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"loss", "entropy", "curio_sft/pull", "curio_sft/temperature"} <= log[0].keys()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["sft_method"], summary["steps"], summary["task"]) == ("curio_sft", 2, "coins")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    logits = model(**tokenizer("2 3 5 : 20 ! 1 2 4 >", return_tensors="pt")).logits
    assert torch.isfinite(logits).all() and logits.shape[-1] == 46


@pytest.mark.parametrize(
    "line, sentence",
    [
        (["--task", "coin"], "task must be one of coins, coins_noisy, products, got 'coin'"),
        (["--sft_method", "mixce"], "sft_method: unknown name 'mixce'"),
        (
            ["--sft_methd", "mix_ce"],
            "unknown key 'sft_methd' on the command line; the nearest known ones are sft_method",
        ),
        (["--lessons", "0"], "lessons must be at least 1, got 0"),
        (["--learning_rate", "-1"], "learning_rate must be at least 0, got -1.0"),
        (
            ["--eval_strategy", "steps"],
            "the lessons of 'coins' have no part that is held out: set eval_strategy to 'no'",
        ),
        (["--dataset_name", "some/where"], "the task 'coins' brings its own lessons: drop dataset_name"),
        (["--loss_type", "dft", "--sft_method", "mix_ce"], "mix_ce is a loss of its own beside loss_type 'dft'"),
    ],
)
def test_a_mistake_is_one_sentence(line: list[str], sentence: str, capsys: pytest.CaptureFixture):
    assert cli.main(["sft", "--config", str(RECIPES["plain_sft"]), *line]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.startswith("hclm-rl sft: ") and err.count("\n") == 1


def test_two_runs_are_not_at_work_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture):
    other = psutil.Process(os.getppid())
    owner = Owner(host=socket.gethostname(), process=other.pid, started=other.create_time())
    lock = tmp_path / LOCK_NAME
    lock.write_text(json.dumps(vars(owner)))
    line = ["sft", "--config", str(RECIPES["plain_sft"]), "--output_dir", str(tmp_path), *SHORT]
    assert cli.main(line) == 2
    assert f"another run is at work in {tmp_path} (process {other.pid} on" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [LOCK_NAME]  # not even the untrained policy


def rows_file(folder: Path, split: str, first: int) -> Path:
    """Eight lessons as a JSONL file of a data set with splits."""
    file = folder / f"{split}.jsonl"
    rows = lessons_of("coins", seed=0, count=first + 8).select(range(first, first + 8))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_run_evaluates_on_the_split_that_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture):
    data = tmp_path / "data"
    data.mkdir()
    rows_file(data, "train", 0), rows_file(data, "test", 8)
    common = ["--model_name_or_path", policy_path(), "--dataset_name", str(data), "--eos_token", "<eos>"]
    common += [
        "--output_dir",
        str(tmp_path / "run"),
        "--max_steps",
        "2",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
    ]
    common += ["--per_device_train_batch_size", "8", "--bf16", "false", "--gradient_checkpointing", "false"]
    common += ["--use_cpu", "true", "--report_to", "none", "--save_strategy", "no", "--logging_steps", "1"]
    assert cli.main(["sft", *common, "--dataset_test_split", "validation"]) == 2
    said = capsys.readouterr().err
    assert "the data set has no split 'validation', only" in said and "set dataset_test_split" in said
    assert cli.main(["sft", *common]) == 0
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [each["step"] for each in log if "eval_loss" in each] == [1, 2]
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_a_missing_model_and_missing_data_are_named(capsys: pytest.CaptureFixture):
    common = ["--output_dir", "runs/never", "--use_cpu", "true", "--bf16", "false"]
    assert cli.main(["sft", *common, "--task", "coins"]) == 2
    assert "the model is missing: set model_name_or_path" in capsys.readouterr().err
    assert cli.main(["sft", *common, "--model_name_or_path", "testbed"]) == 2
    assert "the data set is missing: set task" in capsys.readouterr().err


def on_file(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> list[str]:
    """The line that learns from these rows, two steps."""
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["sft", "--model_name_or_path", policy_path(), "--dataset_name", str(file), "--eos_token", "<eos>"]
    line += ["--output_dir", str(folder / "run"), "--max_steps", "2", "--bf16", "false", "--use_cpu", "true"]
    return [*line, "--report_to", "none", "--save_strategy", "no", "--gradient_checkpointing", "false"]


@pytest.mark.parametrize(
    "row", [{"text": "2 3 5 : 20 ! 1 2 4 > 5 5"}, {"prompt": "2 3 5 : 20 ! 1 2 4 >", "completion": " 5 5", "answer": 3}]
)
def test_a_file_of_lessons_needs_no_prompt(row: dict, tmp_path: Path):
    assert cli.main(on_file(tmp_path, [row])) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    "row, more, sentence",
    [
        ({"x": "5"}, [], "the data has the columns x; lessons have messages, or prompt and completion, or text"),
        ({"prompt": "5"}, [], "the data has the columns prompt; lessons have messages, or prompt and completion"),
        (
            {"prompt": "5 5", "completion": " 5"},
            ["--max_length", "1"],
            "no row of the data has a token to learn within",
        ),
    ],
)
def test_data_without_lessons_is_a_sentence(row: dict, more: list[str], sentence: str, tmp_path: Path, capsys):
    assert cli.main([*on_file(tmp_path, [row]), *more]) == 2
    err = capsys.readouterr().err
    assert f"hclm-rl sft: {sentence}" in err and "Traceback" not in err


def test_a_line_that_is_no_object_is_named(tmp_path: Path, capsys):
    line = on_file(tmp_path, [{"text": "5"}])
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("[1]\n")
    assert cli.main(line) == 2
    assert "rows.jsonl, line 2 is not a JSON object" in capsys.readouterr().err
