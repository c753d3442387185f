"""The detector on curves that are known: which collapse, when, and which do not (battery.py)."""

import pytest

from hclm_rl.watch.collapse import CollapseDetector

from .battery import CALM, COLLAPSES, Shape, score

SEEDS = range(20)
ENDS = ("collapsed", "exploding")


def of(shape: Shape):
    return score(shape, CollapseDetector(), SEEDS, ENDS)


def test_there_are_shapes_of_either_kind():
    names = [shape.name for shape in (*COLLAPSES, *CALM)]
    assert len(set(names)) == len(names) >= 30 and min(len(COLLAPSES), len(CALM)) >= 25
    # tau ln 5 steps after the start, which is step 1: 30 * 1.609 = 48.3, so at step 50 for the first time
    assert next(shape for shape in COLLAPSES if shape.name == "decay, tau 30").collapse == 50


@pytest.mark.parametrize(
    "shape", [shape for shape in COLLAPSES if shape.collapse - shape.onset >= 30], ids=lambda s: s.name
)
def test_a_collapse_is_seen_before_it_has_happened(shape: Shape):
    found = of(shape)
    # half of the level as noise on every step hides the end of the fall now and then; so slow a power law looks at rest
    assert found.late <= (1 if "50 % noise" in shape.name else 10 if "law of .5" in shape.name else 0)
    if shape.tau and 30 <= shape.tau <= 8000 and "tau 120, every tenth" not in shape.name:  # which has 20 entries
        assert found.lead >= 0.25
    if shape.name.startswith("power law") and "of .5" not in shape.name:
        assert found.lead >= 0.15


def test_a_cliff_is_seen_within_ten_steps():
    [shape] = [shape for shape in COLLAPSES if shape.name.startswith("cliff")]
    assert shape.collapse is not None
    for seed in SEEDS:
        judged = CollapseDetector().judge(shape.entries(seed))
        first = next(step for step, verdict in judged if verdict.is_alarm)
        assert 200 < first <= shape.collapse + 10


@pytest.mark.parametrize("shape", CALM, ids=lambda shape: shape.name)
def test_a_healthy_run_is_left_alone(shape: Shape):
    found = of(shape)
    assert found.false <= 1.0 and found.ended == 0
