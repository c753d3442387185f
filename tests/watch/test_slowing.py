"""Whether a fall that slows down goes on: by hand, and on curves without noise."""

import math

import pytest

from hclm_rl.watch.collapse import CollapseDetector
from hclm_rl.watch.slowing import goes_on


def state_of(spacing: float) -> dict:
    """Eight entries up to time 100 of a fall by 1 % a unit of time, .3 above the logarithm of .2 at the end."""
    times = [100.0 - spacing * i for i in range(7, -1, -1)]
    values = [0.2 * math.exp(0.3 + 0.01 * (100 - time)) for time in times]
    return {"now": 100.0, "reference": 1.0, "time": [times], "entropy": [values]}


def test_the_pace_of_the_latest_part_by_hand():
    # .3 at .01 a unit: 30 units, of a fall that takes 100
    assert goes_on(0.2, 0.301, state_of(3.0)) and not goes_on(0.2, 0.299, state_of(3.0))
    # eight entries over 21 units lie in the last quarter, over 28 they do not
    assert not goes_on(0.2, 0.301, state_of(4.0))
    assert goes_on(0.3, 0.01, state_of(3.0)), "it is there already"


def test_what_rises_goes_nowhere():
    state = state_of(3.0)
    state["entropy"] = [list(reversed(state["entropy"][0]))]
    assert not goes_on(0.2, 100.0, state)


@pytest.mark.parametrize(("exponent", "tau"), [(1.0, 50.0), (0.7, 50.0)])
def test_a_power_law_is_seen_and_an_approach_to_a_level_above_is_not(exponent: float, tau: float):
    end = tau * (5 ** (1 / exponent) - 1)
    log = [{"step": t, "entropy": (1 + t / tau) ** -exponent} for t in range(1, int(end))]
    alarms = [step for step, verdict in CollapseDetector().judge(log) if verdict.is_alarm]
    assert alarms and alarms[0] < 0.9 * end
    calm = [{"step": t, "entropy": 0.22 + 0.78 * math.exp(-t / tau)} for t in range(1, 1000)]
    assert not any(verdict.is_alarm for _, verdict in CollapseDetector().judge(calm))
