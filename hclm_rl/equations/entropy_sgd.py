"""Entropy-SGD, an optimiser that looks for wide valleys: Chaudhari et al., 2017, arXiv:1611.01838"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

KEEPS = 0.75  # of the running mean at each inner step; the authors' code


class EntropySgd(Optimizer):
    """Descends the local entropy of the loss over the *weights*, -log of its Gaussian-smoothed exponential; nothing of
    the policy's entropy.

    Of `inner_steps` calls of `step`, each with the gradient g of a mini-batch of its own, all move the weights x'
    around an anchor x, at which they start: x' <- x' - inner_lr (g + gamma_t (x' - x) + noise),
    mean <- 0.75 mean + 0.25 x'. The last of them puts the weights at x - lr (x - mean), with Nesterov momentum on
    x - mean, which becomes the new anchor. gamma_t = gamma (1 + growth)^t, t the outer steps. So it needs no closure
    and goes with any trainer: one update of the method is `inner_steps` optimiser steps, and training should be a
    multiple of them, since between two outer steps the weights are the wandering x'. In RL the rollouts are drawn from
    x' too.

    The factor gamma of the exact gradient is taken into lr, as in the authors' code: tune lr, not lr gamma. The mean
    gives its older part 0.75, as in that code; whether the paper means this or the reverse was not settled. Inner
    steps 0 is SGD with that momentum. The noise comes from `seed` and the number of the step alone, so replicas draw
    the same. Three more copies of the weights. FSDP and ZeRO shard them, and the noise would then differ from that of
    the whole.

    Args:
        params: as of any optimiser of torch
        lr: of the outer step, more than 0; a scheduler moves it; the authors' 0.1 is for image classifiers
        inner_steps: at least 0; the authors' value
        inner_lr: of the inner steps, more than 0; the authors' value
        gamma: pull to the anchor, at least 0; the authors' value for LeNet
        growth: of gamma at each outer step, at least 0; the authors' value
        noise: at least 0, times 1 / sqrt(inner_lr / 2); the authors' value
        momentum: in [0, 1); the authors' value
        seed: of the noise
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        inner_steps: int = 20,
        inner_lr: float = 0.1,
        gamma: float = 1e-4,
        growth: float = 1e-3,
        noise: float = 1e-4,
        momentum: float = 0.9,
        seed: int = 0,
    ) -> None:
        if not (0 < lr < math.inf and 0 < inner_lr < math.inf):
            raise ValueError(f"lr and inner_lr must be more than 0 and finite, got {lr} and {inner_lr}")
        if inner_steps < 0:
            raise ValueError(f"inner_steps must be at least 0, got {inner_steps}")
        for name, value in (("gamma", gamma), ("growth", growth), ("noise", noise)):
            if not (0 <= value < math.inf):
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        defaults = {
            "lr": lr, "inner_steps": inner_steps, "inner_lr": inner_lr, "gamma": gamma, "growth": growth,
            "noise": noise, "momentum": momentum, "seed": seed, "done": 0,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One inner step, and after the last of them the outer one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            done, inner = group["done"], group["inner_steps"]
            source = torch.Generator().manual_seed(hash((group["seed"], number, done)) % 2**63)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if inner:
                    self._inner(parameter, group, done, source)
                if not inner or (done + 1) % inner == 0:
                    self._outer(parameter, group)
            group["done"] = done + 1
        return loss

    def _inner(self, parameter: Tensor, group: dict[str, Any], done: int, source: torch.Generator) -> None:
        state = self.state[parameter]
        if done % group["inner_steps"] == 0 or "anchor" not in state:
            state["anchor"], state["mean"] = parameter.clone(), parameter.clone()
        gamma = group["gamma"] * (1 + group["growth"]) ** (done // group["inner_steps"])
        slope = parameter.grad + gamma * (parameter - state["anchor"])
        if group["noise"]:
            shake = torch.randn(parameter.shape, generator=source).to(slope)
            slope = slope + group["noise"] / math.sqrt(0.5 * group["inner_lr"]) * shake
        parameter.add_(slope, alpha=-group["inner_lr"])
        state["mean"].lerp_(parameter, 1 - KEEPS)

    def _outer(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if group["inner_steps"]:
            slope = state["anchor"] - state["mean"]
            parameter.copy_(state["anchor"])
        else:
            assert parameter.grad is not None
            slope = parameter.grad.clone()
        if group["momentum"]:
            speed = state.setdefault("momentum", torch.zeros_like(parameter))
            speed.mul_(group["momentum"]).add_(slope)
            slope = slope + group["momentum"] * speed
        parameter.add_(slope, alpha=-group["lr"])
