"""The trace of single tokens: what it holds, that it changes nothing; trainer/test_invariance.py has two processes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import hclm_rl
from hclm_rl import Effect, Quantiles, Rollout, RolloutEffect, Term, TokenBatch
from hclm_rl.equations.functional import quantile
from hclm_rl.watch.trace import Trace, file_of, read_trace, token_texts, traced_steps

from ..tiny import largest_difference, low_words, make, weights_after, weights_of

CORE = ["prompt", "response", "position", "id", "token", "prompt_text", "reward", "logp", "old_logp", "entropy"]
CORE += ["advantage_before", "advantage", "weight"]
OFF_POLICY = {"num_iterations": 2, "max_steps": 4, "trace_steps": [2, 3]}
CUT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@dataclass(frozen=True, kw_only=True)
class TellsTokens(Term):
    """A stranger's term: halves the advantage of odd ids; tells each token's id in both stages, by both forms."""

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        return RolloutEffect(metrics={"first": rollout.ids.float(), "count": rollout.mask.sum()})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        halved = torch.where(batch.ids % 2 == 1, batch.advantages / 2, batch.advantages)
        return Effect(advantages=halved, metrics={"second": Quantiles(values=batch.ids.float())})


def traced(folder: Path, step: int) -> dict[str, list]:
    return read_trace(folder, step).to_pydict()


def test_every_token_is_there_once_with_what_the_terms_told(policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, terms=[TellsTokens(), "information_force"], fixed=True, trace_steps=[1], **CUT)
    texts: list[str] = []

    def reward(completions: list[str], **_) -> list[float]:
        texts.extend(completions)
        return low_words(completions)

    trainer.reward_funcs = [reward]
    trainer.train()
    assert traced_steps(tmp_path) == [1]
    of = traced(tmp_path, 1)
    told = [f"information_force/{name}" for name in ("leverage", "force", "influence", "burning", "affected")]
    assert set(of) == {*CORE, *told, *(f"TellsTokens/{name}" for name in ("first", "second", "affected"))}
    rows = [dict(zip(of, values, strict=True)) for values in zip(*of.values(), strict=True)]
    first = texts[:8]  # step 1: eight responses, four to a prompt
    assert [(row["response"], row["position"]) for row in rows] == [
        (response, position) for response, text in enumerate(first) for position in range(len(text.split()) + 1)
    ]
    for response, text in enumerate(first):
        own = [row for row in rows if row["response"] == response]
        assert "".join(row["token"] for row in own) == f"{text} <eos>"
        assert {row["prompt"] for row in own} == {response // 4}
        assert {row["reward"] for row in own} == {low_words([text])[0]}
        assert len({row["prompt_text"] for row in own}) == 1
    for row in rows:
        assert row["TellsTokens/first"] == row["TellsTokens/second"] == row["id"]
        assert row["advantage"] == pytest.approx(row["advantage_before"] * (0.5 if row["id"] % 2 else 1.0))
        assert row["weight"] == ((0.5 if row["id"] % 2 else 1.0) if row["advantage_before"] else None)
        assert row["information_force/burning"] == (row["information_force/influence"] < 0)
        assert row["logp"] < 0 < row["entropy"] < 3.26  # log(26 words) = 3.258 nats


def test_the_trace_and_the_log_agree(policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, terms=["information_force"], trace_steps=[2])
    trainer.train()
    of, log = traced(tmp_path, 2), trainer.state.log_history[1]
    assert sum(of["entropy"]) / len(of["entropy"]) == pytest.approx(float(log["entropy"]), rel=1e-5)
    for name in ("leverage", "influence"):
        values = torch.tensor(of[f"information_force/{name}"])
        assert quantile(values, 0.95).item() == pytest.approx(float(log[f"information_force/{name}/q95"]), rel=1e-4)
    # ||F||^2 = sum_i ||F_i||^2
    power = sum(value**2 for value in of["information_force/force"])
    assert power**0.5 == pytest.approx(float(log["information_force/force_norm"]), rel=1e-4)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.parametrize("terms", [None, ["information_force", {"forking_tokens": {}}]], ids=["no terms", "terms"])
def test_a_trace_changes_nothing(algorithm: str, terms: list | None, policy: str, tmp_path: Path):
    plain = {"algorithm": algorithm, "terms": terms, "num_iterations": 2, "max_steps": 4}
    without = weights_after(policy, tmp_path / "without", **plain)
    trainer = make(policy, tmp_path / "with", **plain, trace_steps=[2], trace_every=3)
    trainer.train()
    assert largest_difference(without, weights_of(trainer)) == 0.0
    assert traced_steps(tmp_path / "with") == [2, 3] and not (tmp_path / "without" / "trace").exists()
    ratio_moved = [
        a != b for a, b in zip(*(traced(tmp_path / "with", 2)[n] for n in ("logp", "old_logp")), strict=True)
    ]
    assert any(ratio_moved)  # the second update on the same responses


def test_several_generation_batches_in_a_step_keep_apart(policy: str, tmp_path: Path):
    half = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 1}
    make(policy, tmp_path, fixed=True, trace_every=1, max_steps=1, **half).train()
    of = traced(tmp_path, 1)
    assert set(zip(of["response"], of["prompt"], strict=True)) == {(r, r // 4) for r in range(8)}
    assert len(set(zip(of["response"], of["position"], strict=True))) == len(of["id"])


def test_what_is_no_step_is_refused_before_a_model_is_loaded():
    with pytest.raises(ValueError, match=r"trace_steps are optimiser steps from 1 on, got \[0\]"):
        hclm_rl.GRPOConfig("out", trace_steps=[0])
    with pytest.raises(ValueError, match="trace_every must be at least 1, got 0"):
        hclm_rl.RLOOConfig("out", trace_every=0)


def test_a_step_without_a_trace_is_named(tmp_path: Path):
    file = file_of(tmp_path, 20)
    file.parent.mkdir()
    file.touch()
    with pytest.raises(ValueError, match="no trace of step 10; traced steps: 20"):
        read_trace(tmp_path, 10)


class Words:
    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


def told(folder: Path, numbers: list[int]) -> Trace:
    """A trace of these micro-batches, of two responses each; the second tells a metric that the first does not."""
    trace = Trace(folder=folder, every=5)
    mask = torch.tensor([[True, True], [True, False]])
    for i in numbers:
        rows = torch.tensor([2 * i, 2 * i + 1])
        columns = {"prompt": rows // 2, "response": rows, "reward": rows.float()}
        columns |= {name: torch.full((2, 2), float("nan")).masked_fill(mask, 1.0) for name in ("advantage", "entropy")}
        columns |= {"id": torch.tensor([[7, 8], [9, 0]]), "position": torch.tensor([[0, 1], [0, 1]])}
        columns |= {"advantage_before": torch.tensor([0.0, 2.0])}
        trace.start(mask, columns, [(i, [i])])
        if i == 1:
            trace.add("late/told", torch.tensor([[1.0, 2.0], [3.0, float("nan")]]))
    return trace


def test_a_metric_of_some_micro_batches_is_empty_in_the_others(tmp_path: Path):
    trace = told(tmp_path, [0, 1])
    assert not trace.wants(4) and trace.wants(5) and trace.is_on
    trace.write(5, Words())
    of = traced(tmp_path, 5)
    assert of["late/told"] == [None, None, None, 1.0, 2.0, 3.0]
    assert of["token"] == ["7", " 8", "9"] * 2 and of["prompt_text"] == ["0"] * 3 + ["1"] * 3
    assert of["weight"] == [None, None, 0.5] * 2 and of["entropy"] == [1.0] * 6
    assert isinstance(read_trace(tmp_path, 5), pa.Table)


def test_each_process_writes_its_part_and_a_step_counts_when_all_are_there(tmp_path: Path):
    told(tmp_path / "one", [0, 1]).write(5, Words())
    whole, folder = traced(tmp_path / "one", 5), tmp_path / "two"
    told(folder, [0]).write(5, Words())  # one process, of a run that was cut off and goes on with two
    told(folder, [1]).write(5, Words(), process=1, processes=2)
    assert traced_steps(folder) == [5] and len(traced(folder, 5)["id"]) == 3
    told(folder, [0]).write(5, Words(), process=0, processes=2)
    assert traced(folder, 5) == whole
    assert sorted(file.name for file in (folder / "trace").iterdir()) == [
        "step-00005.part-00000-of-00002.parquet",
        "step-00005.part-00001-of-00002.parquet",
    ]
    told(folder, [0, 1]).write(5, Words(), process=0, processes=4)  # and with four, of which one has written
    assert traced_steps(folder) == []
    with pytest.raises(ValueError, match=r"no trace of step 5 but 1 of 4 parts: .*; traced steps: none"):
        read_trace(folder, 5)


def test_tokens_keep_their_spaces_and_their_halves():
    pieces = {1: b"the", 2: b" cat", 3: b"\xc3", 4: b"\xa9"}  # 3 and 4 together are one character

    def decode(ids: list[int]) -> str:
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    assert token_texts([1, 2, 2, 3, 4], decode) == ["the", " cat", " cat", "\ufffd", "\ufffd"]
    two = np.array([True, False, False, True, False])  # where responses begin
    assert token_texts([1, 2, 2, 2, 1], decode, two) == ["the", " cat", " cat", " cat", "the"]


def test_a_pair_of_tokens_is_decoded_once_however_often_it_comes():
    calls: list[list[int]] = []

    def decode(ids: list[int]) -> str:
        calls.append(ids)
        return "".join(" abcd"[i] for i in ids)

    own = np.random.default_rng(0).integers(1, 5, 10_000)
    assert "".join(token_texts(own, decode)) == "".join(" abcd"[i] for i in own)
    assert len(calls) <= 4 + 4**2
