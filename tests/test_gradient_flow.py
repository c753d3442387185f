"""Where each term's gradient flows, and what each stage looks at: a table with a line for every term, no line spare.

A gradient that reaches the policy on a way that the method does not have is a wrong method that trains: a weight that
was not detached looks like a weight. And a statistic of the sampling policy that is taken from the current one makes
the method another one in the second update on a rollout, where alone it shows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hclm_rl import Rollout, Term, TokenBatch, known_terms
from hclm_rl.chain.chain import Outcome
from hclm_rl.terms.epo import Epo
from hclm_rl.terms.hold_coverage import HoldCoverage
from hclm_rl.terms.no_loss import NoLoss
from hclm_rl.terms.rehearsal import Rehearsal
from hclm_rl.terms.right_anchor import RightAnchor
from hclm_rl.terms.right_kl import RightKl
from hclm_rl.terms.self_imitation import SelfImitation

from .term_batches import (
    first_stage,
    make_step,
    reads_of_batch,
    reads_of_rollout,
    rollout,
    second_stage,
    token_batch,
)
from .test_contract import FOR_PARITY, FORMS, TERMS, with_tools


@dataclass(frozen=True)
class Flow:
    """What a term's card says of its inputs, as space-separated names."""

    gradient: str = ""  # of logps, entropy, hidden: those of the current policy that its added loss trains
    sampling: str = ""  # what stage 1 looks at, of the sampling policy and of the rewards
    current: str = ""  # what stage 2 looks at beside what stage 1 attached


FLOWS = {
    "ares": Flow(gradient="logps", sampling="logps entropy rewards ref_logps", current="logps ref_logps"),
    "arm": Flow(sampling="advantages logps"),  # of the rewards only whether all are 0, which no factor changes
    "attention_entropy": Flow(gradient="hidden", current="hidden"),  # the batches make attention of hidden states
    "bapo": Flow(gradient="logps", current="advantages logps old_logps"),
    "canon": Flow(sampling="entropy rewards"),  # it makes the advantages anew
    "clip_cov": Flow(sampling="advantages logps", current="advantages"),
    "clip_cov, micro_batch": Flow(current="advantages logps old_logps"),
    "coding_rate": Flow(gradient="hidden", sampling="hidden", current="hidden"),
    "conditional_entropy": Flow(current="advantages"),  # answers are scored, and those scores know no input
    "discriminator_clip": Flow(sampling="advantages logps entropy", current="advantages"),
    "discriminator_clip, vocabulary": Flow(sampling="advantages logps entropy hidden", current="advantages"),
    "dqo": Flow(sampling="hidden rewards"),
    "em_rl": Flow(sampling="entropy"),
    "em_rl, group": Flow(sampling="entropy"),
    "empg": Flow(sampling="advantages entropy"),
    "empo": Flow(),  # answers alone
    "entro_pic": Flow(gradient="logps", sampling="logps", current="advantages logps old_logps"),
    "entro_pic, micro_batch": Flow(gradient="logps", current="advantages logps old_logps"),
    "entropy_advantage": Flow(sampling="advantages entropy"),
    "entropy_balanced": Flow(gradient="logps", sampling="entropy", current="advantages logps old_logps entropy"),
    "entropy_balanced, micro_batch": Flow(gradient="logps", current="advantages logps old_logps entropy"),
    "entropy_bonus": Flow(gradient="entropy", current="entropy"),
    "entropy_bonus, by difficulty": Flow(gradient="entropy", sampling="group_rewards", current="entropy"),
    "entropy_flow": Flow(sampling="advantages logps entropy hidden"),
    "entropy_flow, head": Flow(sampling="advantages entropy hidden"),
    "entropy_flow_balance": Flow(sampling="advantages logps entropy", current="advantages"),
    "entropy_flow_balance, exact": Flow(sampling="advantages logps entropy hidden", current="advantages"),
    "epo": Flow(gradient="entropy", sampling="entropy", current="entropy"),
    "exploration_advantage": Flow(current="advantages entropy"),
    "exploration_advantage, sampling": Flow(sampling="advantages entropy"),
    "feature_softmax": Flow(gradient="hidden", current="hidden"),
    "focal": Flow(sampling="advantages group_rewards"),
    "force_reweight": Flow(sampling="advantages logps entropy hidden", current="advantages"),
    "force_reweight, head": Flow(sampling="advantages entropy hidden", current="advantages"),
    "force_reweight, representation": Flow(sampling="advantages hidden", current="advantages"),
    "forking_tokens": Flow(sampling="entropy", current="advantages"),
    "forking_tokens, micro_batch": Flow(current="advantages entropy"),
    "forking_tokens, ties cut": Flow(sampling="entropy", current="advantages"),
    "group_log_det": Flow(sampling="advantages hidden"),
    "group_log_det, answers": Flow(sampling="advantages"),
    "group_log_det, both": Flow(gradient="hidden", sampling="advantages hidden", current="hidden"),
    "group_log_det, force": Flow(gradient="hidden", sampling="hidden", current="hidden"),
    "hicra": Flow(sampling="advantages"),
    "hold_coverage": Flow(gradient="hidden", sampling="logps rewards group_rewards", current="hidden"),
    "info_po": Flow(sampling="advantages logps group_rewards"),
    "information_force": Flow(sampling="hidden"),  # its stage 2 waits for the backward pass
    "kl_cov": Flow(gradient="logps", sampling="advantages logps", current="logps old_logps"),
    "kl_cov, micro_batch": Flow(gradient="logps", current="advantages logps old_logps"),
    "log_det": Flow(gradient="hidden", sampling="hidden", current="hidden"),
    "lp_reg": Flow(gradient="logps", sampling="advantages logps hidden", current="logps old_logps"),
    "lp_reg, micro_batch": Flow(gradient="logps", sampling="logps hidden", current="advantages logps old_logps"),
    "majority_vote": Flow(),  # answers alone
    "mara": Flow(sampling="ref_logps rewards"),
    "max_rl": Flow(sampling="rewards group_rewards"),
    "negative_reinforcement": Flow(sampling="rewards"),
    "negative_reinforcement, kept": Flow(sampling="rewards"),
    "passk_advantage": Flow(sampling="rewards"),
    "passk_advantage, best of k": Flow(sampling="rewards"),
    "outcome_exploration": Flow(sampling="advantages"),  # answers; of the rewards only whether a group is settled
    "outcome_exploration, batch": Flow(sampling="advantages"),
    "no_loss": Flow(sampling="advantages logps rewards"),  # where a group has a right answer nothing is replayed
    "pear": Flow(sampling="entropy rewards"),
    "perplexity_advantage": Flow(sampling="advantages logps"),
    "position_advantage": Flow(current="advantages"),
    "qae": Flow(sampling="rewards group_rewards reward_scale"),
    "rep_exp": Flow(sampling="hidden rewards"),  # the batches make the reference's states of the policy's
    "rep_exp, policy": Flow(sampling="hidden rewards"),
    # stored: the first group now, the second before, so that all have A = 0; then the second alone
    "rehearsal": Flow(gradient="hidden", sampling="logps rewards", current="hidden"),
    "rehearsal, not of all": Flow(gradient="hidden", sampling="advantages", current="hidden"),
    "repo": Flow(current="advantages logps"),
    "repo, centred": Flow(current="advantages logps entropy"),
    "right_anchor": Flow(gradient="hidden", sampling="logps rewards", current="hidden"),
    "right_anchor, count": Flow(gradient="hidden", sampling="logps rewards", current="hidden"),
    "right_anchor, log_det": Flow(gradient="hidden", sampling="hidden logps rewards", current="hidden"),
    "right_kl": Flow(sampling="advantages logps rewards"),
    "self_imitation": Flow(gradient="hidden", sampling="advantages logps rewards group_rewards", current="hidden"),
    "simko": Flow(gradient="hidden logps", sampling="entropy", current="advantages logps old_logps hidden"),
    "simko, micro_batch": Flow(gradient="hidden logps", current="advantages logps old_logps entropy hidden"),
    "siren": Flow(gradient="hidden", sampling="hidden", current="hidden"),
    "siren, micro_batch": Flow(gradient="hidden", current="hidden"),
    "spectrum": Flow(sampling="hidden"),
    "steer": Flow(sampling="advantages logps entropy", current="advantages logps old_logps"),
    "steer, exact": Flow(sampling="advantages logps entropy hidden", current="advantages logps old_logps"),
    "steer, micro_batch": Flow(sampling="entropy", current="advantages logps old_logps"),
    "tea": Flow(gradient="entropy", sampling="advantages logps", current="entropy"),
    "tea, micro_batch": Flow(gradient="entropy", current="advantages logps entropy"),
    "tea, weight gradient": Flow(gradient="entropy logps", current="advantages logps entropy"),
    "tool_bonus": Flow(sampling="rewards"),
    "unsolved_kl": Flow(sampling="advantages logps ref_logps"),  # of the rewards only whether one is right
    "uniform_correct": Flow(sampling="advantages logps rewards"),
    "unlikeliness": Flow(sampling="logps rewards"),
    "variance": Flow(gradient="hidden", sampling="hidden", current="hidden"),
    "von_neumann": Flow(gradient="hidden", sampling="hidden", current="hidden"),
    # the threshold of its windows, the kind of prompt, the KL's strength; no vocabulary, no advantages
    # what they keep for later and where the bar lies; replays hang on the batches' hidden states
}
CASES = TERMS | FORMS | FOR_PARITY
every_case = pytest.mark.parametrize("name", sorted(CASES))


def test_every_term_has_its_line():
    missing, spare = sorted(CASES.keys() - FLOWS.keys()), sorted(FLOWS.keys() - CASES.keys())
    assert not missing, f"say in FLOWS where the gradient of {missing} flows and what they look at"
    assert not spare, f"FLOWS speaks of {spare}, which are not there"
    assert known_terms() == sorted(TERMS)


def floats_of(inputs: Rollout | TokenBatch) -> dict[str, Tensor]:
    """Every tensor of numbers that a stage is given, the hidden states included."""
    held = {name: value for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    return {name: value for name, value in held.items() if value.is_floating_point()} | {"hidden": inputs.hidden()}


def with_input(inputs, name: str, change: Callable[[Tensor], Tensor], head: Tensor):
    """The same inputs with one of them changed; with the hidden states, all that is made of them by the `head`."""
    if name != "hidden":
        return replace(inputs, **{name: change(getattr(inputs, name))})
    states = change(inputs.hidden())
    if isinstance(inputs, TokenBatch):
        return replace(inputs, **reads_of_batch(states, inputs.mask, head))
    return replace(inputs, **reads_of_rollout(states, inputs.ids, head))


def leaves_of(batch: TokenBatch) -> dict[str, Tensor]:
    """What may carry a gradient of the current policy."""
    return {"logps": batch.logps, "entropy": batch.entropy, "hidden": batch.hidden()}


def gradients(outcome: Outcome, mask: Tensor, of: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the sum of the added losses over the tokens that count; without those that are not reached, or by nothing."""
    total = sum(loss if loss.dim() == 0 else torch.where(mask, loss, 0).sum() for loss in outcome.losses.values())
    if not isinstance(total, Tensor):
        return {}
    found = torch.autograd.grad(total, tuple(of.values()), allow_unused=True)
    return {name: each for name, each in zip(of, found, strict=True) if each is not None and each.any()}


@every_case
def test_gradient_flows_where_it_should_and_nowhere_else(name: str):
    step = with_tools(make_step(dtype=torch.float64))
    view, batch, memory = rollout(step), token_batch(step), earlier(CASES[name])
    for each in floats_of(view):
        view = with_input(view, each, lambda x: x.clone().requires_grad_(), step.head)
    # the trainers hand over the log-probs of the sampling policy and of the reference as constants, and terms take
    # differences to them
    for each in floats_of(batch).keys() - {"old_logps", "ref_logps", "advantages"}:
        batch = with_input(batch, each, lambda x: x.detach().clone().requires_grad_(), step.head)
    outcome = second_stage(CASES[name], batch, first_stage(CASES[name], view, memory), memory)
    assert outcome.advantages is None or not outcome.advantages.requires_grad
    now = {each: value for each, value in floats_of(batch).items() if value.requires_grad}
    before = {f"{each} of the sampling policy": value for each, value in floats_of(view).items()}
    reached = gradients(outcome, batch.mask, now | before)
    assert reached.keys() == set(FLOWS[name].gradient.split())
    for each, gradient in reached.items():
        assert not gradient[~batch.mask].any(), f"padding gets a gradient in {each}"


def moved(x: Tensor) -> Tensor:
    """Other numbers of the same kind: each its own factor between 0.4 and 1.6, so the sign of a log-prob stays."""
    source = torch.Generator().manual_seed(11)
    factors = 0.4 + 1.2 * torch.rand(x.shape, generator=source, dtype=x.dtype)
    return (x.detach() * factors).requires_grad_(x.requires_grad)


def moved_in(inputs, name: str, head: Tensor):
    """The same inputs with other numbers in one of them; advantages turn their sign too."""
    return with_input(inputs, name, lambda x: -moved(x) if name == "advantages" else moved(x), head)


def of_stage_one(term: Term, view: Rollout) -> dict[str, Tensor]:
    """All that stage 1 asks for and passes on; of a diagnostic, what it logs."""
    memory = earlier(term)
    effect = term.on_rollout(replace(view, generator=torch.Generator().manual_seed(1)), memory)
    asked = {"rewards": effect.rewards, "advantages": effect.advantages}
    asked |= {f"memory {key}": as_tensor(value) for key, value in memory.items()}
    logged = effect.metrics if term.is_diagnostic else {}
    asked |= {**effect.columns, **effect.shared, **logged}
    return {name: value for name, value in asked.items() if isinstance(value, Tensor)}


def as_tensor(value) -> Tensor:
    """What a memory holds, so that it can be compared; counts by name as their text."""
    return torch.as_tensor(list(repr(value).encode()) if isinstance(value, dict) else value, dtype=torch.float64)


def of_stage_two(term: Term, view: Rollout, batch: TokenBatch) -> dict[str, Tensor]:
    """The advantages, the added losses and their gradients."""
    memory = earlier(term)
    outcome = second_stage(term, batch, first_stage(term, view, memory), memory)
    asked = {f"loss of {link}": loss.detach() for link, loss in outcome.losses.items()}
    asked |= {} if outcome.advantages is None else {"advantages": outcome.advantages}
    return asked | gradients(outcome, batch.mask, leaves_of(batch))


def earlier(term: Term) -> dict:
    """A memory where a rule needs an earlier step: epo's band, what is replayed from it."""
    memory: dict = {"entropy_sum": 1.0, "steps": 1} if isinstance(term, Epo) else {}
    if isinstance(term, SelfImitation | RightAnchor | HoldCoverage | Rehearsal):
        # of what is judged once, and then stored, the first group is still to come
        rows = slice(4, 8) if isinstance(term, Rehearsal) else slice(None)
        first_stage(term, rollout(with_tools(make_step(7, torch.float64)), rows), memory)
    if isinstance(term, HoldCoverage):
        memory["strength"] = 1.0  # it begins at 0
    if isinstance(term, NoLoss):
        step = with_tools(make_step(7, torch.float64))
        first_stage(term, rollout(replace(step, rewards=torch.ones(8).double())), memory)
    if isinstance(term, RightKl):  # it compares a response with itself when it was first sampled
        for seed in range(3):
            step = with_tools(make_step(seed, torch.float64))
            first_stage(term, rollout(replace(step, old_logps=step.old_logps / 2)), memory)
    return memory


def looked_at(name: str, seed: int) -> tuple[set[str], set[str]]:
    """The inputs of stage 1 and of stage 2 without which they would ask for something else."""
    term, step = CASES[name], with_tools(make_step(seed, torch.float64))
    view, batch = rollout(step), token_batch(step)
    first, second = of_stage_one(term, view), of_stage_two(term, view, batch)
    sampling = {
        each for each in floats_of(view) if not same(first, of_stage_one(term, moved_in(view, each, step.head)))
    }
    after = {each: moved_in(batch, each, step.head) for each in floats_of(batch)}
    current = {each for each, other in after.items() if not same(second, of_stage_two(term, view, other))}
    return sampling, current


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@every_case
def test_each_stage_looks_at_what_it_should_and_at_nothing_else(name: str):
    seen = [looked_at(name, seed) for seed in range(3)]  # on one batch a selection may stay the same by chance
    sampling, current = (set().union(*each) for each in zip(*seen, strict=True))
    assert sampling == set(FLOWS[name].sampling.split())
    assert current == set(FLOWS[name].current.split())
