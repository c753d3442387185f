"""`hclm-rl sft`: a recipe trains and leaves a model; a mistake is one sentence; every recipe parses."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hclm_rl.commands import cli
from hclm_rl.commands.sft import lessons_of, parse
from hclm_rl.sft.config import METHODS, build_method, name_of
from hclm_rl.testbed import coins

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
        (["--dataset_name", "some/where"], "the task 'coins' brings its own lessons: drop dataset_name"),
        (["--loss_type", "dft", "--sft_method", "mix_ce"], "mix_ce is a loss of its own beside loss_type 'dft'"),
    ],
)
def test_a_mistake_is_one_sentence(line: list[str], sentence: str, capsys: pytest.CaptureFixture):
    assert cli.main(["sft", "--config", str(RECIPES["plain_sft"]), *line]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.startswith("hclm-rl sft: ") and err.count("\n") == 1


def test_a_missing_model_and_missing_data_are_named(capsys: pytest.CaptureFixture):
    common = ["--output_dir", "runs/never", "--use_cpu", "true", "--bf16", "false"]
    assert cli.main(["sft", *common, "--task", "coins"]) == 2
    assert "the model is missing: set model_name_or_path" in capsys.readouterr().err
    assert cli.main(["sft", *common, "--model_name_or_path", "testbed"]) == 2
    assert "the data set is missing: set task" in capsys.readouterr().err
