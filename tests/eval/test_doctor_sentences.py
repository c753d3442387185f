"""Every sentence of the doctor on twelve recipes, against a measured step; docs/results.md has the table."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))

from doctor import RECIPES, examined, missing, row, sentences

from hclm_rl.commands.diagnosis import Diagnosis, Force
from hclm_rl.commands.trial import Tried

STEPS = {"smollm2": 4}  # as in the table; with eight one of its seven sentences is off (docs/results.md)
MOST_REFUTED = 0.05  # of a recipe's sentences, all on changes: a step that destroys the policy has a third order too


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_sentence_is_what_a_measured_step_does(name: str):
    if why := missing(name):
        pytest.skip(why)
    found = examined(name, STEPS.get(name, 8))
    every = [each for force in found.forces for each in sentences(force)]
    refuted = [each for each in every if not each.is_confirmed]
    assert every and all(each.kind == "change" for each in refuted), refuted
    assert len(refuted) <= MOST_REFUTED * len(every), refuted
    own = [force for force in found.forces if force.is_in_recipe]
    assert len(own) == (0 if name == "entropy_bonus" else 1)
    if name == "log_det_strong":
        assert own[0].regime == "dominant"


def tried(what: str, coef: float, predicted: float, realised: float, bend: float = 0.0) -> Tried:
    return Tried(
        what=what,
        coef=coef,
        predicted=predicted,
        predicted_error=0.01,
        realised=realised,
        realised_error=0.01,
        bend=bend,
        realised_own=realised,
    )


def force(**changes) -> Force:
    own = {
        "surrogate": "log_det", "value": 1.0, "force_norm": 1.0, "rho": 0.5, "live": 1.0, "above_eps": 1.0,
        "drift_budget": None, "drift_noise": None, "push": 1.0, "gradient": 2.0, "gradient_is_told": True,
        "alignment": -0.5, "critical_coef": 0.2, "critical_coef_error": 0.05, "change": 1.0, "change_error": 0.1,
        "change_without": -0.4, "coef": 1.0, "is_in_recipe": True, "regime": "dominant", "reason": "",
        "recommended_coef": 0.2, "recommendation": "",
        "tried": [
            tried("the recipe's", 1.0, 1.0, 0.9, -0.06), tried("without its term", 0.0, -0.4, -0.5, -0.06),
            tried("at the critical coef", 0.2, 0.0, -0.1, -0.06),
        ],
    }  # fmt: skip
    return Force(**{**own, **changes})


def test_sentences_by_hand():
    # changes off by .04, .04 and .04 of 1; rises; falls without; .1 of .5 is left, .04 of .44 of first order, where a
    # quarter may be; 1.4 of its own beside -.5 of the rest
    found = sentences(force())
    assert [each.kind for each in found] == ["change"] * 3 + ["sign", "sign", "critical", "regime"]
    assert all(each.is_confirmed for each in found)
    # a change of the other sign, a wrong way, all left over, a term that pulls
    wrong = [
        tried("the recipe's", 1.0, 1.0, -0.9), tried("without its term", 0.0, -0.4, 0.5),
        tried("at the critical coef", 0.2, 0.0, 0.5),
    ]  # fmt: skip
    assert not any(each.is_confirmed for each in sentences(force(tried=wrong)))
    # of first order more is left than two errors of the coefficient allow: .2 of .4, with an error of a tenth
    sure = force(
        critical_coef_error=0.02, tried=[*force().tried[:2], tried("at the critical coef", 0.2, 0.2, 0.14, -0.06)]
    )
    [critical] = [each for each in sentences(sure) if each.kind == "critical"]
    assert not critical.is_confirmed and critical.said.endswith(
        "28 % of the plain step's change is left, 45 % of its first order, ± 10 %"
    )
    # a coefficient that is not told claims nothing, nor is one tried
    quiet = force(critical_coef_error=0.2, change=0.1, tried=force().tried[:2])
    assert [each.kind for each in sentences(quiet)] == ["change", "change", "regime"]


def test_a_row_of_the_table():
    told = row("log_det", Diagnosis(recipe="r", forces=[force()]))
    # of .96: off by .04, .04 and .04, bent by .06 each
    assert told == "| log_det | dominant | 1 / 0.9 | -0.4 / -0.5 | 4 % (4 %) | 6 % (6 %) | 20 % (9 ± 25) | 7 of 7 |"
