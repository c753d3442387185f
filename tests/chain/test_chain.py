"""Order, interpolation and refusals of a chain; the terms here are made up so that every number can be told by hand."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from hclm_rl import Chain, Constant, Effect, Link, NotFinite, Rollout, RolloutEffect, StepToTarget, Term, TokenBatch
from hclm_rl.chain.chain import Outcome, RolloutOutcome, blend, per_token

from ..term_batches import always_the_same, centred, make_step, rollout, token_batch

STEP = make_step()


@dataclass(frozen=True, kw_only=True)
class Shaper(Term):
    """Applies a function to the advantages of one stage."""

    shape: Callable[[Tensor], Tensor]
    stage: int = 2

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        return RolloutEffect(advantages=self.shape(rollout.advantages)) if self.stage == 1 else RolloutEffect()

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        return Effect(advantages=self.shape(batch.advantages)) if self.stage == 2 else Effect()


@dataclass(frozen=True, kw_only=True)
class RewardShaper(Term):
    """Adds a number to the reward of every response but the first."""

    bonus: float

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        rewards = rollout.rewards + self.bonus
        rewards[0] = rollout.rewards[0]
        return RolloutEffect(rewards=rewards)


@dataclass(frozen=True, kw_only=True)
class Says(Term):
    """Asks for just what it was made with."""

    first: RolloutEffect = field(default_factory=RolloutEffect)
    second: Effect = field(default_factory=Effect)

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        return self.first

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        return self.second


@dataclass(frozen=True, kw_only=True)
class Remembers(Term):
    """Writes down what it was given."""

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        memory["rewards"], memory["groups"] = rollout.rewards.tolist(), rollout.group_rewards.tolist()
        memory["advantages"], memory["drawn"] = rollout.advantages.tolist(), rollout.generator.initial_seed()
        return RolloutEffect(columns={"row": torch.arange(8.0)}, shared={"answer": torch.tensor(42.0)})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        memory["columns"] = {name: column.tolist() for name, column in batch.columns.items()}
        memory["shared"], memory["given"] = {k: v.item() for k, v in batch.shared.items()}, batch.advantages
        return Effect()


def chain_of(**terms: Term) -> Chain:
    return Chain(tuple(Link(name=name, term=term, coef=Constant(coefficient=1.0)) for name, term in terms.items()))


def stage_one(
    chain: Chain, coef: float = 1.0, memories: dict | None = None, view: Rollout | None = None
) -> RolloutOutcome:
    names = [link.name for link in chain.links]
    memories = {name: {} for name in names} if memories is None else memories
    coefs = dict.fromkeys(names, coef)
    return chain.on_rollout(
        view or rollout(STEP), memories, coefs, always_the_same, lambda r: (centred(r, 4), torch.full_like(r, 2.0))
    )


def stage_two(chain: Chain, coef: float = 1.0, memories: dict | None = None, **changes: object) -> Outcome:
    names = [link.name for link in chain.links]
    memories = {name: {} for name in names} if memories is None else memories
    before = {name: torch.zeros_like(STEP.mask) for name in names}
    return chain(token_batch(STEP, **changes), memories, dict.fromkeys(names, coef), always_the_same, before)


def test_an_empty_chain_asks_for_nothing():
    first, second = stage_one(Chain()), stage_two(Chain())
    assert first.advantages is None and second.advantages is None
    assert first.columns == first.shared == first.metrics == first.affected == second.losses == second.metrics == {}


@pytest.mark.parametrize("stage", [1, 2])
def test_terms_act_from_left_to_right(stage):
    doubled, raised = Shaper(shape=lambda a: 2 * a, stage=stage), Shaper(shape=lambda a: a + 1, stage=stage)
    run = stage_one if stage == 1 else stage_two
    stock = STEP.advantages if stage == 1 else per_token(STEP.advantages, STEP.mask)
    for chain, expected in (
        (chain_of(doubled=doubled, raised=raised), 2 * stock + 1),
        (chain_of(raised=raised, doubled=doubled), 2 * (stock + 1)),
    ):
        advantages = run(chain).advantages
        at = STEP.mask if stage == 2 else slice(None)
        assert torch.equal(advantages[at], expected[at])


@pytest.mark.parametrize("stage", [1, 2])
def test_coef_is_the_share_of_the_way(stage):
    run = stage_one if stage == 1 else stage_two
    chain = chain_of(four=Shaper(shape=lambda a: torch.full_like(a, 4.0), stage=stage))
    stock = STEP.advantages if stage == 1 else per_token(STEP.advantages, STEP.mask)
    at = STEP.mask if stage == 2 else slice(None)
    assert run(chain, coef=0.0).advantages is None
    assert torch.equal(run(chain, coef=1.0).advantages[at], torch.full_like(stock, 4.0)[at])
    # half way: (stock + 4) / 2
    torch.testing.assert_close(run(chain, coef=0.5).advantages[at], (stock / 2 + 2)[at])


def test_the_ends_of_the_way_are_exact():
    # 0.1 + 1 * (0.3 - 0.1) is not 0.3 in floating point, and an infinity has no way to it
    stock, shaped = torch.tensor([0.1, math.inf]), torch.tensor([0.3, 0.0])
    assert blend(stock, shaped, 0.0) is stock and blend(stock, shaped, 1.0) is shaped


def test_a_quarter_of_the_way_is_nearer_to_stock():
    # 2 + (6 - 2) / 4 = 3; at one half it would not show which end is which
    assert blend(torch.tensor([2.0]), torch.tensor([6.0]), 0.25).tolist() == [3.0]
    wide, shaped = torch.tensor([[2.0, 4.0]]), torch.tensor([6.0])
    assert blend(wide, shaped, 0.25).tolist() == [[3.0, 4.5]]
    assert blend(shaped, wide, 0.25).tolist() == [[5.0, 5.5]]


@pytest.mark.parametrize("coef", [1.0, 0.25])
def test_what_a_link_leaves_out_has_no_reward_for_those_after_it(coef):
    is_left_out = torch.arange(8) == 2
    stock = rollout(STEP).rewards.tolist()
    memories: dict = {"leaves": {}, "after": {}}
    leaves = Says(first=RolloutEffect(rewards=torch.tensor(stock), is_left_out=is_left_out))
    outcome = stage_one(chain_of(leaves=leaves, after=Remembers()), coef=coef, memories=memories)
    expected = [*stock[:2], math.nan, *stock[3:]]
    for seen in (outcome.rewards.tolist(), memories["after"]["rewards"]):
        assert seen == pytest.approx(expected, nan_ok=True)
    for row in outcome.group_rewards.tolist()[:4]:
        assert row == pytest.approx(expected[:4], nan_ok=True)
    assert outcome.group_rewards[4:].tolist() == [stock[4:]] * 4


def test_a_coefficient_that_reads_the_sampled_entropy_needs_the_scoring_pass():
    gated = StepToTarget(target=0.2, rule="paper")
    assert Chain((Link(name="a", term=Says(), coef=gated),)).needs_scores
    assert not chain_of(a=Says()).needs_scores


def test_advantages_per_response_and_per_token_mix():
    weights = STEP.mask.cumsum(1).float()  # 1, 2, 3, ... along each response
    widened = Shaper(shape=lambda a: a.unsqueeze(1) * weights, stage=1)
    narrow = Shaper(shape=lambda a: torch.zeros(8), stage=1)
    half = stage_one(chain_of(widened=widened), coef=0.5).advantages
    torch.testing.assert_close(half[STEP.mask], (STEP.advantages.unsqueeze(1) * (1 + weights) / 2)[STEP.mask])
    # and back: half of (A w) and half of 0, after the first link went all the way
    chain = chain_of(widened=widened, narrow=narrow)
    coefs = {"widened": 1.0, "narrow": 0.5}
    both = chain.on_rollout(rollout(STEP), {"widened": {}, "narrow": {}}, coefs, always_the_same, lambda r: (r, r))
    torch.testing.assert_close(both.advantages[STEP.mask], (STEP.advantages.unsqueeze(1) * weights / 2)[STEP.mask])


def test_a_loss_keeps_its_gradient_and_is_absent_at_coef_0():
    loss = torch.ones(8, 6, requires_grad=True)
    chain = chain_of(says=Says(second=Effect(loss=loss)))
    outcome = stage_two(chain, coef=0.3)
    assert outcome.losses["says"] is loss  # the trainer multiplies by the coefficient
    assert outcome.metrics["says/affected"].sum() == 32  # of 48 slots, those that count
    assert stage_two(chain, coef=0.0).losses == {}


def test_affected_counts_the_tokens_that_changed():
    first = torch.arange(8).unsqueeze(1).expand(8, 6) == 0  # the first response: six tokens, all count
    chain = chain_of(zeroed=Shaper(shape=lambda a: torch.where(first, 0.0, a)), idle=Shaper(shape=lambda a: 1.0 * a))
    metrics = stage_two(chain).metrics
    assert metrics["zeroed/affected"].sum() == 6 and metrics["idle/affected"].sum() == 0
    # stage 1 hands over what it changed: response 7, with five tokens
    before = {"says": (torch.arange(8) == 7).unsqueeze(1) & STEP.mask}
    chain = chain_of(says=Says())
    outcome = chain(token_batch(STEP), {"says": {}}, {"says": 1.0}, always_the_same, before)
    assert outcome.metrics["says/affected"].sum() == 5


def test_each_link_gets_its_own_columns_memory_and_generator():
    chain, memories = chain_of(a=Remembers(), ab=Remembers()), {"a": {}, "ab": {}}
    outcome = stage_one(chain, memories=memories)
    assert sorted(outcome.columns) == ["a/row", "ab/row"] and sorted(outcome.shared) == ["a/answer", "ab/answer"]
    stage_two(chain, memories=memories, columns=outcome.columns, shared=outcome.shared)
    for memory in memories.values():
        assert memory["columns"] == {"row": list(range(8))} and memory["shared"] == {"answer": 42.0}
        assert memory["drawn"] == 7


def test_shaped_rewards_reach_groups_advantages_and_the_links_after():
    memories: dict = {"bonus": {}, "after": {}}
    outcome = stage_one(chain_of(bonus=RewardShaper(bonus=1.0), after=Remembers()), coef=0.5, memories=memories)
    # rewards (1, 0, .5, 0 | 1, 1, .25, 0), half of a bonus of 1 to all but the first
    shaped = [1.0, 0.5, 1.0, 0.5, 1.5, 1.5, 0.75, 0.5]
    assert memories["after"]["rewards"] == shaped
    assert memories["after"]["groups"] == [shaped[:4]] * 4 + [shaped[4:]] * 4
    # the base algorithm here centres: group means 0.75 and 1.0625
    expected = [r - 0.75 for r in shaped[:4]] + [r - 1.0625 for r in shaped[4:]]
    assert outcome.advantages.tolist() == memories["after"]["advantages"] == pytest.approx(expected)
    assert stage_one(chain_of(bonus=RewardShaper(bonus=1.0)), coef=0.0).advantages is None


def test_rewards_may_not_be_shaped_after_advantages():
    chain = chain_of(first=Shaper(shape=lambda a: 2 * a, stage=1), second=RewardShaper(bonus=1.0))
    with pytest.raises(ValueError) as error:
        stage_one(chain)
    assert str(error.value) == (
        "'second' shapes rewards, which sets the advantages anew and would undo 'first' before it; put terms that "
        "shape rewards first"
    )
    assert stage_one(chain, coef=0.0).advantages is None  # absent links undo nothing


def bad(shape: tuple[int, ...], value: float, at: tuple[int, ...]) -> Tensor:
    out = torch.zeros(shape)
    out[at] = value
    return out


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "stage, quantity, make",
    [
        (1, "rewards", lambda v: Says(first=RolloutEffect(rewards=bad((8,), v, (3,))))),
        (1, "advantages", lambda v: Says(first=RolloutEffect(advantages=bad((8,), v, (3,))))),
        (1, "advantages", lambda v: Says(first=RolloutEffect(advantages=bad((8, 6), v, (0, 5))))),
        (1, "column 'c'", lambda v: Says(first=RolloutEffect(columns={"c": bad((8,), v, (7,))}))),
        (1, "column 'c'", lambda v: Says(first=RolloutEffect(columns={"c": bad((8, 6), v, (0, 5))}))),
        (1, "shared 's'", lambda v: Says(first=RolloutEffect(shared={"s": bad((2, 2), v, (1, 0))}))),
        (2, "advantages", lambda v: Says(second=Effect(advantages=bad((8, 6), v, (0, 5))))),
        (2, "loss", lambda v: Says(second=Effect(loss=bad((8, 6), v, (0, 5))))),
        (2, "loss", lambda v: Says(second=Effect(loss=torch.tensor(v)))),
    ],
)
def test_what_is_not_finite_stops_with_link_step_and_quantity(stage, quantity, make, value):
    run = stage_one if stage == 1 else stage_two
    with pytest.raises(NotFinite) as error:
        run(chain_of(culprit=make(value)))
    assert str(error.value) == (
        f"the entropy term 'culprit' produced values that are not finite (or beyond 1e+18) in its {quantity} at step "
        "3; training stopped before the optimiser step, and the weights are those of the step before"
    )


def test_nan_in_the_padding_stops_nothing_and_reaches_nothing():
    # response 6 has one token; the rest of its row is padding
    weights = bad((8, 6), math.nan, (6, 3)) + 2.0
    for run, effect in (
        (stage_one, Says(first=RolloutEffect(advantages=weights, columns={"c": weights}))),
        (stage_two, Says(second=Effect(advantages=weights, loss=weights))),
    ):
        outcome = run(chain_of(says=effect))
        assert outcome.advantages.isfinite().all() and (outcome.advantages[STEP.mask] == 2.0).all()


def test_an_unscored_response_may_stay_so():
    view = replace(rollout(STEP), rewards=bad((8,), math.nan, (3,)))
    shaped = Says(first=RolloutEffect(rewards=bad((8,), math.nan, (3,)) + 1))
    assert stage_one(chain_of(says=shaped), view=view).advantages is not None


def test_a_column_has_one_row_a_response():
    with pytest.raises(ValueError) as error:
        stage_one(chain_of(says=Says(first=RolloutEffect(columns={"c": torch.zeros(3)}))))
    assert str(error.value) == (
        "the entropy term 'says' attached column 'c' with 3 rows to a batch of 8; what is not one row a response "
        "belongs into `shared`"
    )


def test_two_links_may_not_share_a_name():
    link = Link(name="bonus", term=Says(), coef=Constant(coefficient=1.0))
    with pytest.raises(ValueError) as error:
        Chain((link, link))
    assert str(error.value) == (
        "two entropy terms are called 'bonus'; give one of them another name, as in `- bonus: {name: bonus_2}`"
    )


def test_what_comes_after_shaped_rewards_sees_them_their_groups_and_their_scale():
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Looks(Term):
        def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
            seen.append(rollout)
            return RolloutEffect()

    @dataclass(frozen=True, kw_only=True)
    class Doubles(Term):
        def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
            return RolloutEffect(rewards=2 * rollout.rewards)

    outcome = stage_one(chain_of(doubles=Doubles(), looks=Looks()))
    stock = rollout(STEP)
    for given in (seen[0], outcome):
        assert torch.equal(given.rewards, 2 * stock.rewards)
        assert torch.equal(given.group_rewards, 2 * stock.group_rewards)
    assert (seen[0].reward_scale == 2.0).all()  # what `renormalise` gives above
