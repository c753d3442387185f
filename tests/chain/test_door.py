"""What a term hands in is checked at the door: shape, type, gradient, and the sentence that says so."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hclm_rl import Effect, Quantiles, RolloutEffect, Term, Total
from hclm_rl.chain import NotFinite, TermRefused
from hclm_rl.chain.finite import Watch

from .test_chain import STEP, chain_of, stage_one, stage_two


@dataclass(frozen=True, kw_only=True)
class Gives(Term):
    """One effect, whatever its annotations say."""

    first: object = None
    second: object = None

    def on_rollout(self, rollout, memory):
        return RolloutEffect() if self.first is None else self.first

    def __call__(self, batch, memory):
        return Effect() if self.second is None else self.second


def forced(effect: Any, **values: object) -> Any:
    """The effect with values that its own annotations, which only tests check, would refuse."""
    for name, value in values.items():
        object.__setattr__(effect, name, value)
    return effect


N, T = STEP.mask.shape
FIRST = [
    ({"rewards": torch.zeros(N, 1)}, "a float32 tensor of shape (8, 1) as rewards", "a float tensor of shape (8,)"),
    ({"rewards": torch.zeros(N).long()}, "a int64 tensor of shape (8,) as rewards", "a float tensor of shape (8,)"),
    (
        {"rewards": [1.0] * N},
        "list [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0] as rewards",
        "a float tensor of shape (8,)",
    ),
    (
        {"rewards": torch.zeros(N), "is_left_out": torch.zeros(N)},
        "a float32 tensor of shape (8,) as is_left_out",
        "a bool tensor of shape (8,)",
    ),
    ({"is_left_out": torch.zeros(N).bool()}, "a bool tensor of shape (8,) as is_left_out", "only beside rewards"),
    (
        {"advantages": torch.zeros(T)},
        "a float32 tensor of shape (6,) as advantages",
        "a float tensor of shape (8,) or (8, 6)",
    ),
    ({"columns": {"c": 1.0}}, "float 1.0 as column 'c'", "a tensor, by a name that is text"),
    ({"shared": {3: torch.zeros(())}}, "a float32 tensor of shape () as shared 3", "a tensor, by a name that is text"),
    ({"metrics": [1]}, "list [1] as metrics", "a dict of metrics by name"),
]
SECOND = [
    ({"advantages": torch.zeros(N)}, "a float32 tensor of shape (8,) as advantages", "a float tensor of shape (8, 6)"),
    (
        {"advantages": torch.zeros(N, T, requires_grad=True)},
        "a float32 tensor of shape (8, 6) with a gradient as advantages",
        "one without a gradient: detach it, or give a loss",
    ),
    ({"loss": torch.zeros(N, 1)}, "a float32 tensor of shape (8, 1) as loss", "a float tensor of shape (8, 6) or ()"),
    ({"loss": torch.zeros(N, T) > 0}, "a bool tensor of shape (8, 6) as loss", "a float tensor of shape (8, 6) or ()"),
    ({"affected": torch.zeros(N, T)}, "a float32 tensor of shape (8, 6) as affected", "a bool tensor of shape (8, 6)"),
    ({"on_hidden_gradient": 3}, "int 3 as on_hidden_gradient", "a function of the gradient"),
]
METRIC = (
    "by a name that is text, a tensor of shape (8, 6) or (), a Total of () tensors, or Quantiles of the former shape"
)


@pytest.mark.parametrize(("values", "came", "allowed"), FIRST)
def test_stage_one(values: dict, came: str, allowed: str):
    with pytest.raises(TermRefused) as error:
        stage_one(chain_of(mine=Gives(first=forced(RolloutEffect(), **values))))
    assert str(error.value) == f"the entropy term 'mine' gave {came} in stage 1 at step 3; allowed: {allowed}"


@pytest.mark.parametrize(("values", "came", "allowed"), SECOND)
def test_stage_two(values: dict, came: str, allowed: str):
    with pytest.raises(TermRefused) as error:
        stage_two(chain_of(mine=Gives(second=forced(Effect(), **values))))
    assert str(error.value) == f"the entropy term 'mine' gave {came} in stage 2 at step 3; allowed: {allowed}"


@pytest.mark.parametrize(
    "metric",
    [
        1.0,
        torch.zeros(N),
        torch.zeros(N, T) * 1j,
        forced(Quantiles(values=torch.zeros(N, T)), values=torch.zeros(())),
        forced(Total(sums=(torch.zeros(()),), form=float), sums=(torch.zeros(2),)),
        forced(Total(sums=(torch.zeros(()),), form=float), form=None),
    ],
)
def test_metrics_of_a_wrong_kind(metric: object):
    for run, effect in (
        (stage_one, {"first": forced(RolloutEffect(), metrics={"x": metric})}),
        (stage_two, {"second": forced(Effect(), metrics={"x": metric})}),
    ):
        with pytest.raises(TermRefused) as error:
            run(chain_of(mine=Gives(**effect)))
        assert "as the metric 'x' in stage" in str(error.value) and str(error.value).endswith(f"; allowed: {METRIC}")


def test_what_came_before_an_error_is_blamed_first():
    @dataclass(frozen=True, kw_only=True)
    class Fails(Term):
        def __call__(self, batch, memory):
            return {}["nope"]

    poison = Gives(second=Effect(loss=torch.full((N, T), torch.nan)))
    with pytest.raises(NotFinite, match="'poison' produced") as error:
        stage_two(chain_of(poison=poison, fails=Fails()))
    assert isinstance(error.value.__context__, KeyError)


def test_the_number_that_travels_is_0_just_where_all_is_finite():
    watch, cpu = Watch(), torch.device("cpu")
    assert watch.excess(cpu).item() == 0
    watch.note("a", "loss", torch.tensor([-1e18, 1e18]))
    watch.note("a", "loss", torch.zeros(0))
    watch.note("a", "column", torch.tensor([True]))
    assert watch.excess(cpu).item() == 0 and watch.findings() == []
    for bad in (torch.nan, torch.inf, -torch.inf, 2e18):
        watch.note("b", "loss", torch.tensor([0.0, bad]), coef=2.0)
        assert watch.excess(cpu).item() > 0 and [found.link for found in watch.findings()] == ["b"]
        watch.noted.pop()
    # float16 is the loss scaler's
    x = torch.ones(2, requires_grad=True)
    (watch.alias("c", "log-probs", x.half()) * torch.inf).sum().backward()
    assert watch.findings() == []
    (watch.alias("c", "log-probs", x) * torch.inf).sum().backward()
    assert [found.quantity for found in watch.findings()] == ["gradient at the log-probs"]
