"""Terms that read moments alone: taken as the scoring pass goes by, with nothing of the states kept."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hclm_rl import Rollout, RolloutEffect, Term
from hclm_rl.equations import rows
from hclm_rl.equations.geometry import at_least_float32, moments
from hclm_rl.equations.surrogates import unit_rows
from hclm_rl.recipe.config import build_chain
from hclm_rl.terms.log_det import LogDet
from hclm_rl.trainer import mixin
from hclm_rl.trainer import stage_one as first_stage
from hclm_rl.trainer.states import Passing

from ..counted import Counted
from ..cpu_processes import run_by_two
from ..term_batches import make_step, rollout
from ..tiny import largest_difference, make, weights_of

CUT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
TERMS: dict[str, dict[str, Any]] = {
    "log_det": {"coef": 0.1},
    "log_det of a length": {"coef": 0.1, "removes_radial": True},
    "variance": {"coef": 0.1},
    "variance, diagonal": {"coef": 0.1, "form": "diagonal"},
    "coding_rate": {"coef": 0.1, "rows": "tokens"},
    "von_neumann": {"coef": 0.1},
}
POOLED: dict[str, dict[str, Any]] = {
    "coding_rate": {"coef": 0.1},
    "group_log_det": {"acts": "both", "balance": 0.1},
    "dqo": {},
    "right_anchor": {"coef": 3.0, "source": "any", "right_at": 0.25, "keep": "log_det", "capacity": 1},
}
TOLERANCE = 1e-6


def term_of(name: str) -> dict[str, dict]:
    return {name.split()[0].rstrip(","): TERMS[name]}


@dataclass(frozen=True, kw_only=True)
class ReadsStates(Term):
    """A neighbour for which the states are kept."""

    needs_scores: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = True

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        return RolloutEffect(metrics={"size": rollout.states().square().mean()})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list:
    """The scores with which first stages run."""
    found, stage_one = [], mixin.stage_one

    def told(trainer: Any, output: Any, generation: Any, scores: Any) -> Any:
        found.append((mixin_mask(output), scores))
        return stage_one(trainer, output, generation, scores)

    for module in (mixin, first_stage):
        monkeypatch.setattr(module, "stage_one", told)
    return found


def mixin_mask(output: dict[str, Any]) -> Tensor:
    mask = output["completion_mask"].bool()
    return mask & output["tool_mask"].bool() if "tool_mask" in output else mask


def test_means_of_passes_are_those_of_the_responses_in_the_order_that_is_asked_for():
    source, lengths = torch.Generator().manual_seed(0), torch.tensor([4, 0, 3, 1])
    states, mask = torch.randn(4, 7, 5, generator=source), torch.arange(4) < lengths.unsqueeze(1)
    passing = Passing(mask, [rows.mean_of_responses])
    for part in states.split([3, 1]):
        passing.take(part)
    expected = torch.stack([s[2 : 2 + n].double().sum(0) / max(n, 1) for s, n in zip(states, lengths, strict=True)])
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(passing.passed()[rows.mean_of_responses], expected)
    assert torch.equal(passing.passed(order)[rows.mean_of_responses], expected[order])


@pytest.mark.parametrize("each", [at_least_float32, unit_rows])
def test_moments_of_passes_are_those_of_all_rows_and_nothing_else_is_held(each, monkeypatch: pytest.MonkeyPatch):
    width, prompt, lengths = 24, 5, torch.tensor([40, 0, 17, 40, 1, 33, 40, 28])
    monkeypatch.setattr(rows, "PIECE_BYTES", 2 * 40 * width * 4)  # two responses
    source = torch.Generator().manual_seed(0)
    states = 5 + torch.randn(8, prompt + 40, width, generator=source) * torch.arange(1.0, width + 1).sqrt()
    mask = torch.arange(40) < lengths.unsqueeze(1)
    states[:, -41:-1][~mask] = torch.nan  # of the padding nothing may be read
    passing = Passing(mask, [each])
    with Counted() as count:
        for part in states.split([4, 3, 1]):
            passing.take(part)
    whole = moments(states[:, -41:-1][mask].double(), each=each)
    found = passing.found[each]
    assert found.count == lengths.sum()
    torch.testing.assert_close(found.mean.double(), whole.mean, rtol=TOLERANCE, atol=0)
    largest = whole.scatter.abs().max().item()
    torch.testing.assert_close(found.scatter.double(), whole.scatter, rtol=0, atol=TOLERANCE * largest)
    # one matrix and one mean are left; beside them a piece's rows, twice, and its own matrix
    one = (width**2 + width + 1) * 4
    assert count.held <= 1.1 * one and count.peak < 3 * one + 3 * rows.PIECE_BYTES


@pytest.mark.parametrize("name", TERMS)
def test_the_update_is_that_of_kept_states(name: str, policy: str, tmp_path: Path, seen: list):
    trained = {}
    for kept in ([], [ReadsStates()]):
        trainer = make(policy, tmp_path / str(len(kept)), terms=[term_of(name), *kept], fixed="turns", **CUT)
        before = weights_of(trainer)
        trainer.train()
        for mask, scores in seen:
            if kept:
                assert scores.passed is None and len(scores.states.rows) >= mask.sum()
            else:
                assert scores.states is None and all(m.count == mask.sum() for m in scores.passed.values())
        seen.clear()
        trained[bool(kept)] = weights_of(trainer)
    assert largest_difference(trained[False], trained[True]) < TOLERANCE
    plain = make(policy, tmp_path / "plain", terms=[], fixed="turns", **CUT)
    plain.train()
    assert largest_difference(trained[False], weights_of(plain)) > 10 * TOLERANCE
    assert largest_difference(trained[False], before) > 1e-3


@pytest.mark.parametrize("pieces", [CUT, {}], ids=["scoring pass", "loss's own pass"])
@pytest.mark.parametrize("name", POOLED)
def test_terms_of_pooled_states_are_those_of_kept_states(
    name: str, pieces: dict, policy: str, tmp_path: Path, seen: list
):
    trained = []
    for kept in ([], [ReadsStates()]):
        folder = tmp_path / str(len(kept))
        trainer = make(policy, folder, terms=[{name: POOLED[name]}, *kept], fixed="turns", max_steps=3, **pieces)
        trainer.train()
        for mask, scores in seen:
            assert (scores.states is None) == (not kept)
            assert kept or [each.shape for each in scores.passed.values()] == [(len(mask), 16)]
        seen.clear()
        trained.append(weights_of(trainer))
    assert largest_difference(*trained) < TOLERANCE
    plain = make(policy, tmp_path / "plain", terms=[], fixed="turns", max_steps=3, **pieces)
    plain.train()
    assert largest_difference(trained[0], weights_of(plain)) > 10 * TOLERANCE


def test_the_losss_own_pass_is_read_without_a_copy_of_its_states(policy: str, tmp_path: Path, seen: list):
    trained = []
    for terms in ([term_of("log_det")], [term_of("log_det"), ReadsStates()]):
        trainer = make(policy, tmp_path / str(len(terms)), terms=terms, fixed="turns")
        trainer.train()
        trained.append(weights_of(trainer))
    assert largest_difference(*trained) < TOLERANCE
    assert [scores.passed is not None for _, scores in seen] == [True, True, False, False]
    assert all(m.count == mask.sum() for mask, scores in seen[:2] for m in scores.passed.values())


def test_where_tokens_may_be_left_out_later_trls_own_pass_keeps_the_states(policy: str, tmp_path: Path, seen: list):
    # off-policy, so that TRL scores within the making of the batch, before it is known what a tool wrote
    off_policy = {"num_iterations": 2, "per_device_train_batch_size": 8, "max_steps": 1}
    for fixed, is_kept in (("turns", True), (False, False)):
        make(policy, tmp_path / str(fixed), terms=[term_of("log_det")], fixed=fixed, **off_policy).train()
        [(mask, scores)] = seen
        assert (scores.states is not None) == is_kept and (scores.passed is None) == is_kept
        assert is_kept or all(m.count == mask.sum() for m in scores.passed.values())
        seen.clear()


def test_who_says_moments_alone_and_reads_states_is_refused(policy: str, tmp_path: Path):
    @dataclass(frozen=True, kw_only=True)
    class Greedy(LogDet):
        """Says that it reads moments, as its parent does, and reads states."""

        def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
            return RolloutEffect(metrics={"size": rollout.states().square().mean()})

    with pytest.raises(ValueError, match="the hidden states were not kept"):
        make(policy, tmp_path, terms=[Greedy()], fixed=True, **CUT).train()


@pytest.mark.parametrize("name", TERMS)
def test_a_step_sends_the_second_moments_the_mean_and_the_count(name: str):
    sent: list[int] = []

    def total(x: Tensor) -> Tensor:
        sent.append(x.numel())
        return 2 * x  # of two processes with the same rows

    step = make_step()
    width = step.old_hidden.size(2)
    build_chain([term_of(name)]).links[0].term.on_rollout(rollout(step, total=total), {})
    # the tokens of the step are counted once more by the coding rate
    assert sum(sent) <= width**2 + width + 1 + (name == "coding_rate") and len(sent) <= 3


def test_two_processes_are_one(policy: str, tmp_path: Path):
    cases = {name: given for name, given in TERMS.items() if " " not in name}
    run_by_two("tests.two_processes", policy, str(tmp_path), json.dumps(cases), "cut")
    for name, given in cases.items():
        kept = make(policy, tmp_path / name, terms=[{name: given}, ReadsStates()], fixed=True, loss_type="dapo", **CUT)
        kept.train()
        assert largest_difference(load_file(tmp_path / f"{name}.safetensors"), weights_of(kept)) < TOLERANCE


def test_two_processes_are_one_where_means_pass_and_tokens_are_drawn(policy: str, tmp_path: Path):
    kernel = {"through": "head", "share": 0.3, "floor": 0.1, "ceiling": 0.5}
    cases = {name: POOLED[name] for name in ("coding_rate", "group_log_det", "dqo")} | {"force_reweight": kernel}
    run_by_two("tests.two_processes", policy, str(tmp_path), json.dumps(cases), "cut")
    for name, given in cases.items():
        one = make(policy, tmp_path / name, terms=[{name: given}], fixed=True, loss_type="dapo", **CUT)
        one.train()
        assert largest_difference(load_file(tmp_path / f"{name}.safetensors"), weights_of(one)) < TOLERANCE
