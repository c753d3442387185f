"""The hand-over to lm-evaluation-harness: the task's file, its verifier, and the harness's number against our own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import GenerationConfig

from hclm_rl.testbed.coins import MAX_COMPLETION_LENGTH, is_correct, make_dataset
from hclm_rl.testbed.policy import load_policy, policy_path

FOLDER = Path(__file__).parents[2] / "eval" / "lm_eval"


@pytest.fixture(scope="module")
def verifier():
    spec = importlib.util.spec_from_file_location("lm_eval_verifier", FOLDER / "verifier.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_problems_are_those_of_the_test_split(verifier):
    assert verifier.load_problems(any="setting")["test"].to_list() == make_dataset("test", 96, 0).to_list()


def test_the_verifier_scores_one_completion(verifier):
    doc = {"coins": [7, 3, 5], "amount": 10, "forbidden": [1, 2, 4]}
    assert verifier.process_results(doc, ["7 3 3 0"]) == {"right": 1.0}
    assert verifier.process_results(doc, ["7 3 3 1"]) == {"right": 0.0}


def test_the_task_leaves_room_for_the_longest_answer():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    task = yaml.load((FOLDER / "coins.yaml").read_text(), Loader)  # a SafeLoader and one tag
    assert task["generation_kwargs"] == {"until": [], "max_gen_toks": MAX_COMPLETION_LENGTH, "do_sample": False}
    assert task["custom_dataset"] == "verifier.load_problems"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra `lm-eval`)")
def test_the_harness_finds_what_greedy_decoding_finds(tmp_path: Path):
    arguments = ["--model", "hf", "--model_args", f"pretrained={policy_path()},dtype=float32", "--device", "cpu"]
    task = ["--include_path", str(FOLDER), "--tasks", "hclm_coins", "--batch_size", "32", "--output_path"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "lm_eval", *arguments, *task, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr[-2000:]
    [written] = tmp_path.rglob("results*.json")
    found = json.loads(written.read_text())["results"]["hclm_coins"]["right,none"]

    model, tokenizer = load_policy()
    rows = make_dataset("test", 96, 0).to_list()
    encoded = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=MAX_COMPLETION_LENGTH, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    ids = model.generate(encoded["input_ids"], settings, attention_mask=encoded["attention_mask"])
    texts = tokenizer.batch_decode(ids[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    ours = sum(is_correct(row, text) for row, text in zip(rows, texts, strict=True)) / len(rows)
    assert 0.2 < ours < 0.8 and found == pytest.approx(ours, abs=1.01 / 96)  # one near-tie may round the other way
