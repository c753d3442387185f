"""What of a chain undoes what, in one sentence each; and a chain of friends says nothing."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from hclm_rl import Term, build_chain
from hclm_rl.recipe.conflicts import conflicts
from hclm_rl.types import Direction

from ..tiny import make

CONTROL = {"kind": "step_to_target", "target": 0.3}


@dataclass(frozen=True, kw_only=True)
class Stranger(Term):
    """A user's own term, which says what it does."""

    seeks: ClassVar[Direction | None] = "less"
    centres: ClassVar[bool] = True


def said(*entries: object) -> list[str]:
    return conflicts(build_chain(list(entries)))


FIGHT = "they work against each other; keep one of the two"


@pytest.mark.parametrize(
    "entries, sentence",
    [
        (("empg", "clip_cov"), f"'empg' lowers the entropy of the policy and 'clip_cov' raises it: {FIGHT}"),
        (("entropy_bonus", "empg"), f"'empg' lowers the entropy of the policy and 'entropy_bonus' raises it: {FIGHT}"),
        (("epo", "pear"), f"'pear' lowers the entropy of the policy and 'epo' raises it: {FIGHT}"),
        ((Stranger(), "kl_cov"), f"'Stranger' lowers the entropy of the policy and 'kl_cov' raises it: {FIGHT}"),
        (
            ("em_rl", "entro_pic"),
            f"'em_rl' lowers the entropy of the policy and 'entro_pic' holds it at a level: {FIGHT}",
        ),
        (
            ("em_rl", {"entropy_bonus": {"coef": CONTROL}}),
            f"'em_rl' lowers the entropy of the policy and 'entropy_bonus' holds it at a level: {FIGHT}",
        ),
        (  # a controller on a term that has no direction of its own
            ("em_rl", {"steer": {"coef": CONTROL}}),
            f"'em_rl' lowers the entropy of the policy and 'steer' holds it at a level: {FIGHT}",
        ),
        (
            ("clip_cov", {"entropy_bonus": {"coef": -0.01, "name": "malus"}}),
            f"'malus' lowers the entropy of the policy and 'clip_cov' raises it: {FIGHT}",
        ),
        (
            ({"entropy_bonus": {"coef": CONTROL}}, {"clip_cov": {"coef": CONTROL}}),
            "'entropy_bonus', 'clip_cov' each control the entropy: every one answers what the others did, so they "
            "swing or drive each other to their bounds; keep one controller and give the others a number as coef",
        ),
        (
            ("entro_pic", {"entropy_bonus": {"coef": CONTROL}}),
            "'entro_pic', 'entropy_bonus' each control the entropy: every one answers what the others did, so they "
            "swing or drive each other to their bounds; keep one controller and give the others a number as coef",
        ),
        (
            ({"pear": {"coef": CONTROL}},),
            "the coefficient of 'pear' grows while the entropy is below its target, and the term lowers the entropy: "
            "the two drive it to nothing; give the term a number or a schedule as coef",
        ),
        (
            ("qae", "empg"),
            "'empg' centres the advantages again, which undoes the baseline that 'qae' set; keep one of the two",
        ),
        (
            ("qae", "steer", Stranger()),
            "'Stranger' centres the advantages again, which undoes the baseline that 'qae' set; keep one of the two",
        ),
        (
            ("empg", "qae"),
            "'qae' makes the advantages anew from the rewards, which undoes 'empg' before it; keep one of the two",
        ),
        (
            ("canon", "empg"),
            "'empg' centres the advantages again, which undoes the baseline that 'canon' set; keep one of the two",
        ),
        (("empo", "arm"), f"'empo' lowers the entropy of the policy and 'arm' raises it: {FIGHT}"),
        (
            ("empg", "entropy_balanced"),
            f"'empg' lowers the entropy of the policy and 'entropy_balanced' raises it: {FIGHT}",
        ),
        (
            ("force_reweight", {"entropy_bonus": {"coef": CONTROL}}),
            "'force_reweight', 'entropy_bonus' each control the entropy: every one answers what the others did, so "
            "they swing or drive each other to their bounds; keep one controller and give the others a number as coef",
        ),
        (
            ("qae", {"qae": {"name": "again"}}),
            "'again' makes the advantages anew from the rewards, which undoes 'qae' before it; keep one of the two",
        ),
    ],
)
def test_a_conflict_is_one_sentence(entries, sentence):
    assert said(*entries) == [sentence]


@pytest.mark.parametrize(
    "entries",
    [
        (),
        ("clip_cov", "kl_cov", "entropy_bonus", "epo", "qae", "steer", "log_det", "information_force"),
        ("empg", "entropy_advantage"),  # of one mind
        ("empg", {"entropy_advantage": {"form": "clip"}}, {"clip_cov": {"coef": 0.0}}),  # coef 0 is absence
        ({"perplexity_advantage": {"favours": "high"}}, "entropy_bonus"),
        ({"entropy_bonus": {"coef": {"kind": "linear", "start": 0.1, "end": 0.0}}}, "entro_pic"),  # a schedule is none
        ({"entropy_bonus": {"coef": CONTROL}}, "clip_cov"),
        ({"information_force": {"coef": CONTROL}}, "entro_pic"),  # a diagnostic changes nothing
    ],
)
def test_friends(entries):
    assert said(*entries) == []


def test_all_conflicts_are_said():
    # the two controllers, and pear against each of the other two
    assert len(said("pear", {"entropy_bonus": {"coef": CONTROL}}, {"clip_cov": {"coef": CONTROL}})) == 3


def test_the_trainer_says_it_once_before_training(policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        trainer = make(policy, tmp_path, terms=["pear", "entropy_bonus"])
        assert caplog.text.count("'pear' lowers the entropy of the policy and 'entropy_bonus' raises it") == 1
        trainer.train()
    assert caplog.text.count("they work against each other") == 1


def test_entropy_as_the_reward_undoes_a_baseline_before_it():
    assert len(conflicts(build_chain(["canon", "em_rl"]))) >= 1
    assert any("makes the advantages anew" in said for said in conflicts(build_chain(["canon", "em_rl"])))
