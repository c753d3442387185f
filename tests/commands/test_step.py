"""The step that the doctor speaks of: forces at the parameters, Adam's preconditioner, and steps that are measured."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hclm_rl.commands import dry_run as dry_runs
from hclm_rl.commands import replay, stored, trial
from hclm_rl.commands.diagnosis import Balance, Force, change_of_this, recommended
from hclm_rl.commands.doctor import examine
from hclm_rl.commands.dry_run import DryRun, Sizes, dry_run, memory_of, preconditioner, sizes
from hclm_rl.commands.pulled_back import alone, pull_back, rows_of
from hclm_rl.commands.replay import divisor, divisor_after, step_taken, with_more
from hclm_rl.commands.stored import Stored
from hclm_rl.commands.trial import Tried
from hclm_rl.equations.expectations import Estimate, inner
from hclm_rl.equations.forces import SURROGATES, step_force
from hclm_rl.recipe.arguments import parse
from hclm_rl.trainer.keeping import Kept, keeping_rollouts

from ..tiny import make
from .test_doctor import of, recipe

RATE, BETAS, EPS = 0.1, (0.9, 0.95), 1e-8
REMAINDER = 0.04  # of the change, that first order does not say of a small step


def small_run(updates: int = 1, most: float = 0.0, gradients: tuple = ((1.0, -2.0), (3.0, 2.0))) -> DryRun:
    """Two weights under Adam, and two steps whose gradients are given; no model."""
    weights = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.AdamW([weights], lr=0.0, betas=BETAS, eps=EPS, weight_decay=0.0)
    args = SimpleNamespace(max_grad_norm=most)
    run = DryRun(
        trainer=SimpleNamespace(optimizer=optimizer, args=args), parameters=[weights], updates=updates, recipe_rate=RATE
    )
    for gradient in gradients:
        weights.grad = torch.tensor(gradient)
        run.log.append({"grad_norm": weights.grad.norm().item()})
        optimizer.step()
        run.gradients.append(run.keep())
    return run


def test_the_preconditioner_is_what_adam_divides_by():
    run = small_run()
    [found], note = preconditioner(run)
    # v after two steps, bias taken out: (.95 * .05 a^2 + .05 b^2) / (1 - .95^2), a, b = 1, 3 and -2, 2
    squares = [(0.95 * 0.05 * 1 + 0.05 * 9) / (1 - 0.95**2), 4.0]
    assert found.tolist() == pytest.approx([1 / math.sqrt(x) for x in squares], rel=1e-5) and note == ""
    before = run.parameters[0].detach().clone()
    with step_taken(run, run.gradients, RATE):
        moved = run.parameters[0].detach() - before
    # m after two steps, bias taken out: (.9 a + b) / 1.9
    mean = torch.tensor([(0.9 * 1 + 3) / 1.9, (0.9 * -2 + 2) / 1.9])
    torch.testing.assert_close(moved, -RATE * found * mean)


def test_everything_is_put_back_after_a_step():
    run = small_run()
    optimizer = run.trainer.optimizer
    before = run.parameters[0].detach().clone()
    moments = {key: value.clone() for key, value in optimizer.state[run.parameters[0]].items()}
    with step_taken(run, run.gradients, RATE):
        assert not torch.equal(run.parameters[0], before)
    assert torch.equal(run.parameters[0], before) and optimizer.param_groups[0]["lr"] == 0.0
    after = optimizer.state[run.parameters[0]]
    assert all(torch.equal(after[key], value) for key, value in moments.items())


def test_a_step_and_its_opposite_tell_the_bend(monkeypatch: pytest.MonkeyPatch):
    # H = |w|^2 on others, 3 |w|^2 on the step's own: a step d from w bends by |d|^2 and does 2 w d straight on
    run = small_run()
    run.others, run.own = [None], [None, None]  # type: ignore[list-item]

    def values(run: DryRun, kept: list, memories: dict) -> dict:
        of = run.parameters[0].detach().double().square().sum()
        return dict.fromkeys(memories, torch.stack([of * (3 if kept is run.own else 1)] * 2))

    monkeypatch.setattr(trial, "values", values)
    start = run.parameters[0].detach().clone()
    with step_taken(run, run.gradients, RATE):
        d = (run.parameters[0].detach() - start).double()
    straight, bend = (2 * start * d).sum().item(), d.square().sum().item()
    before = values(run, run.others, {"log_det": {}}), values(run, run.own, {"log_det": {}})
    change = trial.changes(run, run.gradients, {"log_det": {}}, before)["log_det"]
    assert torch.equal(run.parameters[0], start)
    assert change.others.value == pytest.approx(straight + bend, rel=1e-5)
    assert change.own == pytest.approx(3 * (straight + bend), rel=1e-5)
    told = trial.tried("a step", 0.1, Estimate(straight, 0.0), change)
    assert (told.straight, told.bend) == pytest.approx((straight, bend), rel=1e-4)
    # d is about (-.091, -.005): straight -.203, bend .008
    assert not told.is_bent and replace(told, bend=told.straight / 2, realised=1.5 * told.straight).is_bent
    # a step so small that what is measured is rounding bends nothing
    assert not replace(told, bend=told.straight / 2, bend_error=abs(told.straight) / 2).is_bent


def test_a_gradient_that_is_rounding_counts_as_nothing_where_no_rewards_differed():
    # the term's (3, 4), and beside it a thousandth of it in one step, a tenth in the other
    def run_of(reward_std: float) -> DryRun:
        run = small_run(gradients=((3.003, 4.004), (3.3, 4.4)))
        for entry in run.log:
            entry["reward_std"] = reward_std
        return run

    force = [[torch.tensor([3.0, 4.0])]] * 2
    without = [each.tolist() for [each] in with_more(run_of(0.0), force, 1.0).each]
    assert without[0] == [0.0, 0.0] and without[1] == pytest.approx([0.3, 0.4], rel=1e-5)
    assert with_more(run_of(0.5), force, 1.0).each[0][0].tolist() == pytest.approx([3e-3, 4e-3], rel=1e-3)


def test_where_no_rewards_differ_a_step_without_the_term_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "all_alike.py").write_text("def reward(completions, **_):\n    return [1.0] * len(completions)\n")
    line = [*recipe(tmp_path, "[{log_det: {coef: 1.0e-3}}]"), "--reward_funcs", "all_alike.reward"]
    found = examine([*line, "--allow_custom_code", "true"], prompts=2, steps=2, tries=True)
    force = of(found.forces, "log_det")
    assert force.regime == "not known" and force.gradient == 0.0 and force.change_without == 0.0
    assert by(force, "without its term").realised == 0.0 and not has_critical(force)
    assert any("no group of the dry run had different rewards" in note for note in found.notes)
    assert any("2 dry steps do not tell a gradient from its noise" in note for note in found.notes)


def test_other_optimisers_are_named():
    run = small_run()
    run.trainer.optimizer = torch.optim.SGD(run.parameters, lr=0.0)
    assert preconditioner(run) == (None, "")
    run.trainer.optimizer = torch.optim.Adagrad(run.parameters, lr=0.0)
    assert preconditioner(run)[1].startswith("the optimiser Adagrad keeps no second moments that can be read")


def test_a_weight_that_no_step_moves_has_no_part():
    run = small_run(gradients=((1.0, 0.0), (3.0, 0.0)))
    [found], _ = preconditioner(run)
    assert found[1] == 0.0 and found[0] > 0


def test_more_of_a_term_under_a_clipped_gradient():
    # norms 5 and 1 under a limit of 2: shares .4 and 1, so the kept gradients are (1.2, 1.6) and (0, 1)
    run = small_run(most=2.0, gradients=((3.0, 4.0), (0.0, 1.0)))
    run.gradients = [[torch.tensor([1.2, 1.6])], [torch.tensor([0.0, 1.0])]]
    force = [[torch.tensor([3.0, 1.0])], [torch.tensor([0.0, -1.0])]]
    # with one more: (3, 4) - (3, 1) = (0, 3), clipped to (0, 2); (0, 1) + (0, 1) = (0, 2), just not clipped
    found = with_more(run, force, 1.0)
    assert [each.tolist() for [each] in found.each] == [
        pytest.approx([0, 2], abs=1e-5),
        pytest.approx([0, 2], abs=1e-5),
    ]
    assert len(found.each) == 2 and len(found.each[0]) == 1
    assert torch.equal(found.each[1][0], found.each[1][0])  # made anew each time
    assert found.shares == pytest.approx([2 / 3, 1.0], rel=1e-5) and found.kept == pytest.approx(5 / 6, rel=1e-5)


def test_a_vector_on_the_disk_is_read_as_it_was_written():
    whole = [torch.randn(3, 5), torch.tensor(2.0), torch.randn(0, 4), torch.randn(7).bfloat16()]
    kept = Stored(iter(whole), torch.bfloat16)
    assert len(kept) == 4 and all(torch.equal(a, b.bfloat16()) for a, b in zip(kept, whole, strict=True))
    assert torch.equal(kept[3], whole[3]) and torch.equal(kept[0], whole[0].bfloat16()), "in any order, and again"


def test_parameters_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stored, "AT_ONCE", 10)
    assert stored.parts([4, 6, 1, 30, 2, 2]) == [[0, 1], [2], [3], [4, 5]]


def large(run: DryRun, monkeypatch: pytest.MonkeyPatch) -> DryRun:
    """The same run, taken for one of a large model whose parameters are looked at one by one."""
    monkeypatch.setattr(dry_runs, "LARGE_FROM", 1)
    monkeypatch.setattr(stored, "AT_ONCE", 1)
    run.trainer.accelerator = SimpleNamespace(scaler=None)
    run.gradients = [run.stored(each, torch.bfloat16) for each in run.gradients]
    assert all(isinstance(each, Stored) for each in run.gradients) and run.is_withheld
    return run


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_a_large_models_step_is_the_same_part_by_part(kind: type, monkeypatch: pytest.MonkeyPatch):
    gradients = (([1.0, -2.0], [0.5]), ([3.0, 2.0], [-1.0]))  # bfloat16 holds these

    def run_of() -> DryRun:
        weights = [torch.nn.Parameter(torch.tensor(of)) for of in ([1.0, 2.0], [3.0])]
        optimizer = kind(weights, lr=0.0, betas=BETAS, eps=EPS, weight_decay=0.1)
        trainer = SimpleNamespace(optimizer=optimizer, args=SimpleNamespace(max_grad_norm=0.0))
        run = DryRun(trainer=trainer, parameters=weights, updates=1, recipe_rate=RATE)
        run.gradients = [[torch.tensor(of) for of in each] for each in gradients]
        run.log = [{"grad_norm": 1.0}] * 2
        return run

    run = run_of()
    expected = divisor_after(run, run.gradients)
    with step_taken(run, run.gradients, RATE):
        moved = [each.detach().clone() for each in run.parameters]
    part_by_part = large(run_of(), monkeypatch)
    found, note = divisor(part_by_part)
    assert isinstance(found, Stored) and note == "" and expected is not None
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with step_taken(part_by_part, part_by_part.gradients, RATE):
        assert all(torch.equal(a, b) for a, b in zip(part_by_part.parameters, moved, strict=True))
    assert not part_by_part.trainer.optimizer.state


def test_what_an_optimiser_does_to_all_parameters_together_is_not_taken_apart(monkeypatch: pytest.MonkeyPatch):
    run = small_run()
    shown: list[list[int]] = []

    class Coupled(torch.optim.AdamW):
        """Stands for one whose step depends on all gradients together."""

    run.parameters.append(torch.nn.Parameter(torch.zeros(1)))
    run.trainer.optimizer = Coupled(run.parameters, lr=0.0)
    run.gradients = [[*each, torch.ones(1)] for each in run.gradients]
    monkeypatch.setattr(stored, "AT_ONCE", 1)
    shown.extend(replay.replayed(run, run.gradients, 0.0))
    assert shown == [[0, 1]]
    run.trainer.optimizer = torch.optim.AdamW(run.parameters, lr=0.0)
    assert list(replay.replayed(run, run.gradients, 0.0)) == [[0], [1]]


def test_a_large_models_page_is_that_of_a_small_one_but_for_the_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    line = recipe(tmp_path, "[{log_det: {coef: 1.0e-3}}]")
    small = of(examine(line, prompts=4, steps=2, tries=True).forces, "log_det")
    monkeypatch.setattr(dry_runs, "LARGE_FROM", 1)
    monkeypatch.setattr(dry_runs, "FEW_ROWS", 5)
    [whole] = examine(line, prompts=4, steps=2, tries=True).forces
    assert whole.surrogate == "log_det"
    for name in ("value", "force_norm", "gradient", "push", "change", "alignment"):
        assert getattr(whole, name) == pytest.approx(getattr(small, name), rel=0.02), name
    size = max(abs(each.realised) for each in small.tried)
    for a, b in zip(whole.tried, small.tried, strict=True):
        # a step by Adam is nearly of signs, and eight bits of a small gradient tell few of them otherwise
        assert (a.what, a.realised) == (b.what, pytest.approx(b.realised, abs=0.1 * size))


def test_advice_by_hand():
    # clear: mean 0.1, error 0.01; 1.1 x 0.1
    assert recommended(Estimate(0.1, 0.01), push=1.0, pull=1.0)[0] == pytest.approx(0.11)
    # negative or unclear: 1.1 x 1e-2 x 3 / 2
    for value, error in ((-0.2, 0.01), (0.2, 0.2)):
        assert recommended(Estimate(value, error), push=2.0, pull=3.0)[0] == pytest.approx(0.0165)
    # critical, but weak
    assert recommended(Estimate(1e-4, 1e-6), push=1.0, pull=1.0)[0] == pytest.approx(0.011)
    # 1.1 x 0.5 is above 0.3
    assert recommended(Estimate(0.5, 0.01), push=1.0, pull=1.0)[0] is None
    assert recommended(None, push=0.0, pull=1.0)[0] is None
    assert recommended(Estimate(0.2, 0.01), push=1.0, pull=0.0)[0] is None


def test_a_balance_by_hand():
    # |F| = 2, |g| = 5, <F, g> = 6, half of it kept
    found = Balance(
        force=Estimate(4.0, 0.1),
        gradient=Estimate(25.0, 1.0),
        product=Estimate(6.0, 0.8),
        own=Estimate(4.0, 0.1),
        kept=0.5,
    )
    assert found.push() == 1.0 and found.pull() == (5.0, True)
    assert found.alignment() == pytest.approx(-0.6)
    critical = found.critical()
    assert critical is not None and critical.value == pytest.approx(3.0)
    # (0.8^2 + (0.5 x 3 x 0.1)^2)^1/2 / 2
    assert critical.error == pytest.approx(math.hypot(0.8, 0.15) / 2)
    # at c: 0.01 (0.5 c 4 - 6), so nothing at 3
    assert [found.change(c, 0.01) for c in (0.0, 3.0, 4.0)] == pytest.approx([-0.06, 0.0, 0.02])
    noise = replace(found, force=Estimate(1.0, 0.6), gradient=Estimate(1.0, 4.0), product=Estimate(0.1, 1.0))
    assert noise.push() == 0.0 and noise.critical() is None and noise.pull() == (2.0, False)


def test_the_change_by_these_very_steps_by_hand():
    # two other batches, two steps with weights 1/4 and 3/4, rate 2, push 3: 2 (3 x own - g) each
    with_g = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    with_own = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    found = change_of_this(with_g, with_own, 3.0, 2.0, torch.tensor([0.25, 0.75], dtype=torch.float64))
    # rows 2 (3 - 1.75) = 2.5 and 2 (3 - 0.75) = 4.5: mean 3.5, deviation sqrt 2, error 1
    assert (found.value, found.error) == pytest.approx((3.5, 1.0))


def test_the_weights_of_the_steps_are_those_of_the_optimisers_memory():
    assert memory_of(small_run()).tolist() == pytest.approx([0.9 / 1.9, 1 / 1.9])
    run = small_run()
    run.trainer.optimizer = torch.optim.SGD(run.parameters, lr=0.0, momentum=0.5)
    assert memory_of(run).tolist() == [0.5, 1.0]
    run.trainer.optimizer = torch.optim.SGD(run.parameters, lr=0.0)
    assert memory_of(run).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("rows", "pieces", "generation", "most", "expected"),
    [
        (32, 1, 1, 8, Sizes(rows=32, pieces=1, updates=1, group=8, is_whole=True)),
        (32, 1, 4, 8, Sizes(rows=32, pieces=1, updates=4, group=8, is_whole=True)),
        (128, 2, 4, 8, Sizes(rows=64, pieces=1, updates=2, group=8, is_whole=False)),
        (16, 8, 8, 8, Sizes(rows=16, pieces=4, updates=1, group=8, is_whole=False)),
        (8, 2, 2, 1, Sizes(rows=8, pieces=1, updates=1, group=8, is_whole=False)),
    ],
)
def test_a_dry_step_is_the_recipes_own_up_to_so_many_prompts(
    rows: int, pieces: int, generation: int, most: int, expected: Sizes, tmp_path: Path
):
    more = f"gradient_accumulation_steps: {pieces}\nsteps_per_generation: {generation}\n"
    _, config, _, _ = parse("grpo", [*recipe(tmp_path, "[]", more), "--per_device_train_batch_size", str(rows)])
    assert sizes(config, most) == expected


@pytest.fixture
def tiny_run(policy: str, tmp_path: Path) -> Iterator[DryRun]:
    """A dry run of the tiny policy, in double."""
    trainer, kept = make(policy, tmp_path, terms=["log_det"], learning_rate=0.0, max_steps=2), []
    with keeping_rollouts(trainer, kept):
        trainer.train()
    trainer.model.double()
    yield DryRun(
        trainer=trainer, parameters=list(trainer.model.parameters()), updates=1, recipe_rate=0.1, own=kept, others=kept
    )


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_force_at_the_parameters_is_the_derivative_of_the_surrogate(surrogate: str, tiny_run: DryRun):
    run, [kept, *_] = tiny_run, tiny_run.own
    memory: dict = {}

    def value() -> Tensor:
        whole = step_force(surrogate, rows_of(run, [kept])[0], alone, memory, 1e-2)  # type: ignore[arg-type]
        assert whole is not None
        return whole.value()

    value()
    whole = step_force(surrogate, rows_of(run, [kept])[0], alone, memory)  # type: ignore[arg-type]
    assert whole is not None
    force = pull_back(run, kept, whole)
    direction = [
        torch.randn(each.shape, generator=torch.Generator().manual_seed(7)).double() for each in run.parameters
    ]
    direction[0][0] = 0  # the padding's embedding gets no gradient
    found = []
    for sign in (1e-4, -1e-4):
        for each, way in zip(run.parameters, direction, strict=True):
            each.data += sign * way
        found.append(value().item())
        for each, way in zip(run.parameters, direction, strict=True):
            each.data -= sign * way
    # the model takes its norms in float32
    assert inner(force, direction) == pytest.approx((found[0] - found[1]) / 2e-4, rel=5e-3, abs=2e-3)


def test_states_do_not_depend_on_the_pieces(tiny_run: DryRun):
    [kept, *_] = tiny_run.own
    assert isinstance(kept, Kept) and len(kept.mask) == 8
    [whole] = rows_of(tiny_run, [kept])
    tiny_run.trainer.args.per_device_train_batch_size = 3
    torch.testing.assert_close(rows_of(tiny_run, [kept])[0], whole)


def test_a_dry_run_leaves_the_model_as_it_was(policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, terms=["entropy_bonus"], learning_rate=0.0, max_steps=10)
    before = [each.detach().clone() for each in trainer.model.parameters()]
    run = dry_run(trainer, Sizes(rows=8, pieces=1, updates=1, group=4, is_whole=True), 3, 2, 0.1)
    assert len(run.gradients) == len(run.own) == 3 and len(run.others) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert any(each.abs().sum() > 0 for each in run.gradients[0])


def by(force: Force, what: str) -> Tried:
    return next(each for each in force.tried if each.what == what)


def test_what_is_said_of_the_step_is_what_a_measured_step_does(tmp_path: Path):
    # a tenth of the testbed's rate: what is of second order is a tenth of what it is there
    found = examine(recipe(tmp_path, "[{log_det: {coef: 1.0e-3}}]", "learning_rate: 4.0e-5\n"), steps=12, tries=True)
    for force in found.forces:
        # on responses that the step was not made from
        size = max(abs(each.realised) for each in force.tried)
        for each in force.tried:
            assert each.straight == pytest.approx(each.predicted, abs=REMAINDER * size), each
            assert abs(each.bend) < REMAINDER * size, each
    is_told = [each for each in found.forces if is_clear(plain(each)) and has_critical(each)]
    assert len(is_told) >= 2
    for each in is_told:
        # with the force at the hidden states, the change left at "c*" was 86 to 108 % of the plain step's; what is left
        # is what the coefficient of a few batches is off by
        left = by(each, "at the critical coef")
        assert abs(left.realised) < 0.35 * abs(plain(each).realised), each
        assert abs(left.realised - left.predicted) < REMAINDER * abs(plain(each).realised), each


def plain(force: Force) -> Tried:
    """The step without a term of this surrogate."""
    return by(
        force, "without its term" if any(each.what == "without its term" for each in force.tried) else "the recipe's"
    )


def has_critical(force: Force) -> bool:
    """Whether the critical coefficient could be told, and so was tried."""
    return any(each.what == "at the critical coef" for each in force.tried)


def is_clear(of: Tried) -> bool:
    return abs(of.predicted) > 3 * of.predicted_error and abs(of.realised) > 3 * of.realised_error


@pytest.mark.parametrize("coef", [0.01, 10.0])
def test_what_destroys_the_policy_is_dominant(coef: float, tmp_path: Path):
    found = examine(recipe(tmp_path, f"[{{log_det: {{coef: {coef}}}}}]"), steps=3)
    force = of(found.forces, "log_det")
    assert force.regime == "dominant" and "log_det is dominant" in found.verdict
