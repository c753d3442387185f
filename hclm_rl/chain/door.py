"""The door: what a term or a coefficient of anyone's hands in is checked once, and its errors get its name."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ..types import Effect, Metric, Quantiles, Rollout, RolloutEffect, TokenBatch, Total
from .finite import NotFinite, Watch
from .schedules import Coefficient, State

LARGEST_COEF = torch.finfo(torch.float32).max


class TermFailed(RuntimeError):
    """A term or a coefficient raised, or gave what it may not; the original, if there is one, is its cause."""


class TermRefused(TermFailed, ValueError):
    """The same of a ValueError: a sentence about what came."""


@contextmanager
def named(who: str, where: str, step: int, watch: Watch | None = None) -> Iterator[None]:
    """Errors inside say who, where and when. What `watch` noted before comes first: it may have led to the error."""
    try:
        yield
    except (NotFinite, TermFailed):
        raise
    except torch.OutOfMemoryError as error:  # others look for it by its class and text
        error.add_note(f"in {who}, {where}, step {step}")
        raise
    except Exception as error:
        if watch is not None:
            watch.require_finite(step)
        if isinstance(error, ValueError):
            raise TermRefused(f"{who} failed in {where} at step {step}: {error}") from error
        raise TermFailed(f"{who} failed in {where} at step {step}: {type(error).__name__}: {error}") from error


def described(value: object) -> str:
    """What came, in a few words."""
    if isinstance(value, Tensor):
        gradient = " with a gradient" if value.requires_grad else ""
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}{gradient}"
    return "None" if value is None else f"{type(value).__name__} {value!r:.60}"


class Door:
    """Checks the fields of one effect; the sentence has link, stage, field, what came and what is allowed."""

    def __init__(self, link: str, stage: int, step: int, mask: Tensor) -> None:
        self.who, self.stage, self.step = f"the entropy term '{link}'", stage, step
        self.rows, self.width = mask.shape

    def refuse(self, field: str, came: object, allowed: str) -> NoReturn:
        """Ends the run with the term, the field, what came and what is allowed."""
        where = f"in stage {self.stage} at step {self.step}"
        raise TermRefused(f"{self.who} gave {described(came)} as {field} {where}; allowed: {allowed}")

    def effect(self, effect: object, kind: type) -> None:
        """Refuses what is no effect of this stage."""
        if not isinstance(effect, kind):
            self.refuse("its effect", effect, f"{kind.__name__}(...)")

    def tensor(self, field: str, value: object, shapes: list[tuple[int, ...]], *, is_bool: bool = False) -> None:
        """A tensor of one of the shapes; of any kind of float, or bool."""
        kind = "bool" if is_bool else "float"
        is_right = (
            isinstance(value, Tensor)
            and tuple(value.shape) in shapes
            and (value.dtype == torch.bool if is_bool else value.is_floating_point())
        )
        if not is_right:
            self.refuse(field, value, f"a {kind} tensor of shape {' or '.join(str(shape) for shape in shapes)}")

    def named_tensors(self, field: str, values: object) -> None:
        """Refuses what is no dict of tensors by name."""
        if not isinstance(values, Mapping):
            self.refuse(field, values, "a dict of tensors by name")
        for name, value in values.items():
            if not (isinstance(name, str) and isinstance(value, Tensor)):
                self.refuse(f"{field} {name!r}", value, "a tensor, by a name that is text")

    def metrics(self, metrics: object) -> None:
        """Refuses metrics of any other form than those of `is_metric`."""
        if not isinstance(metrics, Mapping):
            self.refuse("metrics", metrics, "a dict of metrics by name")
        for name, metric in metrics.items():
            if not (isinstance(name, str) and self.is_metric(metric)):
                came = metric.values if isinstance(metric, Quantiles) else metric
                allowed = f"by a name that is text, a tensor of shape {(self.rows, self.width)} or (), a Total of ()"
                self.refuse(f"the metric {name!r}", came, f"{allowed} tensors, or Quantiles of the former shape")

    def is_metric(self, metric: object) -> bool:
        """A real tensor of shape (rows, width) or (), a Total of () tensors, or Quantiles of (rows, width)."""
        if isinstance(metric, Total):
            return callable(metric.form) and all(isinstance(each, Tensor) and not each.dim() for each in metric.sums)
        value = metric.values if isinstance(metric, Quantiles) else metric
        if not isinstance(value, Tensor) or value.is_complex():
            return False
        return value.shape == (self.rows, self.width) or (value.dim() == 0 and not isinstance(metric, Quantiles))


def check_rollout_effect(effect: RolloutEffect, rollout: Rollout, link: str) -> None:
    """Stage 1. Refuses columns and shapes that do not fit the rollout."""
    door, (n, width) = Door(link, 1, rollout.step, rollout.mask), rollout.mask.shape
    door.effect(effect, RolloutEffect)
    if effect.rewards is not None:
        door.tensor("rewards", effect.rewards, [(n,)])
    if effect.is_left_out is not None:
        door.tensor("is_left_out", effect.is_left_out, [(n,)], is_bool=True)
        if effect.rewards is None:
            door.refuse("is_left_out", effect.is_left_out, "only beside rewards")
    if effect.advantages is not None:
        door.tensor("advantages", effect.advantages, [(n,), (n, width)])
    door.named_tensors("column", effect.columns)
    door.named_tensors("shared", effect.shared)
    door.metrics(effect.metrics)
    for name, column in effect.columns.items():
        if column.dim() == 0 or len(column) != n:
            raise ValueError(
                f"the entropy term '{link}' attached column '{name}' with {len(column) if column.dim() else 'no'} rows "
                f"to a batch of {n}; what is not one row a response belongs into `shared`"
            )


def check_effect(effect: Effect, batch: TokenBatch, link: str, in_training: bool) -> None:
    """Stage 2; a loss must have a gradient where the policy trains."""
    door, shape = Door(link, 2, batch.step, batch.mask), tuple(batch.mask.shape)
    door.effect(effect, Effect)
    if effect.advantages is not None:
        door.tensor("advantages", effect.advantages, [shape])
        if effect.advantages.requires_grad:
            door.refuse("advantages", effect.advantages, "one without a gradient: detach it, or give a loss")
    if effect.loss is not None:
        door.tensor("loss", effect.loss, [shape, ()])
        if in_training and batch.coef and not effect.loss.requires_grad:
            needs = "one with a gradient: it is detached, or what it reads needs none in this run"
            door.refuse("loss", effect.loss, needs)
    if effect.affected is not None:
        door.tensor("affected", effect.affected, [shape], is_bool=True)
    if not (effect.on_hidden_gradient is None or callable(effect.on_hidden_gradient)):
        door.refuse("on_hidden_gradient", effect.on_hidden_gradient, "a function of the gradient")
    door.metrics(effect.metrics)


def measured(
    callback: Callable[[Tensor], Mapping[str, Metric]], gradient: Tensor, link: str, step: int, mask: Tensor
) -> Mapping[str, Metric]:
    """What a term says of the gradient (B, T, D) at the hidden states, under the mask (B, T)."""
    with named(f"the entropy term '{link}'", "on_hidden_gradient", step):
        metrics = callback(gradient)
    Door(link, 2, step, mask).metrics(metrics)
    return metrics


def strength(coef: Coefficient, link: str, progress: float, state: State, entropy: float | None, step: int) -> float:
    """The coefficient's value; a finite number, whoever made it and whatever its state."""
    who = f"the coefficient of '{link}'"
    with named(who, "value", step):
        value = coef.value(progress, state, entropy=entropy)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TermRefused(f"{who} gave {described(value)} as value at step {step}; allowed: a number")
    if not abs(float(value)) <= LARGEST_COEF:
        raise NotFinite(
            f"{who} is {float(value):g} at step {step}, with the state {dict(state)}; allowed: a finite number, of at "
            f"most {LARGEST_COEF:.2g}; training stopped before the step, and the weights are those of the step before"
        )
    return float(value)


def moved(coef: Coefficient, link: str, entropy: float, state: State, step: int) -> State:
    """The coefficient's state after a step, as plain numbers."""
    who = f"the coefficient of '{link}'"
    with named(who, "update", step):
        after = coef.update(entropy, state)
    return plain_state(after, f"{who} gave {{}} as state in update at step {step}; allowed: a dict of numbers")


def first_state(coef: Coefficient, link: str) -> State:
    """The coefficient's state before the first step."""
    who = f"the coefficient of '{link}'"
    with named(who, "initial_state", 0):
        state = coef.initial_state()
    return plain_state(state, f"{who} gave {{}} as initial_state; allowed: a dict of numbers")


def plain_state(state: Any, refusal: str) -> State:
    """A dict of Python numbers, as a checkpoint keeps it; NumPy's are taken."""
    if not isinstance(state, Mapping):
        raise TermRefused(refusal.format(described(state)))
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in state.items()}
    for name, value in plain.items():
        if not (isinstance(name, str) and isinstance(value, Real)):
            raise TermRefused(refusal.format(f"{name!r}: {described(value)}"))
    return plain
