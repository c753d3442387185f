import json
import logging
import math
import random
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from hclm_rl.chain.coefficients import OnCollapse, coefficient_from
from hclm_rl.watch.callback import CollapseCallback
from hclm_rl.watch.collapse import STATES, CollapseDetector

from ..tiny import make


def judged(entropies, detector: CollapseDetector | None = None, **more):
    entries = [
        {"step": i + 1, "entropy": entropy, **{name: of[i] for name, of in more.items()}}
        for i, entropy in enumerate(entropies)
    ]
    return (detector or CollapseDetector()).judge(entries)


def exponential(rate: float, steps: int, start: float = 1.0) -> list[float]:
    return [start * math.exp(-rate * i) for i in range(steps)]


def test_a_steady_run_is_healthy():
    found = judged([1.0 + 0.05 * (-1) ** i for i in range(200)])
    assert {verdict.state for _, verdict in found} == {"healthy"} and found[-1][1].causes == ()


def test_a_fast_fall_is_seen_before_it_is_over():
    # e^(-0.02 t): a fifth of the start at t = ln 5 / 0.02 = 80
    found = judged(exponential(0.02, 120))
    first = next(step for step, verdict in found if verdict.state == "collapsing")
    assert first <= 61
    verdict = found[first - 1][1]
    assert "at its pace collapsed in" in verdict.causes[0] and verdict.number == 2 and not verdict.ends
    assert found[-1][1].state == "collapsed" and found[-1][1].number == 4 and found[-1][1].ends


def test_the_reference_is_the_highest_level_after_the_warm_up():
    # twice as high for five steps, then 0.5, then a slow rise to 0.6, then down; without noise all errors are those of
    # the four differences of 10 % that the noise starts with, and the one of a half between steps 5 and 6 is not seen
    entropies = [1.0] * 5 + [0.5] * 100 + [0.5 + 0.001 * i for i in range(100)] + [0.55] * 50
    detector, state = CollapseDetector(), {}
    for step, entropy in enumerate(entropies, start=1):
        _, state = detector.update({"entropy": entropy}, step, state)
    assert 0.59 < state["reference"] < 0.6


def test_all_that_was_seen_is_in_steps_however_seldom_it_is_logged():
    # e^(-t / 200) logged at every step, and as the means of ten: half is reached after 139 steps, a fifth after 322
    said = {}
    for every in (1, 10):
        entropies = exponential(1 / 200, 320)
        entries = [
            {"step": i + every, "entropy": sum(entropies[i : i + every]) / every}
            for i in range(0, len(entropies), every)
        ]
        found = CollapseDetector().judge(entries)
        said[every] = next(step for step, verdict in found if verdict.state == "collapsing")
    assert 200 < said[1] < 245 and said[1] - 20 <= said[10] < 260


def test_a_resumed_run_remembers_its_start():
    log = [{"step": i + 1, "entropy": entropy} for i, entropy in enumerate(exponential(1 / 80, 126))]
    whole, resumed = CollapseCallback(), CollapseCallback()
    state = TrainerState(log_history=[], global_step=0)
    whole.on_train_begin(None, state, None)
    for entry in log:
        state.global_step = entry["step"]
        state.log_history.append(dict(entry))
        whole.on_log(None, state, TrainerControl(), dict(entry))
    assert whole.verdict.state == "collapsing"
    state = TrainerState(log_history=log[:115], global_step=115)
    resumed.on_train_begin(None, state, None)
    assert resumed.verdict.state == "collapsing"
    for entry in log[115:]:
        state.global_step = entry["step"]
        resumed.on_log(None, state, TrainerControl(), dict(entry))
    assert resumed.curve == whole.curve and resumed.verdict == whole.verdict
    resumed.on_train_begin(None, TrainerState(log_history=[], global_step=0), None)  # a run of its own
    assert resumed.curve == {} and resumed.verdict.state == "healthy"


def test_a_fall_that_comes_to_rest_is_a_warning_alone():
    # down to 40 % and no further
    found = judged([0.4 + 0.6 * math.exp(-i / 100) for i in range(800)])
    assert {verdict.state for _, verdict in found} == {"healthy", "warning"}
    # the first steps lie below 1: 0.4 + 0.6 e^(-t / 100) is 0.95 at the ninth
    assert found[-1][1].causes == ("the entropy is 0.4 nats, 43 % of its reference",)


@pytest.mark.parametrize(
    ("state", "under", "between", "above"), [("warning", 0.45, 0.53, 0.6), ("collapsed", 0.1, 0.25, 0.4)]
)
def test_a_state_is_left_above_the_bound_at_which_it_is_entered(state: str, under: float, between: float, above: float):
    # a warning is entered at half of the reference and left at .55, collapsed at a fifth and left at .3
    def last(*levels: float) -> str:
        return judged([level for level in (1.0, *levels) for _ in range(100)])[-1][1].state

    assert last(under) == state and last(under, between) == state
    assert last(between) != state and last(under, between, above) != state


def test_an_explosion():
    found = judged([1.0] * 20 + [1.0 + 0.05 * i for i in range(100)])
    assert found[-1][1].state == "exploding" and "times its start and rises" in found[-1][1].causes[0]
    # high but falling is no explosion
    assert judged([1.0] * 20 + [3.0 - 0.01 * i for i in range(100)])[-1][1].state == "healthy"


@pytest.mark.parametrize(
    ("name", "values", "calm", "sign"),
    [
        ("flow/distinct", [0.9] * 10 + [0.4] * 40, 0.9, "0.41 of the responses in a group differ, 0.9 at the start"),
        ("force/live", [0.9] * 10 + [0.4] * 40, 0.9, "41 % of the directions have a variance to speak of, 90 at first"),
        ("clip_ratio/region_mean", [0.0] * 10 + [0.31] * 40, 0.3, "31 % of the tokens are clipped"),
        ("completions/clipped_ratio", [0.0] * 10 + [0.6] * 40, 0.5, "60 % of the responses are cut off"),
        ("kl", [0.0] * 10 + [2.5] * 40, 1.0, "kl: 2.5 nats, 2.5 times the entropy"),
        ("eval_pass@8", [0.7] * 10 + [0.6] * 40, 0.7, "eval_pass@8: 0.6, 0.7 at first"),
        # 1 nat and a reference of 1: (1 - 0.2) / 0.01
        ("entropy_flow/predicted_change", [-0.01] * 50, 0.0, "-1.0e-02 nats a step, which is a collapse in"),
    ],
)
def test_other_signs_stand_beside_the_state_and_do_not_change_it(name: str, values: list, calm: float, sign: str):
    found = judged([1.0] * 50, **{name: values})
    assert any(sign in told for told in found[-1][1].signs), found[-1][1].signs
    assert judged([1.0] * 50, **{name: [calm] * 50})[-1][1].signs == ()
    falling = exponential(1 / 30, 50)
    with_it, without = judged(falling, **{name: values}), judged(falling)
    assert [(verdict.state, verdict.causes) for _, verdict in with_it] == [(v.state, v.causes) for _, v in without]
    assert {verdict.state for _, verdict in found} == {"healthy"}


def test_the_reward_moves_the_patience_a_little():
    falling = exponential(1 / 200, 320)

    def first(**more) -> int:
        return next(step for step, verdict in judged(falling, **more) if verdict.state == "collapsing")

    rises, falls = [0.001 * i for i in range(320)], [-0.001 * i for i in range(320)]
    assert first(reward=falls) < first() <= first(reward=rises) < 322


def test_time_is_learning_rate_times_steps():
    # in r x t the same decay; a rate of 0 takes it nowhere
    falling = exponential(1 / 200, 300)
    assert judged(falling, learning_rate=[1e-6] * 300) == judged(falling)
    stopped = judged([*falling[:200], *[falling[200]] * 100], learning_rate=[1e-6] * 200 + [0.0] * 100)
    assert "collapsing" not in {verdict.state for _, verdict in stopped}


def test_a_fall_that_the_end_of_the_run_stops_is_no_collapse():
    # e^(-t / 200) is a fifth of its reference near step 330, and the run ends at 300
    assert "collapsing" in {verdict.state for _, verdict in judged(exponential(1 / 200, 300))}
    ends = judged(exponential(1 / 200, 300), max_steps=[300] * 300)
    assert "collapsing" not in {verdict.state for _, verdict in ends}
    for unknown in (0, -1):
        of = judged(exponential(1 / 200, 300), max_steps=[unknown] * 300)
        assert "collapsing" in {verdict.state for _, verdict in of}


def test_collapsed_from_the_start():
    rng = random.Random(1)
    found = judged([0.02 * (1 + rng.gauss(0, 0.1)) for _ in range(60)])
    assert found[-1][1].state == "collapsed" and "the entropy is 0.02 nats" in found[-1][1].causes[0]


def test_first_entropies_of_zero():
    """Every response cut off and masked: no token counts."""
    found = judged([0.0] * 5 + [0.4] * 100)
    assert found[0][1].state == "warning" and "no token counts" in found[0][1].causes[0]
    assert {verdict.state for _, verdict in found[5:]} == {"healthy"}
    assert {verdict.state for _, verdict in judged([0.0] * 50)} == {"warning"}
    assert judged([1.0] * 50 + [0.0] * 50)[-1][1].state == "collapsed"


def test_a_rise_that_has_levelled_off_does_not_rise():
    level = [0.3 + 0.3 * min(i / 100, 1) for i in range(1, 1001)]
    assert {verdict.state for _, verdict in judged(level)} == {"healthy"}
    above = [1.0 + 2.0 * min(i / 100, 1) for i in range(1, 1001)]  # three times the start, in nats that are ample
    rng = random.Random(2)
    found = judged([each * (1 + rng.gauss(0, 0.03)) for each in above])
    assert {verdict.state for step, verdict in found if step < 100} >= {"exploding"}
    assert {verdict.state for step, verdict in found if step > 400} == {"healthy"}


def test_a_state_of_the_first_detector_is_read():
    """A checkpoint of before has a start and sums of a line: the start is the reference."""
    old = {"step": 50, "n": 30.0, "t": -400.0, "s": -20.0, "tt": 9000.0, "ts": 300.0, "seen": 5, "start": 1.0}
    old |= {"level": 0.6, "verdict": 0}
    verdict, state = CollapseDetector().update({"entropy": 0.3}, 51, dict(old))
    assert state["reference"] == 1.0 and verdict.state == "healthy"
    for step in range(52, 100):
        verdict, state = CollapseDetector().update({"entropy": 0.3}, step, state)
    assert verdict.state == "warning" and state["reference"] == 1.0
    coefficient = OnCollapse(active=0.1)
    assert coefficient.value(0.5, coefficient.update(0.3, old | {"is_on": 1.0})) == 0.1


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
        ({"collapsed": 0.6}, "0 < collapsed < warning_below < 1 < exploding_above must hold, got 0.6"),
        ({"exploding_above": 0.9}, "exploding_above must hold"),
        ({"memory": 0}, "memory at least 1 optimiser step, got 5, 0"),
        ({"patience": 0.0}, "patience must be above 0, got 0.0"),
        ({"least_nats": 2.0}, "0 <= least_nats < ample_nats must hold, got 2.0, 1.0"),
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
    watch = CollapseCallback(CollapseDetector(exploding_above=1.01, memory=1, warm_up=0), action="stop")
    falling = CollapseDetector.update

    def fallen(self, logs, step, state):
        return falling(self, {**logs, "entropy": math.exp(-0.5 * step)}, step, state)

    trainer = make(policy, tmp_path, trainer={"callbacks": [watch]}, max_steps=12, logging_steps=1)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, logger="hclm_rl.watch.collapse"):
        patch.setattr(CollapseDetector, "update", fallen)
        trainer.train()
    states = [entry["collapse/state"] for entry in trainer.state.log_history if "collapse/state" in entry]
    assert states[0] == 0 and states[-1] == 4 and trainer.state.global_step < 12
    assert any("the entropy: collapsed; the entropy is" in record.getMessage() for record in caplog.records)
    with pytest.raises(ValueError, match='action must be "warn" or "stop"'):
        CollapseCallback(action="pause")  # type: ignore[arg-type]


def test_no_log_makes_it_raise():
    rng = random.Random(5)
    odd = [0.0, 1e-300, 1e-9, 0.02, 0.5, 3.0, 1e6, math.nan, math.inf, -1.0, None, "0.4", "text", [1.0]]
    for _ in range(150):
        names = ["entropy", "learning_rate", "reward", "max_steps", "kl", "flow/distinct", "eval_pass@4"]
        own = rng.sample(odd, 4)
        log = [{"step": i, **{name: rng.choice(own) for name in names if rng.random() < 0.8}} for i in range(1, 80)]
        found = CollapseDetector(least_nats=0.0, warm_up=rng.choice([0, 5])).judge(log)
        assert all(verdict.state in STATES for _, verdict in found)


def test_a_rate_that_is_logged_late_is_left_aside():
    falling = exponential(1 / 200, 300)
    entries = [
        {"step": i, "entropy": h, **({"learning_rate": 1e-6} if i > 20 else {})} for i, h in enumerate(falling, 1)
    ]
    assert CollapseDetector().judge(entries) == judged(falling)
