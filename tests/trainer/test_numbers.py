"""Nothing that is not finite reaches an optimiser step, and whoever made it is named; whoever errs is named too."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType

from hclm_rl import Constant, Effect, Link, NotFinite, Rollout, RolloutEffect, Term, TokenBatch
from hclm_rl.chain import TermFailed, TermRefused
from hclm_rl.chain.finite import Watch
from hclm_rl.chain.state import read
from hclm_rl.terms.entropy_bonus import EntropyBonus
from hclm_rl.terms.forking_tokens import ForkingTokens
from hclm_rl.trainer.judging import before_deepspeed_steps

from ..tiny import largest_difference, make, weights_of

BONUS = {"entropy_bonus": {"coef": 0.1}}
STOPPED = "; training stopped before the optimiser step, and the weights are those of the step before"


def trap(x: torch.Tensor) -> torch.Tensor:
    """0 everywhere, with a gradient of NaN: the gradient of sqrt at -1 is NaN, and NaN * 0 is NaN."""
    return torch.where(x.detach() > 1e9, (-1 - x.abs()).sqrt(), 0.0)


READS: dict[str, Callable[[TokenBatch], torch.Tensor]] = {
    "log-probs": lambda batch: batch.logps,
    "entropies": lambda batch: batch.entropy,
    "hidden states": lambda batch: batch.hidden().sum(dim=2),
    "attention entropies": lambda batch: batch.attention().entropy.sum(dim=1),
}


@dataclass(frozen=True, kw_only=True)
class Trap(Term):
    """A loss of 0 with a gradient of NaN in what it reads."""

    needs_hidden: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = True
    reads: str = "log-probs"
    first_at: int = 0

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        read = READS[self.reads](batch)
        return Effect(loss=trap(read) if batch.step >= self.first_at else 0 * read)


@dataclass(frozen=True, kw_only=True)
class TrapInVocabulary(Term):
    """The same inside a functional of the next-token distribution."""

    needs_vocab_gradient: ClassVar[bool] = True

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        return Effect(loss=batch.over_vocab(lambda logps: trap(logps).sum(dim=1)))


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_of_nan_has_its_terms_name_and_reaches_no_weight(
    first: bool, reads: str, policy: str, tmp_path: Path
):
    terms = [Trap(reads=reads), BONUS] if first else [BONUS, Trap(reads=reads)]
    trainer = make(policy, tmp_path, terms=terms, fixed=True, gradient_accumulation_steps=2, num_generations=4)
    before = weights_of(trainer)
    with pytest.raises(NotFinite) as error:
        trainer.train()
    assert str(error.value) == (
        f"the entropy term 'Trap' produced values that are not finite (or beyond 1e+18) in its gradient at the {reads} "
        f"at step 0{STOPPED}"
    )
    assert largest_difference(before, weights_of(trainer)) == 0.0


def test_a_gradient_of_nan_inside_a_functional_is_found_too(policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, terms=[BONUS, TrapInVocabulary()], fixed=True)
    with pytest.raises(
        NotFinite, match=r"'TrapInVocabulary' produced .* in its gradient at the hidden states at step 0"
    ):
        trainer.train()


def test_the_weights_and_the_checkpoint_of_the_step_before_are_whole(policy: str, tmp_path: Path):
    trainer = make(
        policy, tmp_path, terms=[Trap(first_at=2), BONUS], fixed=True, max_steps=4, save_strategy="steps", save_steps=1
    )
    with pytest.raises(NotFinite, match=r"'Trap' .* at step 2"):
        trainer.train()
    assert all(weight.isfinite().all() for weight in weights_of(trainer).values())
    assert (tmp_path / "checkpoint-2").exists() and not (tmp_path / "checkpoint-3").exists()


def test_a_number_that_is_not_finite_stops_the_run_before_deepspeed_steps():
    # DeepSpeed makes its optimiser step inside the backward pass
    made, watch = [], Watch()
    engine = SimpleNamespace(step=lambda: made.append("a step"))
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        deepspeed_engine_wrapped=SimpleNamespace(engine=engine),
        device=torch.device("cpu"),
        num_processes=1,
        reduce=lambda x, reduction: x,
    )
    run = SimpleNamespace(chain=SimpleNamespace(links=["mine"]), watch=watch)
    trainer = SimpleNamespace(accelerator=accelerator, _hclm=run, state=SimpleNamespace(global_step=5))
    with before_deepspeed_steps(trainer):
        engine.step()
    watch.note("mine", "loss", torch.tensor(math.nan))
    with pytest.raises(NotFinite, match=r"'mine' produced .* in its loss at step 5"), before_deepspeed_steps(trainer):
        engine.step()
    assert made == ["a step"] and not watch.noted


# ---- coefficients


@dataclass
class Own:
    """A coefficient that answers with `then` from its second step on."""

    then: Any = 0.1
    after: Any = field(default_factory=dict)
    needs_entropy: bool = False

    def initial_state(self) -> dict:
        return {"n": np.float64(0.0)}

    def value(self, progress: float, state: Mapping, entropy: float | None = None) -> Any:
        if isinstance(self.then, Exception) and state["n"]:
            raise self.then
        return self.then if state["n"] else np.float32(0.5)

    def update(self, entropy: float, state: Mapping) -> Any:
        if isinstance(self.after, Exception):
            raise self.after
        return {"n": state["n"] + 1} | self.after if isinstance(self.after, dict) else self.after


def run_with(coef: object, term: Term, policy: str, out: Path) -> Any:
    trainer = make(policy, out, terms=[Link(name="mine", term=term, coef=coef)], fixed=True)  # type: ignore[arg-type]
    trainer.train()
    return trainer


@pytest.mark.parametrize("term", [EntropyBonus(), ForkingTokens()])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0e300])
def test_a_coefficient_that_is_not_finite_stops_before_the_step(bad: float, term: Term, policy: str, tmp_path: Path):
    with pytest.raises(NotFinite) as error:
        run_with(Own(bad), term, policy, tmp_path)
    assert str(error.value) == (
        f"the coefficient of 'mine' is {bad:g} at step 1, with the state {{'n': 1.0}}; allowed: a finite number, of at "
        "most 3.4e+38; training stopped before the step, and the weights are those of the step before"
    )


@pytest.mark.parametrize(
    ("term", "where"),
    [(EntropyBonus(), "loss"), (ForkingTokens(), "advantages")],
)
def test_a_coefficient_that_overflows_the_update_is_named_with_what_it_multiplies(
    term: Term, where: str, policy: str, tmp_path: Path
):
    with pytest.raises(NotFinite, match=rf"'mine' produced .* in its {where} \(its coefficient is 1e\+30\) at step 1"):
        run_with(Own(1e30), term, policy, tmp_path)


def test_a_controllers_state_of_nan_in_a_checkpoint_stops_the_resumed_run(policy: str, tmp_path: Path):
    coef = {"kind": "step_to_target", "target": 9.0, "start": 0.1, "delta": 0.1}
    changes = {"terms": [{"entropy_bonus": {"coef": coef}}], "fixed": True, "save_strategy": "steps", "save_steps": 1}
    first = make(policy, tmp_path, max_steps=1, **changes)
    first.train()
    state = first._hclm.state
    state.controller["entropy_bonus"]["coefficient"] = math.nan
    state.save(tmp_path / "checkpoint-1")
    resumed = make(policy, tmp_path, max_steps=2, **changes)
    with pytest.raises(NotFinite, match=r"the coefficient of 'entropy_bonus' is nan at step 1, with the state \{'coef"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


WRONG = [
    (Own("0.1"), "the coefficient of 'mine' gave str '0.1' as value at step 1; allowed: a number"),
    (Own(True), "the coefficient of 'mine' gave bool True as value at step 1; allowed: a number"),
    (Own(KeyError("x")), "the coefficient of 'mine' failed in value at step 1: KeyError: 'x'"),
    (Own(after=ValueError("no")), "the coefficient of 'mine' failed in update at step 0: no"),
    (
        Own(after=[1]),
        "the coefficient of 'mine' gave list [1] as state in update at step 0; allowed: a dict of numbers",
    ),
    (
        Own(after={"x": "y"}),
        "the coefficient of 'mine' gave 'x': str 'y' as state in update at step 0; allowed: a dict of numbers",
    ),
]


@pytest.mark.parametrize(("coef", "sentence"), WRONG)
def test_a_coefficient_that_errs_is_named(coef: Own, sentence: str, policy: str, tmp_path: Path):
    with pytest.raises(TermFailed) as error:
        run_with(coef, EntropyBonus(), policy, tmp_path)
    assert str(error.value) == sentence
    raised = [each for each in (coef.then, coef.after) if isinstance(each, Exception)]
    assert error.value.__cause__ is (raised[0] if raised else None)


# ---- terms that err


@dataclass(frozen=True, kw_only=True)
class Errs(Term):
    """Does what it is told in one of its three calls."""

    needs_hidden: ClassVar[bool] = True
    stage: int
    what: object  # a function without arguments

    def does(self) -> Any:
        assert callable(self.what)
        return self.what()

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        return self.does() if self.stage == 1 else RolloutEffect()

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if self.stage == 3:
            return Effect(on_hidden_gradient=lambda gradient: self.does())
        return self.does() if self.stage == 2 else Effect()


@pytest.mark.parametrize(("stage", "where"), [(1, "stage 1"), (2, "stage 2"), (3, "on_hidden_gradient")])
def test_an_error_inside_a_term_has_link_stage_and_step_and_its_cause(
    stage: int, where: str, policy: str, tmp_path: Path
):
    trainer = make(policy, tmp_path, terms=[Errs(stage=stage, what=lambda: {}["nope"])], fixed=True)
    with pytest.raises(TermFailed) as error:
        trainer.train()
    assert str(error.value) == f"the entropy term 'Errs' failed in {where} at step 0: KeyError: 'nope'"
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("stage", "what", "sentence"),
    [
        (1, lambda: None, "gave None as its effect in stage 1 at step 0; allowed: RolloutEffect(...)"),
        (2, lambda: 3, "gave int 3 as its effect in stage 2 at step 0; allowed: Effect(...)"),
        (
            3,
            lambda: {"x": 1.0},
            "gave float 1.0 as the metric 'x' in stage 2 at step 0; allowed: by a name that is text",
        ),
    ],
)
def test_what_is_no_effect_is_refused(stage: int, what: Callable, sentence: str, policy: str, tmp_path: Path):
    with pytest.raises(TermRefused) as error:
        make(policy, tmp_path, terms=[Errs(stage=stage, what=what)], fixed=True).train()
    assert str(error.value).startswith(f"the entropy term 'Errs' {sentence}")


def test_a_loss_without_a_gradient_is_refused(policy: str, tmp_path: Path):
    @dataclass(frozen=True, kw_only=True)
    class Detached(Term):
        def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
            return Effect(loss=-batch.entropy.detach())

    with pytest.raises(
        TermRefused, match=r"'Detached' gave a float32 tensor of shape .* as loss .*with a gradient: it is"
    ):
        make(policy, tmp_path, terms=[Detached()], fixed=True).train()
    make(policy, tmp_path, terms=[Link(name="off", term=Detached(), coef=Constant(coefficient=0.0))]).train()


@pytest.mark.parametrize(
    ("term", "sentence"),
    [
        (
            "information_force",
            "^information_force: reads the gradient at the hidden states, which need none in this run",
        ),
        (
            "log_det",
            "'log_det' gave .* as loss in stage 2 at step 0; allowed: one with a gradient: .* needs none in this",
        ),
    ],
)
def test_where_the_head_alone_trains_hidden_states_have_no_gradient(
    term: str, sentence: str, policy: str, tmp_path: Path
):
    trainer = make(policy, tmp_path, terms=[term], fixed=True)
    trainer.model.requires_grad_(False)
    trainer.model.lm_head.requires_grad_(True)
    with pytest.raises(TermRefused, match=sentence):
        trainer.train()


# ---- memory


@dataclass(frozen=True, kw_only=True)
class Keeps(Term):
    """Remembers what it is made with."""

    value: object
    stage: int = 1

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if self.stage == 1:
            memory["x"] = self.value
        return RolloutEffect()

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if self.stage == 2:
            memory["x"] = self.value
        return Effect()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_memory_that_cannot_be_saved_is_said_in_the_first_step(stage: int, policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, terms=[Keeps(value={1}, stage=stage)], fixed=True)  # no checkpoint is written
    with pytest.raises(TermRefused) as error:
        trainer.train()
    assert str(error.value) == (
        "the entropy term 'Keeps' keeps set {1} in memory['x'], which a checkpoint cannot hold; allowed: numbers, "
        "text, None, lists and dicts of these by text, and tensors as values of the memory itself"
    )
    assert trainer.state.global_step == 0


def test_numpy_numbers_in_a_memory_are_saved(policy: str, tmp_path: Path):
    value = {"a": [np.float32(0.5), np.int64(3)], "b": np.bool_(True)}
    make(policy, tmp_path, terms=[Keeps(value=value)], fixed=True, save_strategy="steps", save_steps=2).train()
    manifest, _ = read(tmp_path / "checkpoint-2")
    assert manifest["memory"]["Keeps"]["x"] == {"a": [0.5, 3], "b": True}


# ---- the policy


def masked(policy: str) -> Any:
    """A policy whose last id has the logit -inf, as where a vocabulary is masked: its entropy comes out as NaN."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(policy, attn_implementation="eager")
    head = torch.nn.Linear(16, 26)
    head.weight.data.copy_(model.lm_head.weight.data)
    head.bias = torch.nn.Parameter(torch.tensor([0.0] * 25 + [-math.inf]), requires_grad=False)
    model.lm_head = head
    return model


def low_ids(batch: list[str], trainer: Any) -> dict[str, Any]:
    """Responses without the masked id."""
    from ..tiny import fixed_rollout

    made = fixed_rollout(batch, trainer)
    return made | {"completion_ids": [[min(i, 24) for i in ids] for ids in made["completion_ids"]]}


OF_POLICY = (
    "the policy itself gave entropies that are not finite at step 0: its weights hold NaN or infinities, or logits are "
    "-inf, as of a masked vocabulary"
)


def test_nan_of_the_policy_is_said_to_be_its_own_once(policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    terms = [{"entropy_bonus": {"coef": {"kind": "step_to_target", "target": 3.0}}}, "entropy_advantage"]
    trainer = make(
        masked(policy), tmp_path, terms=terms, trainer={"rollout_func": low_ids}, model_init_kwargs=None, max_steps=3
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "policy itself" in record.getMessage()]
    assert said == [
        f"{OF_POLICY}. Terms that read them act on NaN, or not at all; the coefficient of entropy_bonus follows the "
        "entropy and stays as it is"
    ]


def test_a_loss_made_of_the_policys_nan_says_where_it_comes_from(policy: str, tmp_path: Path):
    trainer = make(
        masked(policy), tmp_path, terms=["entropy_bonus"], trainer={"rollout_func": low_ids}, model_init_kwargs=None
    )
    with pytest.raises(NotFinite) as error:
        trainer.train()
    assert str(error.value) == (
        f"{OF_POLICY}. Of these the entropy term 'entropy_bonus' produced values that are not finite (or beyond 1e+18) "
        f"in its loss (its coefficient is 0.005) at step 0{STOPPED}"
    )
