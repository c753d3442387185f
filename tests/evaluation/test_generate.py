"""Responses: their entropies, and what a killed run leaves behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

from hclm_rl.evaluation.generate import (
    GENERATORS,
    Response,
    Sampling,
    TransformersGenerator,
    cache_file,
    fingerprint,
    sample,
)
from hclm_rl.testbed.coins import make_task
from hclm_rl.testbed.policy import policy_path

ROOT = Path(__file__).parents[2]
SAMPLING = Sampling(samples=6, max_new_tokens=17, batch=4, temperature=0.6, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def generator() -> TransformersGenerator:
    return TransformersGenerator(policy_path())


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [row["prompt"] for row in make_task(prompts=1, eval_prompts=3).eval_dataset]


def test_the_entropy_is_that_of_a_teacher_forced_pass_at_temperature_1(
    generator: TransformersGenerator, prompts: list[str]
):
    responses = generator(prompts, SAMPLING, seed=1)
    for prompt, response in zip(prompts, responses, strict=True):
        ids = generator.tokenizer(prompt, return_tensors="pt")["input_ids"]
        completion = generator.tokenizer(response.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = generator.model(torch.cat([ids, completion], dim=1)).logits[0, ids.shape[1] - 1 :]
        entropies = torch.distributions.Categorical(logits=logits).entropy()[: response.tokens]
        assert response.entropy == pytest.approx(entropies.mean().item(), abs=1e-5)


def test_responses_depend_on_the_seed_alone(generator: TransformersGenerator, prompts: list[str]):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = generator(prompts * 4, SAMPLING, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    assert generator(prompts * 4, SAMPLING, seed=1) == first
    assert generator(prompts * 4, SAMPLING, seed=2) != first
    assert len({response.text for response in first[::3]}) > 1  # the same prompt


def test_a_response_without_an_end_is_truncated(generator: TransformersGenerator, prompts: list[str]):
    cut = dataclasses.replace(SAMPLING, max_new_tokens=2)
    assert {(each.tokens, each.is_truncated) for each in generator(prompts, cut, seed=1)} == {(2, True)}


class Stops:
    """A generator that is killed at its nth batch."""

    def __init__(self, generator: TransformersGenerator, batches: float = float("inf")) -> None:
        self.generator, self.batches, self.made = generator, batches, 0

    def __call__(self, prompts: list[str], sampling: Sampling, seed: int) -> list[Response]:
        if self.made == self.batches:
            raise KeyboardInterrupt
        self.made += 1
        return self.generator(prompts, sampling, seed)


def test_a_killed_run_goes_on_where_it_was(generator: TransformersGenerator, prompts: list[str], tmp_path: Path):
    whole = sample(lambda: generator, prompts, SAMPLING, tmp_path / "whole.jsonl")
    cache = tmp_path / "killed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sample(lambda: Stops(generator, 3), prompts, SAMPLING, cache)
    assert len(cache.read_text().splitlines()) == 3
    cache.write_bytes(cache.read_bytes()[:-30])  # killed while it wrote the third
    rest = Stops(generator)
    assert sample(lambda: rest, prompts, SAMPLING, cache) == whole
    assert rest.made == 3  # of the five batches for 3 x 6 responses, two were whole
    assert cache.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def says(prompts: list[str], sampling: Sampling, seed: int) -> list[Response]:
    return [Response(text=f"answer to {prompt}", tokens=3, entropy=0.1, is_truncated=False) for prompt in prompts]


QUESTIONS = [f"question {i}" for i in range(4)]
PAIRS = Sampling(samples=2, batch=2)


def test_runs_that_share_a_cache_keep_their_answers_apart(tmp_path: Path):
    cache = tmp_path / "shared.jsonl"
    together = threading.Barrier(3)

    def says_at_once(prompts: list[str], sampling: Sampling, seed: int) -> list[Response]:
        together.wait(timeout=60)  # every run has read the empty file, and each batch is appended three times at once
        return says(prompts, sampling, seed)

    found = []
    runs = [
        threading.Thread(target=lambda: found.append(sample(lambda: says_at_once, QUESTIONS, PAIRS, cache)))
        for _ in range(3)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    right = [[Response(text=f"answer to {q}", tokens=3, entropy=0.1, is_truncated=False)] * 2 for q in QUESTIONS]
    assert found == [right] * 3
    assert len(cache.read_text().splitlines()) == 12
    assert sample(lambda: says_at_once, QUESTIONS, PAIRS, cache) == right  # and nothing is generated


def test_a_batch_of_other_prompts_is_generated_again(tmp_path: Path):
    cache = tmp_path / "c.jsonl"
    right = sample(lambda: says, QUESTIONS, PAIRS, cache)
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    lines[0]["batch"], lines[2]["batch"] = 2, 0  # as if written by a run that counted otherwise
    lines[1]["responses"].pop()
    old_version = [each["responses"] for each in lines]
    rows = [*old_version, *lines, {"batch": 99, "prompts": "", "responses": []}, 7]
    cache.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = []

    def counts(prompts: list[str], sampling: Sampling, seed: int) -> list[Response]:
        made.append(prompts[0])
        return says(prompts, sampling, seed)

    assert sample(lambda: counts, QUESTIONS, PAIRS, cache) == right
    assert made == ["question 0", "question 1", "question 2"]  # the fourth batch was whole and in its place


def test_a_second_run_loads_no_model(generator: TransformersGenerator, prompts: list[str], tmp_path: Path):
    seen = []
    first = sample(lambda: generator, prompts, SAMPLING, tmp_path / "c.jsonl", lambda *x: seen.append(x))
    assert seen == [(i, 5) for i in range(6)]

    def refuse() -> TransformersGenerator:
        raise AssertionError("the model was loaded")

    assert sample(refuse, prompts, SAMPLING, tmp_path / "c.jsonl") == first


def test_the_cache_is_another_one_for_another_model_prompt_or_setting(tmp_path: Path):
    (tmp_path / "model.safetensors").write_text("a")
    names = {
        cache_file(tmp_path, model, prompts, sampling, "transformers plain").name
        for model in (str(tmp_path), "hub/name")
        for prompts in (["1"], ["2"])
        for sampling in (SAMPLING, dataclasses.replace(SAMPLING, seed=4))
    }
    assert len(names) == 8
    before = fingerprint(str(tmp_path))
    (tmp_path / "report.json").write_text("{}")  # the evaluation's own, where --out is the model's folder
    assert fingerprint(str(tmp_path)) == before
    os.utime(tmp_path / "model.safetensors", (1, 1))  # trained again
    assert fingerprint(str(tmp_path)) != before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_settings_are_checked(change: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        Sampling(**change)


def test_vllm_is_asked_for_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"vllm is missing: pip install 'hclm-rl\[vllm\]'"):
        GENERATORS["vllm"](policy_path())


def test_what_vllm_is_told(monkeypatch: pytest.MonkeyPatch, prompts: list[str]):
    """A stand-in with the names of vLLM's documented interface; the real one needs a GPU."""
    told = {}

    class LLM:
        def __init__(self, **settings: object) -> None:
            told["settings"] = settings

        def generate(self, prompts: list, params: list, use_tqdm: bool) -> list:
            told["prompts"], told["params"] = prompts, params
            one = types.SimpleNamespace(text="3 32", token_ids=[8, 37], finish_reason="length")
            return [types.SimpleNamespace(outputs=[one]) for _ in prompts]

    stand_in = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    [response, *_] = GENERATORS["vllm"](policy_path())(prompts, SAMPLING, 5)
    assert response == Response(text="3 32", tokens=2, entropy=None, is_truncated=True)
    assert [len(each["prompt_token_ids"]) for each in told["prompts"]] == [10, 10, 10]
    assert told["params"][1] == {"temperature": 0.6, "top_p": 0.9, "max_tokens": 17, "seed": 6}
    assert told["settings"]["generation_config"] == "vllm"


@pytest.mark.slow
def test_a_process_that_is_killed_loses_at_most_one_batch(tmp_path: Path):
    line = ["eval", "testbed", "--task", "coins", "--samples", "64", "--problems", "96", "--out", str(tmp_path)]
    command = [sys.executable, "-W", "ignore", "-m", "hclm_rl", *line]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (found := list((tmp_path / "responses").glob("*.jsonl"))) or found[0].stat().st_size < 30_000:
        assert started.poll() is None
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    kept = found[0].read_bytes().split(b"\n")[:-1]
    assert 0 < len(kept) < 96
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    finished = found[0].read_bytes().splitlines()
    assert len(finished) == 96 and finished[: len(kept)] == kept
