"""Invariant 4: a term's update does not depend on how the step is cut into micro-batches or spread over processes."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hclm_rl import known_terms
from hclm_rl.commands import launch
from hclm_rl.commands.cli import find_method
from hclm_rl.recipe.arguments import parse
from hclm_rl.recipe.config import find_term
from hclm_rl.watch.trace import read_trace

from ..cpu_processes import run_by_two
from ..tiny import ALONE, LOSSES, WITH_TOOLS, beta_of, largest_difference, make, weights_after
from ..two_processes import NOTHING_ON_ONE, ROLLOUT, evaluated

WHOLE = {"per_device_train_batch_size": 8}
CUT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
CUT_FINE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
# statistics that reach a tiny batch: with 30 tokens the authors' ratios select a single one
STRONG = {
    "arm": {"alpha": 3.0},
    "ares": {"triggers": [], "window": 2, "correct_from": 0.5},
    "empo": {"answer": r"^(\d)"},  # whole completions are all different there
    "conditional_entropy": {"coef": 1.0, "answer": r"^(\d+)", "cue": "", "step_tokens": 1, "cuts": False},
    "attention_entropy": {"coef": 1.0, "target": 1.0, "margin": 0.0},
    "clip_cov": {"ratio": 0.2, "lower": 0.1},
    "discriminator_clip": {"mu": 0.3},
    "repo": {"zeta": 0.3, "maximum": 1.0},
    "rep_exp": {**ALONE["rep_exp"], "beta": 1.0, "right_at": 0.25},
    "force_reweight": {"floor": 0.1, "ceiling": 0.5},
    "group_log_det": {"acts": "both", "balance": 0.1},
    "hold_coverage": {"right_at": 0.25},
    "info_po": {"beta": 5.0, "temperature": 1.0},
    "rehearsal": {"coef": 3.0, "checks": 1, "right_at": 0.5},
    # in two steps no prompt comes twice
    "right_anchor": {"coef": 3.0, "source": "any", "right_at": 0.25, "unit": "token"},
    "self_imitation": {"buffer": 1, "warm_up": 1, "needs_tool_call": False},
    "hicra": {"grams": ("1", "2", "3", "5", "8", "13")},
    "epo": {"coef": 0.1, "alpha": 0.5, "kappa_l": 0.9, "kappa_r": 1.0},
    "majority_vote": {"answer": r"^(\d)"},
    "negative_reinforcement": {"form": "negative", "mean_over": "kept", "right_at": 0.5},
    "mara": {"threshold": 0.5},
    "passk_advantage": {"k": 2, "right_at": 0.5},
    "outcome_exploration": {"answer": r"^(\d)", "c": 1.0},
    "pear": {"correct_from": 0.5, "full": 2.5},  # pays more than 0 at this entropy
    "perplexity_advantage": {"alpha": 0.1},
    "steer": {"min_weight": 0.2},
    "kl_cov": {"ratio": 0.2},
    "entropy_bonus": {"coef": 0.1},
    "entro_pic": {"coef": 0.5, "threshold": 0.1},
    "lp_reg": {"rho": 1.0, "kappa": 0.5, "beta": 10.0},
    "simko": {"a": 0.5, "tau": 0.3, "lam": 2.0},
    "siren": {"coef": 0.5, "anchor": 3.0},
    "log_det": {"coef": 0.1},
    "coding_rate": {"coef": 0.1},
    "feature_softmax": {"coef": 1.0},
    "uniform_correct": {"tau": 1.0, "right_at": 0.25},  # graded rewards
    "unsolved_kl": {"beta": 3.0, "right_at": 2.0, "free_visits": 0},
    "variance": {"coef": 0.1},
    "von_neumann": {"coef": 1.0},
}
# The smallest change that a term makes to these runs is 6e-4 (information_force, a diagnostic, makes none); rounding
# of float32 gradients through two SGD steps of 0.1 stays below 1e-6.
ROUNDING = 2e-6


LAUNCHED = """
task: coins
task_kwargs: {prompts: 8, eval_prompts: 4}
eval_samples: 8
eval_batch: 10
entropy_terms: [entropy_bonus]
max_steps: 2
num_generations: 4
per_device_train_batch_size: 4
learning_rate: 1.0e-2
bf16: false
gradient_checkpointing: false
save_strategy: "no"
"""


def all_terms_in_order(beta: float = 0.0) -> list[str]:
    """All names that a run with this KL takes, those that shape rewards first: they set the advantages anew."""
    names = [name for name in known_terms() if beta or not beta_of(name)]
    return sorted(names, key=lambda name: "reward" not in find_method(name).kinds)


def rollout(term: str) -> bool | str:
    """The kind of fixed rollout on which the term does something."""
    return "turns" if term in WITH_TOOLS else True


def update(policy: str, out: Path, term: str, **cut) -> dict[str, torch.Tensor]:
    terms, beta = [{term: STRONG.get(term, {})}], beta_of(term)
    return weights_after(policy, out, terms=terms, fixed=rollout(term), loss_type="dapo", beta=beta, **cut)


@pytest.fixture(scope="module")
def whole(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, torch.Tensor]]:
    """The weights that a term gives with the step in one micro-batch of one process; trained once for all tests."""
    return functools.cache(lambda term: update(policy, tmp_path_factory.mktemp("whole"), term, **WHOLE))


@pytest.fixture(scope="module")
def plain(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, torch.Tensor]]:
    """The same without terms, by the kind of rollout and the strength of the KL."""

    def trained(fixed: bool | str, beta: float) -> dict[str, torch.Tensor]:
        folder = tmp_path_factory.mktemp("plain")
        return weights_after(policy, folder, fixed=fixed, beta=beta, loss_type="dapo", **WHOLE)

    return functools.cache(trained)


@pytest.mark.parametrize("term", known_terms())
def test_micro_batches(term: str, whole: Callable, policy: str, tmp_path: Path):
    assert largest_difference(whole(term), update(policy, tmp_path / "2", term, **CUT)) < ROUNDING
    assert largest_difference(whole(term), update(policy, tmp_path / "4", term, **CUT_FINE)) < ROUNDING


def test_micro_batches_through_the_head(policy: str, tmp_path: Path, plain: Callable):
    terms = [{"force_reweight": {"through": "head", "share": 0.3, **STRONG["force_reweight"]}}]
    whole, cut = (
        weights_after(policy, tmp_path / str(i), terms=terms, fixed=True, loss_type="dapo", **pieces)
        for i, pieces in enumerate((WHOLE, CUT))
    )
    assert largest_difference(whole, cut) < ROUNDING < largest_difference(plain(True, 0.0), whole) / 100


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo"])  # bnpo divides by micro-batch
def test_micro_batches_in_every_loss(loss: str, policy: str, tmp_path: Path):
    terms = [{name: STRONG.get(name, {})} for name in all_terms_in_order()]
    whole = weights_after(policy, tmp_path / "1", terms=terms, fixed=True, loss_type=loss, **WHOLE)
    cut = weights_after(policy, tmp_path / "2", terms=terms, fixed=True, loss_type=loss, **CUT)
    assert largest_difference(whole, cut) < ROUNDING


# of these runs no prompt and no response comes twice, which no_loss and right_kl wait for, and no second update, which
# KL-Cov and BAPO wait for
IDLE = ("bapo", "kl_cov", "no_loss", "right_kl")


@pytest.mark.parametrize(
    "term", [name for name in known_terms() if not find_term(name).is_diagnostic and name not in IDLE]
)
def test_the_term_changes_the_update_by_more_than_the_tolerance(term: str, whole: Callable, plain: Callable):
    assert largest_difference(plain(rollout(term), beta_of(term)), whole(term)) > 100 * ROUNDING


@pytest.mark.parametrize("term", ["bapo", "kl_cov", "log_det", "clip_cov"])
def test_micro_batches_off_policy(term: str, policy: str, tmp_path: Path):
    # two iterations over each rollout; KL-Cov acts in the second one only. With eager attention two tokens of the
    # second rollout lie within rounding of each other at its threshold, and the cut decides which of them it takes
    changes = {"num_iterations": 2, "max_steps": 4, "model_init_kwargs": {"attn_implementation": "sdpa"}}
    whole = update(policy, tmp_path / "1", term, **WHOLE, **changes)
    cut = update(policy, tmp_path / "2", term, **CUT, **changes)
    plain = weights_after(policy, tmp_path / "plain", fixed=True, loss_type="dapo", **WHOLE, **changes)
    assert largest_difference(whole, cut) < ROUNDING
    assert largest_difference(whole, plain) > 100 * ROUNDING


def test_two_iterations_accumulated_into_one_step(policy: str, tmp_path: Path):
    # one rollout of 4, used twice within one optimiser step: the same gradient as using it once
    changes = {"per_device_train_batch_size": 4, "max_steps": 1}
    once = update(policy, tmp_path / "1", "clip_cov", **changes)
    changes |= {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 1}
    twice = update(policy, tmp_path / "2", "clip_cov", **changes)
    assert largest_difference(once, twice) < ROUNDING


def test_rloo_micro_batches_of_an_added_loss(policy: str, tmp_path: Path):
    # RLOO's loss is divided by the accumulation steps after _compute_loss, unlike GRPO's. Its generation draws the
    # same numbers in both runs, since the generation batch is the same eight prompts.
    terms = [{"entropy_bonus": {"coef": 0.1}}]
    whole = weights_after(policy, tmp_path / "1", algorithm="rloo", terms=terms, **WHOLE)
    cut = weights_after(policy, tmp_path / "2", algorithm="rloo", terms=terms, **CUT)
    assert largest_difference(whole, cut) < ROUNDING
    assert largest_difference(whole, weights_after(policy, tmp_path / "3", algorithm="rloo", **WHOLE)) > 100 * ROUNDING


def trained_by_two(policy: str, out: Path, kind: str, terms: list[str], processes: int = 2) -> Path:
    """Folder with the weights of every case, trained by two processes (or so many) on gloo."""
    cases = {term: STRONG.get(term, {}) for term in all_terms_in_order(beta=0.04) if term in terms}
    (out / "launched.yaml").write_text(LAUNCHED)
    run_by_two("tests.two_processes", policy, str(out), json.dumps(cases), kind, processes=processes)
    return out


@pytest.fixture(scope="module")
def two_processes(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_by_two(policy, tmp_path_factory.mktemp("two_processes"), "ddp", known_terms())


@pytest.fixture(scope="module")
def fsdp2(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_by_two(policy, tmp_path_factory.mktemp("fsdp2"), "fsdp2", known_terms())


def test_fsdp2_without_terms_or_at_coef_zero_is_trl_and_resumes(fsdp2: Path):
    stock, empty, zero, through, resumed = (
        load_file(fsdp2 / f"{name}.safetensors")
        for name in ("stock dapo", "empty dapo", "zero dapo", "through", "resumed")
    )
    assert largest_difference(stock, empty) == largest_difference(stock, zero) == 0.0
    assert largest_difference(through, resumed) == 0.0


@pytest.mark.parametrize("kind", ["two_processes", "fsdp2"])
def test_a_process_without_any_token(kind: str, policy: str, tmp_path: Path, request: pytest.FixtureRequest):
    terms = [{name: STRONG.get(name, {})} for name in all_terms_in_order()]
    one = weights_after(policy, tmp_path, terms=terms, **NOTHING_ON_ONE, **WHOLE)
    both = load_file(request.getfixturevalue(kind) / "nothing on one.safetensors")
    # the covariance of 20 states in 16 dimensions is nearly singular, which log_det's inverse makes of rounding
    assert largest_difference(one, both) < 1e-5
    full = NOTHING_ON_ONE | {"mask_truncated_completions": False}
    assert largest_difference(one, weights_after(policy, tmp_path, terms=terms, **full, **WHOLE)) > 1e-3


def test_fsdp2_in_bf16(fsdp2: Path):
    stock, empty, terms = (load_file(fsdp2 / f"{name} bf16.safetensors") for name in ("stock", "empty", "terms"))
    assert largest_difference(stock, empty) == 0.0
    assert 100 * ROUNDING < largest_difference(stock, terms) < 1.0


def assert_measured_as_by_one_process(sharded: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launched run of both processes on held-out prompts, before training what one process finds that way."""
    monkeypatch.setattr(launch, "is_sharded", lambda trainer: True)
    line = ["--config", str(sharded / "launched.yaml"), "--output_dir", str(out), "--use_cpu", "true"]
    one = launch.run("grpo", parse("grpo", line))
    both = json.loads((sharded / "launched" / "summary.json").read_text())
    assert both["processes"] == 2 and both["before"]["prompts"] == 4 and both["before"]["samples"] == 8
    assert both["before"]["means"] == pytest.approx(one["before"]["means"], abs=1e-6)
    assert both["after"]["means"].keys() == one["after"]["means"].keys()
    assert both["after"]["means"]["token_entropy"] != pytest.approx(both["before"]["means"]["token_entropy"], abs=1e-3)


def test_fsdp2_measures_held_out_prompts(fsdp2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert_measured_as_by_one_process(fsdp2, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_zero_is_one_process(kind: str, whole: Callable, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    terms = [name for name in known_terms() if kind == "zero2" or not find_term(name).needs_vocab_gradient]
    out = trained_by_two(policy, tmp_path, kind, terms)
    for term in terms:
        sharded = load_file(out / f"{term}.safetensors")
        assert largest_difference(whole(term), sharded) < ROUNDING, term
    stock, *others = (load_file(out / f"{name} dapo.safetensors") for name in ("stock", "empty", "zero"))
    assert [largest_difference(stock, other) for other in others] == [0.0, 0.0]
    through, resumed = (load_file(out / f"{name}.safetensors") for name in ("through", "resumed"))
    assert largest_difference(through, resumed) == 0.0
    if kind == "zero3":
        assert_measured_as_by_one_process(out, tmp_path / "measured", monkeypatch)


@pytest.mark.parametrize("term", known_terms())
def test_two_processes_are_one(term: str, whole: Callable, two_processes: Path, fsdp2: Path):
    for out in (two_processes, fsdp2):
        assert largest_difference(whole(term), load_file(out / f"{term}.safetensors")) < ROUNDING, out.name


@pytest.fixture(scope="module")
def four_processes(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_by_two(policy, tmp_path_factory.mktemp("four"), "terms", known_terms(), processes=4)


@pytest.mark.slow  # four processes, two responses of the eight each: half a group
@pytest.mark.parametrize("term", known_terms())
def test_four_processes_are_one(term: str, whole: Callable, four_processes: Path):
    assert largest_difference(whole(term), load_file(four_processes / f"{term}.safetensors")) < ROUNDING


@pytest.mark.parametrize("kind", ["two_processes", "fsdp2"])
def test_a_gradient_of_nan_on_one_process_stops_both(kind: str, request: pytest.FixtureRequest):
    out = request.getfixturevalue(kind)
    said = [(out / f"stopped_{process}.txt").read_text() for process in (0, 1)]
    assert said[0] == said[1] and "'TrapOnOne' produced values that are not finite" in said[0]
    assert "in its gradient at the log-probs at step 0" in said[0]


def test_a_term_of_a_stranger_with_memory_and_randomness_on_two_processes(two_processes, policy: str, tmp_path: Path):
    terms = ["tests.own_terms.Remembers"]
    one = weights_after(policy, tmp_path, terms=terms, fixed=True, loss_type="dapo", **WHOLE)
    assert largest_difference(one, load_file(two_processes / "remembers.safetensors")) < ROUNDING


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_rollout_on_two_processes_is_that_of_one(algorithm: str, two_processes: Path, policy: str, tmp_path: Path):
    loss = {"loss_type": "dapo"} if algorithm == "grpo" else {}
    one = weights_after(policy, tmp_path, algorithm=algorithm, rollout=ROLLOUT, **loss, **WHOLE)
    assert largest_difference(one, load_file(two_processes / f"rolled {algorithm}.safetensors")) < ROUNDING


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chain", ["empty", "zero"])
def test_two_processes_without_terms_or_at_coef_zero_are_trl_bit_for_bit(chain: str, loss: str, two_processes: Path):
    stock, ours = (load_file(two_processes / f"{name} {loss}.safetensors") for name in ("stock", chain))
    assert largest_difference(stock, ours) == 0.0


def test_two_processes_log_the_same_metrics_as_one(two_processes: Path, policy: str, tmp_path: Path):
    both = json.loads((two_processes / "metrics.json").read_text())
    trainer = make(policy, tmp_path, terms=["information_force"], fixed=True, loss_type="dapo", **WHOLE)
    trainer.train()
    one = trainer.state.log_history[0]
    names = [name for name in one if name.startswith("information_force/")]
    assert len(names) > 10
    for name in names:
        least = 5e-6 if name.endswith("/drift") else 1e-6  # of the first step against itself: rounding alone
        assert float(both[name]) == pytest.approx(float(one[name]), rel=2e-4, abs=least), name


def test_two_processes_trace_what_one_traces(two_processes: Path, policy: str, tmp_path: Path):
    make(policy, tmp_path, terms=["information_force"], fixed=True, loss_type="dapo", trace_steps=[1]).train()
    one, two = (read_trace(folder, 1).to_pydict() for folder in (tmp_path, two_processes / "traced"))
    assert one.keys() == two.keys()
    for name in one:
        if isinstance(one[name][0], float):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
        else:
            assert two[name] == one[name], name


def test_two_processes_evaluate_as_one(two_processes: Path, policy: str, tmp_path: Path):
    both = json.loads((two_processes / "evaluated.json").read_text())
    passes = {name: value for name, value in evaluated(policy, tmp_path, 8).items() if "pass@" in name}
    assert len(passes) == 9
    assert {name: both[name] for name in passes} == pytest.approx(passes)
