import json
import logging
import math
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from hclm_rl.chain.coefficients import OnCollapse, coefficient_from
from hclm_rl.watch.collapse import CollapseCallback, CollapseDetector, fit_line, slope

from ..tiny import make


def judged(entropies, detector: CollapseDetector | None = None, **more):
    entries = [
        {"step": i + 1, "entropy": entropy, **{name: of[i] for name, of in more.items()}}
        for i, entropy in enumerate(entropies)
    ]
    return (detector or CollapseDetector()).judge(entries)


def exponential(rate: float, steps: int, start: float = 1.0) -> list[float]:
    return [start * math.exp(-rate * i) for i in range(steps)]


def test_the_slope_of_a_line_is_found_whatever_is_forgotten():
    state: dict[str, float] = {}
    for step in (1, 2, 5, 6, 10, 20):
        fit_line(state, 3 - 0.25 * step, step - state.get("at", step - 1), keep=0.9)
        state["at"] = step
    assert slope(state) == pytest.approx(-0.25)


def test_the_slope_of_three_points_by_hand():
    # y = 0, 0, 3 at t = -2, -1, 0, weights 1/4, 1/2, 1: mean t -4/7, mean y 12/7;
    # cov = (1/4)(-10/7)(-12/7) + (1/2)(-3/7)(-12/7) + (4/7)(9/7) = 84/49, var = (1/4)(100/49) + (1/2)(9/49) + 16/49
    state: dict[str, float] = {}
    for y in (0.0, 0.0, 3.0):
        fit_line(state, y, 1, keep=0.5)
    cov = 0.25 * (10 / 7) * (12 / 7) + 0.5 * (3 / 7) * (12 / 7) + (4 / 7) * (9 / 7)
    var = 0.25 * (100 / 49) + 0.5 * (9 / 49) + 16 / 49
    assert slope(state) == pytest.approx(cov / var)


def test_a_steady_run_is_healthy():
    found = judged([1.0 + 0.05 * (-1) ** i for i in range(200)])
    assert {verdict.state for _, verdict in found} == {"healthy"} and found[-1][1].causes == ()


def test_a_fast_fall_is_seen_before_it_is_over():
    # e^(-0.02 t): a fifth of the start at t = ln 5 / 0.02 = 80
    found = judged(exponential(0.02, 120))
    first = next(step for step, verdict in found if verdict.state == "collapsing")
    assert first < 60
    verdict = found[first - 1][1]
    assert "reaches 20 %" in verdict.causes[0] and verdict.number == 2


def test_the_start_is_counted_in_steps_however_seldom_it_is_logged():
    # 1 over the first ten steps, then e^(-0.05 t), logged as means of ten steps
    entropies = [1.0] + [math.exp(-0.05 * (10 * i + 5)) for i in range(1, 8)]
    detector, state = CollapseDetector(), {}
    for i, entropy in enumerate(entropies):
        verdict, state = detector.update({"entropy": entropy}, 10 * (i + 1), state)
        assert state["start"] == 1.0 and state["seen"] == 5
        if verdict.state == "collapsing":
            break
    assert i + 1 <= 4, "within 40 steps, not after five entries"
    # entries of two steps: 0.8, 0.6, and half of 0.4's make five steps
    state = {}
    for step, entropy in ((2, 0.8), (4, 0.6), (6, 0.4), (8, 0.1)):
        _, state = detector.update({"entropy": entropy}, step, state)
    assert state["start"] == pytest.approx((2 * 0.8 + 2 * 0.6 + 0.4) / 5)


def test_a_resumed_run_remembers_its_start():
    log = [{"step": i + 1, "entropy": entropy} for i, entropy in enumerate(exponential(1 / 40, 130))]
    whole, resumed = CollapseCallback(), CollapseCallback()
    state = TrainerState(log_history=[], global_step=0)
    whole.on_train_begin(None, state, None)
    for entry in log:
        state.global_step = entry["step"]
        state.log_history.append(dict(entry))
        whole.on_log(None, state, TrainerControl(), dict(entry))
    assert whole.verdict.state == "collapsing"
    state = TrainerState(log_history=log[:100], global_step=100)
    resumed.on_train_begin(None, state, None)
    assert resumed.verdict.state == "collapsing"
    for entry in log[100:]:
        state.global_step = entry["step"]
        resumed.on_log(None, state, TrainerControl(), dict(entry))
    assert resumed.state == pytest.approx(whole.state) and resumed.verdict == whole.verdict
    resumed.on_train_begin(None, TrainerState(log_history=[], global_step=0), None)  # a run of its own
    assert resumed.state == {} and resumed.verdict.state == "healthy"


def test_a_fall_that_comes_to_rest_is_a_warning_alone():
    # down to 40 % and no further
    found = judged([0.4 + 0.6 * math.exp(-i / 100) for i in range(800)])
    assert {verdict.state for _, verdict in found} == {"healthy", "warning"}
    assert found[-1][1].causes == ("the entropy is at 41 % of its start",)  # whose first five steps lie below 1


def test_an_explosion():
    found = judged([1.0] * 20 + [1.0 + 0.05 * i for i in range(100)])
    assert found[-1][1].state == "exploding" and "times its start and rises" in found[-1][1].causes[0]
    # high but falling is no explosion
    assert judged([1.0] * 20 + [3.0 - 0.01 * i for i in range(100)])[-1][1].state == "healthy"


@pytest.mark.parametrize(
    ("name", "values", "cause"),
    [
        ("flow/distinct", [0.9] * 10 + [0.4] * 40, "0.41 of the responses in a group differ, 0.9 at the start"),
        ("information_force/rho", [0.2] * 10 + [0.01] * 40, "0.013 of its bound has the force, 0.2 at the start"),
        ("clip_ratio/region_mean", [0.0] * 10 + [0.31] * 40, "31 % of the tokens are clipped"),
        ("entropy_flow/predicted_change", [-0.01] * 50, "-1.0e-02 nats a step, under 20 % of the start in 120 steps"),
    ],
)
def test_other_signs_warn(name: str, values: list[float], cause: str):
    found = judged([1.0] * 50, **{name: values})
    assert found[-1][1].state == "warning" and any(cause in told for told in found[-1][1].causes)
    assert judged([1.0] * 50, **{name: [values[0] if name.endswith(("distinct", "rho")) else 0.0] * 50})[-1][
        1
    ].state == ("healthy")


def test_entries_without_an_entropy_or_seen_before_change_nothing():
    detector = CollapseDetector()
    _, state = detector.update({"entropy": 1.0}, 1, {})
    for entry in ({}, {"entropy": "nan"}, {"entropy": None}, {"entropy": math.inf}):
        assert detector.update(entry, 2, state)[1] == state
    assert detector.update({"entropy": 5.0}, 1, state)[1] == state
    assert json.loads(json.dumps(state)) == state


def test_logged_text_is_read():
    assert judged(["1.0"] * 30)[-1][1].state == "healthy"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"collapsed": 0.4}, "0 < collapsed < collapsing_below"),
        ({"exploding_above": 0.9}, "exploding_above must hold"),
        ({"horizon": 0}, "horizon must be at least 1 optimiser step, got 0"),
        ({"most_clipped": 2.0}, r"most_clipped must be in \[0, 1\], got 2.0"),
    ],
)
def test_refusals(settings: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        CollapseDetector(**settings)


def run_coefficient(coefficient: OnCollapse, entropies: list[float]) -> list[float]:
    state, values = coefficient.initial_state(), []
    for entropy in entropies:
        values.append(coefficient.value(0.5, state))
        state = coefficient.update(entropy, state)
    assert json.loads(json.dumps(state)) == state
    return values


def test_the_switch_has_hysteresis():
    # falls to 40 %, stays, recovers to 60 % (above the warning at 50 %, below `until`), then to 90 %
    levels = [1.0] * 30 + [0.4] * 60 + [0.6] * 60 + [0.9] * 60
    values = run_coefficient(OnCollapse(active=0.1, idle=0.0, until=0.7), levels)
    assert set(values[:30]) == {0.0}
    first = values.index(0.1)
    assert 30 < first < 60
    assert set(values[first:150]) == {0.1}, "no flutter between the thresholds"
    last = len(values) - values[::-1].index(0.1)
    assert 150 < last < 190 and set(values[last:]) == {0.0}


def test_an_explosion_switches_off():
    values = run_coefficient(OnCollapse(active=0.1), [1.0] * 20 + [0.3] * 30 + [0.35 * 1.1**i for i in range(40)])
    assert 0.1 in values and values[-1] == 0.0


def test_it_waits_for_collapsing_where_asked():
    levels = [0.4 + 0.6 * math.exp(-i / 100) for i in range(400)]
    assert 0.1 in run_coefficient(OnCollapse(active=0.1), levels)
    assert 0.1 not in run_coefficient(OnCollapse(active=0.1, since="collapsing"), levels)


def test_from_a_recipe():
    found = coefficient_from({"kind": "on_collapse", "active": 0.1, "detector": {"warning_below": 0.6}})
    assert isinstance(found, OnCollapse) and not found.needs_entropy
    for spec, sentence in (
        ({"kind": "on_collapse", "active": 0.1, "until": 0.5}, "until must be above the detector's warning_below, 0.5"),
        ({"kind": "on_collapse", "active": 0.1, "since": "later"}, 'since must be "warning" or "collapsing"'),
        ({"kind": "on_collapse", "active": 0.1, "detector": {"warn": 1}}, "detector of on_collapse"),
    ):
        with pytest.raises(ValueError, match=sentence):
            coefficient_from(spec)


def test_the_callback_logs_warns_and_stops(policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    watch = CollapseCallback(CollapseDetector(exploding_above=1.01, memory=1), action="stop")
    falling = CollapseDetector.update

    def fallen(self, logs, step, state):
        return falling(self, {**logs, "entropy": math.exp(-0.5 * step)}, step, state)

    trainer = make(policy, tmp_path, trainer={"callbacks": [watch]}, max_steps=12, logging_steps=1)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, logger="hclm_rl.watch.collapse"):
        patch.setattr(CollapseDetector, "update", fallen)
        trainer.train()
    states = [entry["collapse/state"] for entry in trainer.state.log_history if "collapse/state" in entry]
    assert states[0] == 0 and states[-1] == 2 and trainer.state.global_step < 12
    assert any("collapsing: the entropy is at" in record.getMessage() for record in caplog.records)
    with pytest.raises(ValueError, match='action must be "warn" or "stop"'):
        CollapseCallback(action="pause")  # type: ignore[arg-type]
