"""The bench: its numbers from made-up seconds, and that both ways of a functional give one value."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))  # scripts, not a package

from overhead import CHAINS, LIMITS, SETTINGS, SHAPES, WITH_STATES, ScoringPass, Subject, build, rows_of
from usual_way import WAYS

from hclm_rl.equations.vocab import Head


def test_ratios_are_of_medians_and_what_a_term_takes_is_beyond_its_scoring_pass():
    seconds = {
        "stock TRL": [(1.0, 2.0), (2.0, 2.0), (9.0, 2.0)],
        "scoring pass": [(3.0, 2.5)] * 3,
        "scoring pass with states": [(3.0, 2.6)] * 3,
        "clip_cov": [(3.0, 2.6), (2.0, 2.7), (9.0, 9.9)],
        "log_det": [(4.0, 3.0)] * 3,
    }
    rows = {row.name: row for row in rows_of(seconds, {"stock TRL": 100.0, "clip_cov": 103.0})}
    assert rows["clip_cov"].wall_ratio == 3.0 / 2.0 and rows["clip_cov"].cpu_ratio == 2.7 / 2.0
    # the ratios of the rounds are 3, 1, 1; the quartiles of three values are those at the ends of four equal parts
    assert rows["clip_cov"].quartiles == (1.0, 3.0)
    assert rows["clip_cov"].own == pytest.approx((2.7 - 2.5) / 2.0)  # reads scores alone
    assert rows["log_det"].own == pytest.approx((3.0 - 2.6) / 2.0)  # reads states
    assert rows["stock TRL"].own is None and rows["scoring pass"].own is None
    assert (rows["clip_cov"].peak_ratio, rows["log_det"].peak) == (1.03, None)
    assert rows["clip_cov"].cells()[-3:] == ["1.03", "103", "1.030"]


def test_limits_and_states_are_of_rows_that_there_are():
    assert not {*LIMITS, *WITH_STATES} - CHAINS.keys()
    assert SHAPES["half_b"].width == 896 and SHAPES["half_b"].vocab == 151_936


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_scoring_pass_does_nothing_but_pass(setting: str, tmp_path: Path):
    subject = Subject(shape="toy", folder="", device="cpu")
    trained = {}
    for name in ("empty chain", "scoring pass with states"):
        trainer = build(name, subject, subject.model(), setting, 1, tmp_path / name)
        trainer.train()
        trained[name] = [each.detach().clone() for each in trainer.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*trained.values(), strict=True))
    assert ScoringPass(with_states=True).needs_hidden and not ScoringPass().needs_hidden


@pytest.mark.parametrize("name", WAYS)
def test_both_ways_of_a_functional_are_one(name: str):
    torch.manual_seed(0)
    rows, head = torch.randn(7, 5), Head(weight=2 * torch.randn(11, 5))
    ours, usual = (WAYS[name](rows.clone(), head, way) for way in (True, False))
    assert ours.abs().max() > 1e-3
    torch.testing.assert_close(ours, usual, rtol=1e-4, atol=1e-6)  # the usual nucleus adds 1e-12 within its logarithm
