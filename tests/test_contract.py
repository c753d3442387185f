"""What every term promises, checked on every file of hclm_rl/terms by its being there."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hclm_rl import Quantiles, Term, Total, known_terms
from hclm_rl.chain.chain import Outcome, per_token
from hclm_rl.recipe.config import find_term
from hclm_rl.terms.no_loss import NoLoss
from hclm_rl.terms.right_kl import RightKl
from hclm_rl.terms.unsolved_kl import UnsolvedKl

from .term_batches import (
    Processes,
    Step,
    both_stages,
    first_stage,
    fit,
    make_step,
    rollout,
    second_stage,
    token_batch,
)

# The authors' values, but where they leave a batch of 32 tokens alone: 2.5 deviations need one that is mostly certain.
# A band above the entropy of the first step is one that a first step has left.
# HICRA's phrases are English, the batch has eleven words. ARES looks for words and a window of four tokens, in rows of
# at most six; the steps of conditional_entropy end with a blank line.
REACHING = {
    "ares": {"triggers": (), "window": 2},
    "bapo": {"lo_min": 0.2, "hi_min": 2.5},  # few ratios lie between the bounds of the clip and the first of its own
    "conditional_entropy": {"step_tokens": 1, "cuts": False},
    "discriminator_clip": {"mu": 0.5},
    "force_reweight": {"floor": 2.0, "ceiling": 3.0},
    "hicra": {"grams": ("so", "let me", "is")},
    "info_po": {"placeholder": "4"},
    "passk_advantage": {"k": 2},  # with four in a group
    "rehearsal": {"checks": 1},  # the first is right in both groups
    "right_kl": {"right_at": 0.25},  # with two in a group
    "self_imitation": {"buffer": 1, "needs_tool_call": False},
    "entro_pic": {"threshold": 0.3},  # few tokens of this policy reach 0.95
    "lp_reg": {"rho": 0.9},  # 1 % of 32 tokens is none, and most of them are filtered out or have become likelier
    "siren": {"anchor": 2.0},  # at the first rollout the anchor is the level itself, and there is no pull
    "uniform_correct": {"right_at": 0.6},  # which other rewards cross
    "unsolved_kl": {"right_at": 2.0, "free_visits": 0},  # which neither group reaches
}
TERMS = {name: find_term(name)(**REACHING.get(name, {})) for name in known_terms()}
FOR_PARITY = {
    f"{name}, micro_batch": replace(term, statistics="micro_batch")  # type: ignore[call-arg]
    for name, term in TERMS.items()
    if "statistics" in {field.name for field in dataclasses.fields(term)}
}
FOR_PARITY["tea, weight gradient"] = find_term("tea")(statistics="micro_batch", weight_gradient=True)
# forms that read what the default form does not
FORMS = {
    "em_rl, group": find_term("em_rl")(reduction="mean", scale="group"),
    "discriminator_clip, vocabulary": find_term("discriminator_clip")(over="vocabulary", mu=0.3, max_frac=1.0),
    "entropy_bonus, by difficulty": find_term("entropy_bonus")(by_difficulty=True),
    "exploration_advantage, sampling": find_term("exploration_advantage")(at="sampling"),
    "entropy_flow, head": find_term("entropy_flow")(through="head"),
    "force_reweight, head": find_term("force_reweight")(through="head", **REACHING["force_reweight"]),
    "entropy_flow_balance, exact": find_term("entropy_flow_balance")(influence="exact"),
    "force_reweight, representation": find_term("force_reweight")(
        by="representation", unit="nats", floor=1.0, ceiling=5.0
    ),
    "group_log_det, answers": find_term("group_log_det")(features="answers"),
    "group_log_det, both": find_term("group_log_det")(acts="both"),
    "group_log_det, force": find_term("group_log_det")(acts="force"),
    "forking_tokens, ties cut": find_term("forking_tokens")(ties="cut"),
    "negative_reinforcement, kept": find_term("negative_reinforcement")(form="negative", mean_over="kept"),
    "passk_advantage, best of k": find_term("passk_advantage")(form="loo_minus_one", k=2),
    "outcome_exploration, batch": find_term("outcome_exploration")(by="batch"),
    "right_anchor, count": find_term("right_anchor")(source="any", keep="count", capacity=3),
    "rep_exp, policy": find_term("rep_exp")(features="policy"),
    "rehearsal, not of all": find_term("rehearsal")(checks=2),  # of the second group both are right
    "repo, centred": find_term("repo")(form="centred", controls=False),
    "right_anchor, log_det": find_term("right_anchor")(source="any", unit="token", keep="log_det", capacity=1),
    "steer, exact": find_term("steer")(estimate="exact"),
}
every_term = pytest.mark.parametrize("term", (TERMS | FORMS).values(), ids=(TERMS | FORMS).keys())
every_term_and_variant = pytest.mark.parametrize(
    "term", (TERMS | FORMS | FOR_PARITY).values(), ids=(TERMS | FORMS | FOR_PARITY).keys()
)


def spoilt(step: Step) -> Step:
    """NaN and infinities in every padded slot, and two more padded slots."""
    width = step.mask.size(1) + 2
    names = ("ids", "mask", "old_logps", "old_entropy", "old_hidden", "logps", "entropy", "hidden")
    wide = replace(step, **{name: fit(getattr(step, name), width) for name in names})
    garbage = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -7.0])

    def spoil(x: Tensor) -> Tensor:
        junk = garbage[torch.arange(wide.mask.numel()) % len(garbage)].view(wide.mask.shape)
        mask, junk = (wide.mask, junk) if x.dim() == 2 else (wide.mask.unsqueeze(2), junk.unsqueeze(2))
        return torch.where(mask, x, junk)

    return replace(wide, **{name: spoil(getattr(wide, name)) for name in names if name not in ("ids", "mask")})


@every_term_and_variant
def test_padding_is_invisible(term: Term):
    step = make_step()
    clean, advantages, asked = both_stages(term, step)
    dirty, dirty_advantages, dirty_asked = both_stages(term, spoilt(step))
    assert torch.equal(advantages[step.mask], dirty_advantages[dirty.mask])
    assert asked.losses.keys() == dirty_asked.losses.keys()
    for link, loss in asked.losses.items():
        loss, dirty_loss = token_mean(loss, clean.mask), token_mean(dirty_asked.losses[link], dirty.mask)
        # not identical: a sum over more columns pairs its terms differently
        torch.testing.assert_close(dirty_loss, loss)
        loss.backward()
        dirty_loss.backward()
        for name, leaf in leaves(clean).items():
            other = leaves(dirty)[name]
            if leaf.grad is not None:
                torch.testing.assert_close(other.grad[dirty.mask], leaf.grad[clean.mask])
                assert other.grad.isfinite().all()


def token_mean(loss: Tensor, mask: Tensor) -> Tensor:
    """As the trainer averages it."""
    return loss if loss.dim() == 0 else torch.where(mask, loss, 0).sum() / mask.sum().clamp(min=1)


def leaves(batch) -> dict[str, Tensor]:
    """What may collect a gradient."""
    return {"logps": batch.logps, "entropy": batch.entropy, "hidden": batch.hidden()}


def emptied(step: Step, tokens: int) -> Step:
    """Only the first `tokens` slots of the first response count."""
    mask = torch.zeros_like(step.mask)
    mask[0, :tokens] = True
    return replace(step, mask=mask)


EDGES = {
    "one token": lambda step: emptied(step, 1),
    "no token": lambda step: emptied(step, 0),
    "a response without tokens": lambda step: replace(step, mask=step.mask & (torch.arange(8) != 2).unsqueeze(1)),
    "all-equal rewards": lambda step: replace(step, rewards=torch.ones(8)),
    "an unscored response": lambda step: replace(step, rewards=step.rewards.index_fill(0, torch.tensor([1]), math.nan)),
    "one scored response in a group": lambda step: replace(
        step, rewards=step.rewards.index_fill(0, torch.arange(1, 4), math.nan)
    ),
    "an unscored group": lambda step: replace(step, rewards=step.rewards.index_fill(0, torch.arange(4), math.nan)),
    "a certain policy": lambda step: replace(
        step,
        **dict.fromkeys(("logps", "old_logps", "entropy", "old_entropy"), torch.zeros_like(step.logps)),
    ),
    "equal hidden states": lambda step: replace(
        step, **dict.fromkeys(("hidden", "old_hidden"), torch.ones_like(step.hidden))
    ),
    "on-policy": lambda step: replace(
        step, logps=step.old_logps, entropy=step.old_entropy, hidden=step.old_hidden
    ),
}  # fmt: skip


@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES.keys())
@every_term_and_variant
def test_finite_on_an_edge(term: Term, edge):
    step = edge(make_step())
    batch, advantages, asked = both_stages(term, step)
    assert advantages.isfinite().all()
    for metric in asked.metrics.values():
        assert is_finite(metric, step.mask)
    for loss in asked.losses.values():
        token_mean(loss, step.mask).backward()
    for callback in asked.on_hidden_gradient.values():
        assert all(is_finite(metric, step.mask) for metric in callback(torch.zeros_like(step.hidden)).values())
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves(batch).values())


def is_finite(metric, mask: Tensor) -> bool:
    """Whether it can be logged."""
    if isinstance(metric, Total):
        return math.isfinite(metric.form(*(value.item() for value in metric.sums)))
    values = metric.values if isinstance(metric, Quantiles) else metric
    return bool((values if values.dim() == 0 else values[mask]).isfinite().all())


def tensors_of(inputs) -> dict[str, Tensor]:
    """Every tensor that a rollout or a batch holds, the hidden states included."""
    held = {name: value for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    if getattr(inputs, "transcript", None) is not None:
        held |= {f"transcript {name}": value for name, value in vars(inputs.transcript).items()}
    return held | {"hidden": inputs.hidden()}


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a.detach(), nan=1e33), torch.nan_to_num(b.detach(), nan=1e33))


@every_term_and_variant
def test_inputs_and_the_global_generators_are_untouched(term: Term):
    step = spoilt(make_step())
    view, batch = rollout(step), token_batch(step)
    before = [{name: value.detach().clone() for name, value in tensors_of(x).items()} for x in (view, batch)]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    memory: dict = {}
    first = first_stage(term, view, memory)
    carried = {name: value.clone() for name, value in (first.columns | first.shared).items()}
    second_stage(term, batch, first, memory)
    assert torch.equal(torch.get_rng_state(), torch_state) and (np.random.get_state()[1] == numpy_state).all()
    # the state of Python's generator says nothing here: the shape checker itself draws from it
    assert "random" not in vars(sys.modules[type(term).__module__])
    for inputs, values in zip((view, batch), before, strict=True):
        for name, value in tensors_of(inputs).items():
            assert same(value, values[name]), name
    for name, value in (first.columns | first.shared).items():
        assert same(value, carried[name]), name


@every_term_and_variant
def test_gradient_comes_from_the_policy_alone(term: Term):
    step = make_step()
    # were it to leak, a gradient would reach these three; beside them only the leaves of the batch carry one
    names = ("old_logps", "old_entropy", "old_hidden")
    step = replace(step, **{name: getattr(step, name).clone().requires_grad_() for name in names})
    batch, advantages, asked = both_stages(term, step)
    assert not advantages.requires_grad
    for loss in asked.losses.values():
        token_mean(loss, batch.mask).backward()
        assert any(leaf.grad is not None for leaf in leaves(batch).values()), "a loss without gradient trains nothing"
    # kl_cov's drift is taken from old_logps, which the trainers hand over detached
    assert step.old_entropy.grad is None and step.old_hidden.grad is None


@every_term_and_variant
def test_coef_0_is_absence(term: Term):
    batch, advantages, asked = both_stages(term, make_step(), coef=0.0)
    assert asked.advantages is None and asked.losses == {}
    assert torch.equal(advantages, batch.advantages)
    assert asked.metrics["link/affected"].sum() == 0


def with_tools(step: Step) -> Step:
    """A tool wrote the third token of every response that has one."""
    mask = step.mask.clone()
    mask[:, 2] = False
    return replace(step, mask=mask)


@every_term_and_variant
def test_it_does_something(term: Term):
    step, memory = with_tools(make_step()), {}
    first_stage(term, rollout(with_tools(make_step(1))), memory)  # some act from what earlier steps left
    if isinstance(term, RightKl):  # it compares a response with itself when it was first sampled
        first_stage(term, rollout(replace(step, old_logps=step.old_logps / 2)), memory)
    if isinstance(term, NoLoss):  # it compares a prompt's success with that of its first rollout
        memory.clear()
        first_stage(term, rollout(replace(step, rewards=torch.ones(8))), memory)
    if isinstance(term, UnsolvedKl):  # the reference of these batches is the policy that sampled
        drifted = first_stage(term, replace(rollout(step), ref_logps=step.old_logps - 1), {}).advantages
        assert drifted is not None and drifted[step.mask].max() < step.advantages.max() - 0.4
        return
    _, _, asked = both_stages(term, step, memory=memory)
    if term.is_diagnostic:
        first = first_stage(term, rollout(step), {})
        said = {*first.metrics, *asked.metrics} - {"link/affected"}
        assert said or asked.on_hidden_gradient
        assert asked.metrics["link/affected"].sum() == 0 and asked.losses == {} and asked.advantages is None
    else:
        assert asked.metrics["link/affected"].sum() > 0


def cut(term: Term, step: Step, pieces: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, list[Outcome]]:
    """Advantages (N, T) of the whole step, the sum of its token losses, and what each micro-batch asked for."""
    memory: dict = {}
    first = first_stage(term, rollout(step), memory)
    advantages, total, outcomes = torch.full(step.mask.shape, math.nan), torch.zeros(()), []
    for rows in pieces.values():
        batch = token_batch(step, rows)
        outcome = second_stage(term, batch, first, memory, rows)
        given = batch.advantages if first.advantages is None else per_token(first.advantages[rows], batch.mask)
        advantages[rows] = given if outcome.advantages is None else outcome.advantages
        for loss in outcome.losses.values():
            total = total + torch.where(batch.mask, loss, 0).sum().detach()
        outcomes.append(outcome)
    return advantages, total, outcomes


SHUFFLED = torch.tensor([5, 0, 7, 2, 1, 6, 4, 3])  # TRL shuffles a generation batch before it splits it


@every_term
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_do_not_change_the_step(term: Term, size: int):
    step = make_step()
    whole, whole_loss, _ = cut(term, step, {"all": torch.arange(8)})
    parts, parts_loss, _ = cut(term, step, {str(i): rows for i, rows in enumerate(SHUFFLED.split(size))})
    assert torch.equal(parts, whole)
    torch.testing.assert_close(parts_loss, whole_loss)


@every_term
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("edge", ["all busy", "one without tokens"])
def test_processes_do_not_change_the_step(term: Term, count: int, edge: str):
    step = make_step()
    if edge == "one without tokens":  # its shapes and calls must still match those of the others
        step = replace(step, mask=step.mask & (torch.arange(8) < 8 - 8 // count).unsqueeze(1))
    alone_memory: dict = {}
    alone = first_stage(term, rollout(step), alone_memory)
    # the later half of the responses has at most 5 tokens, so its processes hold narrower batches
    widths = [6] * (count // 2) + [5] * (count // 2)
    processes = Processes(count)
    views, memories = processes.views(step, widths), [{} for _ in range(count)]
    together = processes.run(lambda rank: first_stage(term, views[rank], memories[rank]))
    for memory in memories:
        for name, value in memory.items():
            is_tensor, other = isinstance(value, Tensor), memories[0][name]
            assert torch.equal(value, other) if is_tensor else value == other, name
    assert memories[0].keys() == alone_memory.keys()
    for name, column in alone.columns.items():
        pieces = torch.cat(
            [fit(each.columns[name], column.size(1)) if column.dim() == 2 else each.columns[name] for each in together]
        )
        # a weight near 0 may be 1 less something near 1: rounding is that of 1
        assert torch.equal(pieces, column) or torch.allclose(pieces, column, atol=1e-6), name
    for name, value in alone.shared.items():
        for each in together:  # summed in another order
            torch.testing.assert_close(each.shared[name], value)
    if alone.advantages is not None:
        shaped = [each.advantages if each.advantages.dim() == 1 else fit(each.advantages, 6) for each in together]
        whole = torch.where(step.mask, alone.advantages, 0.0) if shaped[0].dim() == 2 else alone.advantages
        pieces = torch.where(step.mask, torch.cat(shaped), 0.0) if shaped[0].dim() == 2 else torch.cat(shaped)
        assert torch.equal(pieces, whole)
    for name, metric in alone.metrics.items():
        if isinstance(metric, Tensor) and metric.dim() == 0:
            mean = torch.stack([each.metrics[name] for each in together]).mean()
            # float64 metrics sum tokens' float32 values, so the rounding is float32's
            torch.testing.assert_close(mean, metric, rtol=1.3e-6, atol=1e-7)
