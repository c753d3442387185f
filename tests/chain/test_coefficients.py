import json
import math
from dataclasses import FrozenInstanceError

import pytest
import yaml

from hclm_rl.chain.coefficients import (
    Aer,
    Coefficient,
    Constant,
    Cosine,
    Linear,
    ProportionalIntegral,
    StepToTarget,
    coefficient_from,
)

MEASURED = [0.50, 0.22, 0.15, 0.12, 0.20, 0.30, 0.18]  # nats; the worked example of the method card


@pytest.fixture
def annotations_unchecked(request):
    if "hclm_rl" in request.config.getoption("jaxtyping_packages").split(","):
        pytest.skip("with every module checked, the annotation refuses the wrong type before our code sees it")


def run(controller, entropies):
    """Applied coefficient and state after each step; the state passes through JSON, as in a checkpoint."""
    state, applied, after = controller.initial_state(), [], []
    for entropy in entropies:
        applied.append(controller.value(0.5, state, entropy))
        state = json.loads(json.dumps(controller.update(entropy, state)))
        after.append(state["coefficient"])
    return applied, after


def test_trl_rule_of_the_card():
    applied, after = run(StepToTarget(target=0.2), MEASURED)
    assert applied == pytest.approx([0, 0, 0, 0.005, 0.010, 0.015, 0])
    assert after == pytest.approx([0, 0, 0.005, 0.010, 0.015, 0.010, 0.015])


def test_trl_rule_needs_no_entropy_of_its_own_step():
    controller = StepToTarget(target=0.2, start=0.01)
    assert controller.value(0.0, controller.initial_state()) == 0.0  # h_last = +inf: no bonus at first
    assert controller.value(0.0, controller.update(0.2, controller.initial_state())) == pytest.approx(0.015)
    assert not controller.needs_entropy


def test_paper_rule_of_the_card():
    applied, after = run(StepToTarget(target=0.2, rule="paper"), MEASURED)
    assert applied == pytest.approx([0, 0, 0, 0.005, 0.010, 0, 0.005])
    assert after == pytest.approx([0, 0, 0.005, 0.010, 0.010, 0.005, 0.010])


def test_paper_rule_without_the_entropy_says_so():
    controller = StepToTarget(target=0.2, rule="paper")
    assert controller.needs_entropy
    with pytest.raises(ValueError, match='entropy at sampling time, or choose rule="trl"'):
        controller.value(0.0, controller.initial_state())


def test_skyworks_code():
    # on the card's entropies: the flag of the step before gates, and an entropy at the target (0.20) lowers c
    applied, after = run(StepToTarget(target=0.2, rule="skywork"), MEASURED)
    assert after == pytest.approx([0, 0, 0.005, 0.010, 0.005, 0, 0.005])
    assert applied == pytest.approx([0, 0, 0, 0.005, 0.010, 0, 0])
    # the flag is on at first, and the bounds of the authors' scripts hold
    controller = StepToTarget(target=0.2, delta=0.003, start=0.001, maximum=0.005, rule="skywork")
    assert not controller.needs_entropy
    assert run(controller, [0.1, 0.1, 0.1]) == (
        pytest.approx([0.001, 0.004, 0.005]),
        pytest.approx([0.004, 0.005, 0.005]),
    )


@pytest.mark.parametrize("rule", ["trl", "paper", "skywork"])
def test_bounds_hold(rule):
    controller = StepToTarget(target=0.2, delta=0.004, start=0.003, minimum=0.001, maximum=0.005, rule=rule)
    assert run(controller, [0.1, 0.1, 0.3, 0.3, 0.3])[1] == pytest.approx([0.005, 0.005, 0.001, 0.001, 0.001])


def test_state_is_a_new_dict_and_infinity_survives_json():
    controller = StepToTarget(target=0.2)
    state = controller.initial_state()
    assert state == {"coefficient": 0.0, "last_entropy": math.inf} == json.loads(json.dumps(state))
    controller.update(0.1, state)
    assert state == {"coefficient": 0.0, "last_entropy": math.inf}


def controlled(controller, entropies):
    """Applied coefficient in each step and the integral before it; the state passes through JSON."""
    state, applied, before = controller.initial_state(), [], []
    for entropy in entropies:
        before.append(state["integral"])
        applied.append(controller.value(0.5, state, entropy))
        state = json.loads(json.dumps(controller.update(entropy, state)))
    return applied, before


ALPHA = [0.2, -0.018, -0.0482, 1.0]  # the method card's worked example; the last is clipped from 1.4013


@pytest.mark.parametrize("anti_windup", [True, False])
def test_proportional_integral_of_the_card(anti_windup):
    measured = [0.30, 0.08, 0.05, 1.5]
    same_step = ProportionalIntegral(rule="same_step", anti_windup=anti_windup)
    applied, before = controlled(same_step, measured)
    assert applied == pytest.approx(ALPHA) and before == pytest.approx([0, 0.2, 0.18, 0.13])
    # one step of lag: the same coefficients, each in the next step, and none in the first
    lagged = ProportionalIntegral(anti_windup=anti_windup)
    assert controlled(lagged, [*measured, 0.1])[0] == pytest.approx([0.0, *ALPHA])
    assert not lagged.needs_entropy and lagged.value(0.0, lagged.initial_state()) == 0.0


def test_the_same_step_needs_its_entropy():
    controller = ProportionalIntegral(rule="same_step")
    assert controller.needs_entropy
    with pytest.raises(ValueError, match='entropy at sampling time, or choose rule="lagged"'):
        controller.value(0.0, controller.initial_state())


def test_what_a_long_phase_above_the_target_leaves_behind():
    # an error of 1 for 200 steps, then of -0.5: E = 200 is 2 in units of c, so c stays at the upper bound
    phases = [1.1] * 200 + [-0.4]
    applied, before = controlled(ProportionalIntegral(rule="same_step", anti_windup=False), phases)
    assert before[-1] == pytest.approx(200) and applied[-1] == 1.0
    # held at |k_i E| <= 1: E = 100, and c = 1 - 0.5
    applied, before = controlled(ProportionalIntegral(rule="same_step"), phases)
    assert before[-1] == pytest.approx(100) and applied[-1] == pytest.approx(0.5)


def test_anti_windup_stops_the_integral_where_its_share_meets_the_bound():
    held = ProportionalIntegral(target=1.0, k_p=0.1, k_i=0.5, rule="lagged")
    # an error of 4: k_i E would be 2, so E stops at 1 / 0.5; the coefficient has the E before it: 0.1 * 4
    assert held.update(5.0, held.initial_state()) == {"integral": 2.0, "coefficient": pytest.approx(0.4)}
    # an error of -1: E = 2 - 1, and the coefficient 0.5 * 2 - 0.1
    assert held.update(0.0, {"integral": 2.0, "coefficient": 0.0}) == {
        "integral": 1.0,
        "coefficient": pytest.approx(0.9),
    }


def test_negative_gains_are_for_a_bonus():
    controller = ProportionalIntegral(target=0.3, k_p=-0.2, k_i=-0.1, minimum=0.0, maximum=0.1, rule="same_step")
    # e = -0.2, -0.2, 0.7, -0.2. E before: 0, -0.2, -0.4, then 0.3, held at 0, where c's integral part is at its bound
    # 0: c = 0.04, 0.02 + 0.04, 0.04 - 0.14 below 0, and 0.04 again
    applied, before = controlled(controller, [0.1, 0.1, 1.0, 0.1])
    assert applied == pytest.approx([0.04, 0.06, 0.0, 0.04]) and before == pytest.approx([0, -0.2, -0.4, 0])


def test_without_an_integral_gain_the_integral_is_not_bounded_by_it():
    controller = ProportionalIntegral(k_i=0.0, rule="same_step")
    assert controlled(controller, [0.3, 0.2])[0] == pytest.approx([0.2, 0.1])


def test_linear():
    line = Linear(start=1.0, end=0.0)
    assert [line.value(p, {}) for p in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    # warm-up over a fifth: half way up at 0.1, on top at 0.2, half way down at 0.6
    warm = Linear(start=1.0, end=0.0, warmup=0.2)
    assert [warm.value(p, {}) for p in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_cosine():
    wave = Cosine(start=2.0, end=1.0)
    # a third of the way: 1 - cos(60 deg) = 1/2, half of that is 1/4
    assert [wave.value(p, {}) for p in (0.0, 1 / 3, 0.5, 1.0)] == pytest.approx([2.0, 1.75, 1.5, 1.0])
    assert Cosine(start=2.0, end=1.0, warmup=0.5).value(0.25, {}) == 1.0
    assert Cosine(start=2.0, end=1.0, warmup=0.5).value(0.75, {}) == pytest.approx(1.5)


def test_a_constant_stays():
    c = Constant(coefficient=0.3)
    assert c.value(0.0, {}) == c.value(1.0, {}) == 0.3
    assert c.initial_state() == c.update(0.1, {}) == {}
    with pytest.raises(FrozenInstanceError):
        c.coefficient = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Constant(coefficient="1e-6"), "got the string '1e-6': PyYAML reads 1e-6 as a string and 1.0e-6"),
        (lambda: Constant(coefficient=math.nan), "coefficient must be finite, got nan"),
        (lambda: Constant(coefficient=True), "coefficient must be a number, got True"),
        (lambda: Linear(start=1.0, end="0"), "end must be a number, got the string '0'"),
        (lambda: Linear(start=1.0, end=0.0, warmup=1.0), r"warmup must be in \[0, 1\), got 1.0"),
        (lambda: StepToTarget(target="2e-1"), "target must be a number, got the string '2e-1'"),
        (lambda: StepToTarget(target=math.inf), "target must be finite"),
        (lambda: StepToTarget(target=0.2, delta=-0.1), "delta must not be negative, got -0.1"),
        (lambda: StepToTarget(target=0.2, start=2.0), "minimum <= start <= maximum must hold, got .* start 2.0"),
        (lambda: StepToTarget(target=0.2, rule="dapo"), 'rule must be "trl", "paper" or "skywork", got \'dapo\''),
        (lambda: ProportionalIntegral(target="1e-1"), "target must be a number, got the string '1e-1'"),
        (lambda: ProportionalIntegral(target=-1), "target must not be negative, got -1.0; for no control give a numb"),
        (lambda: ProportionalIntegral(k_p=-1), "k_p and k_i must have the same sign, got -1.0 and 0.01"),
        (lambda: ProportionalIntegral(minimum=0.1), "minimum <= 0 <= maximum must hold, got 0.1 and 1.0"),
        (lambda: ProportionalIntegral(rule="pid"), 'rule must be "lagged" or "same_step", got \'pid\''),
    ],
)
@pytest.mark.usefixtures("annotations_unchecked")
def test_errors_at_the_door(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_coefficient_from_a_recipe():
    assert coefficient_from(0.5) == Constant(coefficient=0.5)
    assert coefficient_from(1) == Constant(coefficient=1.0)
    assert coefficient_from({"kind": "linear", "start": 1.0, "end": 0.0}) == Linear(start=1.0, end=0.0)
    assert coefficient_from({"kind": "step_to_target", "target": 0.2, "rule": "paper"}) == StepToTarget(
        target=0.2, rule="paper"
    )
    assert coefficient_from({"kind": "proportional_integral", "target": 0.3}) == ProportionalIntegral(target=0.3)
    given = Cosine(start=1.0, end=0.0)
    assert coefficient_from(given) is given


@pytest.mark.usefixtures("annotations_unchecked")
def test_whole_numbers_are_stored_as_floats():
    assert isinstance(Linear(start=1, end=0).start, float)


def test_what_pyyaml_makes_of_a_small_number_is_refused_with_the_hint():
    assert coefficient_from(yaml.safe_load("coef: 1.0e-6")["coef"]) == Constant(coefficient=1e-6)
    with pytest.raises(ValueError, match=r"coef must be a number, got the string .* 1\.0e-6 as a number"):
        coefficient_from(yaml.safe_load("coef: 1e-6")["coef"])


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"kind": "step_target", "target": 0.2}, "got 'step_target'; known: step_to_target, "),
        ({"kind": "cosin", "start": 1}, "known: cosine, "),
        ({"start": 1}, "coef needs a known kind, got None"),
        ({"kind": ["linear"]}, "coef needs a known kind"),
        ({"kind": "linear", "begin": 1, "end": 0}, "a linear coef has no 'begin'; it has: "),
        ({"kind": "step_to_target", "target": 0.2, "max": 1.0}, "has no 'max'; it has: max"),
        ({"kind": "linear", "start": 1}, "a linear coef needs end"),
        (None, "coef must be a number, got None"),
    ],
)
def test_recipes_that_are_refused(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        coefficient_from(spec)


def test_anything_with_the_methods_is_a_coefficient():
    class Mine:
        needs_entropy = False

        def initial_state(self):
            return {}

        def value(self, progress, state, entropy=None):
            return 0.1

        def update(self, entropy, state):
            return {}

    mine = Mine()
    assert isinstance(mine, Coefficient) and coefficient_from(mine) is mine


def test_aer_of_the_card():
    applied, after = run(Aer(), [1.0, 0.5, 0.3, 0.2])
    # the target is 0.4: 0 stays where it would fall; then 0.005 * 0.1 and 0.005 * 0.2
    assert after == pytest.approx([0, 0, 0.0005, 0.0015])
    assert applied == pytest.approx([0, 0, 0, 0.0005])


def test_aer_stays_within_its_bounds_and_remembers_the_first_step():
    _, after = run(Aer(eta=1.0, maximum=0.3, start=0.1), [1.0, 0.0, 0.0, 2.0])
    assert after == pytest.approx([0, 0.3, 0.3, 0])  # 0.1 - 0.6; 0.4; 0.7; 0.3 - 1.6


def test_aer_as_a_recipe_writes_it():
    assert coefficient_from({"kind": "aer", "tau": 0.5}) == Aer(tau=0.5)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"tau": 1.2}, r"tau is a share of the first step's entropy, in \(0, 1\), got 1.2"),
        ({"eta": 0}, "eta must be positive, got 0.0; for no control give a number as coef"),
        ({"start": 0.1}, "0 <= start <= maximum must hold, got start 0.1 and maximum 0.02"),
        ({"eta": "1e-3"}, "eta must be a number, got the string '1e-3'"),
        ({"target": 0.4}, "a aer coef has no 'target'; it has: "),
    ],
)
def test_aer_refuses(given: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        coefficient_from({"kind": "aer", **given})
