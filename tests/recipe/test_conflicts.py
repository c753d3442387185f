"""What of a chain undoes what, in one sentence each; and a chain of friends says nothing."""

import ast
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from transformers import AutoModelForCausalLM

import hclm_rl
from hclm_rl import Term, build_chain, known_terms
from hclm_rl.recipe.conflicts import conflicts
from hclm_rl.types import Direction

from ..tiny import make

CONTROL = {"kind": "step_to_target", "target": 0.3}


@dataclass(frozen=True, kw_only=True)
class Stranger(Term):
    """A user's own term, which says what it does."""

    seeks: ClassVar[Direction | None] = "less"
    centres: ClassVar[bool] = True


IN_STAGE_ONE = {"exploration_advantage": {"at": "sampling"}}  # forms that act there, where the default does not


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
            ("focal", "passk_advantage"),
            "'passk_advantage' makes the advantages anew from the rewards, which undoes what 'focal' made of them "
            "before it; put 'passk_advantage' first",
        ),
        (
            ("no_loss", "right_anchor", {"negative_reinforcement": {"coef": 0.5}}),
            "'negative_reinforcement' makes the advantages anew from the rewards, which undoes what 'no_loss' made of "
            "them before it; put 'negative_reinforcement' first",
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
        ("passk_advantage", "focal", "right_kl"),
        ({"exploration_advantage": {"at": "current"}}, "hold_coverage"),  # it acts after all first stages
        ("mara", "hold_coverage"),  # of the rewards as they are left
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


@pytest.mark.parametrize(
    ("term", "words"),
    [
        ({"kl_cov": {"ratio": 0.2}}, "pulls 20 % of all tokens back, where the paper has 2e-4 for 32B and 2e-3 for 7B"),
        ({"clip_cov": {"ratio": 0.1}}, "drops up to 10 % of all tokens, where the paper has 2e-4 and SPEAR 0.02"),
        ({"forking_tokens": {"share": 0.002}}, "trains one token in 500, where the paper has one in 5"),
        ({"lp_reg": {"rho": 0.5}}, "protects the least probable 50 %, where the paper has 0.5 % to 1 %"),
        ({"self_imitation": {"cov_ratio": 0.5}}, "of 50 % of the replayed tokens, where the README has 2 %: little is"),
        ({"self_imitation": {"cov_ratio": 1.0e-5}}, "of 0.001 % of the replayed tokens, where the README has 2 %: it "),
        ({"discriminator_clip": {"over": "vocabulary", "max_frac": 0.1}}, "lets 10 % of the tokens be dropped"),
        ({"hicra": {"form": "verl", "top": 0.01}}, "raises one token in 100 of a long right answer"),
        ({"arm": {"fraction": 0.01}}, "fraction 0.01: a mean over one token in 50 or fewer is noise"),
        ({"siren": {"p_top": 0.01}}, "p_top 0.01: a nucleus of so little mass is one token nearly everywhere"),
    ],
)
def test_a_share_far_from_its_paper_is_said_in_the_terms_own_words(term: dict, words: str):
    [name] = term
    [sentence] = said(term)
    assert sentence.startswith(f"'{name}': ") and words in sentence
    assert said({name: {**term[name], "coef": 0.0}}) == []


@pytest.mark.parametrize("name", known_terms())
def test_no_term_warns_of_its_own_defaults_and_papers(name: str):
    if name != "conditional_entropy":  # which warns of the policy as its own judge
        assert said(name) == []


def test_order_is_known_when_the_chain_is_built():
    for first, second in (("entropy_advantage", "tool_bonus"), ("qae", "pear"), ("group_log_det", "majority_vote")):
        with pytest.raises(ValueError, match=f"put '{second}' before '{first}'"):
            build_chain([first, second])
        build_chain([second, first])
        build_chain([{first: {"coef": 0.0}}, second])  # coef 0 is absence
        build_chain([first, {second: {"coef": 0}}])
    build_chain(["clip_cov", "tool_bonus"])  # stage 2 alone
    build_chain([{"group_log_det": {"acts": "force"}}, "tool_bonus"])


def test_what_a_terms_source_returns_in_stage_one_is_declared():
    for name in known_terms():
        source = (Path(hclm_rl.__file__).parent / "terms" / f"{name}.py").read_text()
        calls = [call for call in ast.walk(ast.parse(source)) if isinstance(call, ast.Call)]
        given = {key.arg for call in calls if ast.unparse(call.func) == "RolloutEffect" for key in call.keywords}
        term = build_chain([{name: IN_STAGE_ONE.get(name, {})}]).links[0].term
        assert (term.shapes_rewards, term.shapes_advantages) == ("rewards" in given, "advantages" in given), name


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_model_in_which_nothing_trains_is_refused(algorithm: str, policy: str, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(policy, attn_implementation="eager").requires_grad_(False)
    with pytest.raises(ValueError, match=r"no weight of the model trains: load an adapter with .*is_trainable=True"):
        make(model, tmp_path, algorithm=algorithm, model_init_kwargs=None)  # type: ignore[arg-type]
