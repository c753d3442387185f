"""Terms that were tried and are not in the library; docs/results.md says what came of them. By their dotted path:

hclm-rl grpo --config recipes/quickstart.yaml --allow_custom_code \
  --entropy_terms '[{"eval.trials.Critical": {"coef": 1.0}}]'
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hclm_rl import Effect, Rollout, RolloutEffect, TokenBatch
from hclm_rl.equations.geometry import Factor, at_least_float32, moments_everywhere
from hclm_rl.terms.log_det import LogDet, step_factor
from hclm_rl.types import Metric


@dataclass(frozen=True, kw_only=True)
class WithinPrompt(LogDet):
    """The log-det of the covariance of the tokens around the mean of their own prompt's tokens."""

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        states, mask = at_least_float32(rollout.hidden()), rollout.mask
        sums = rollout.everywhere(torch.where(mask.unsqueeze(2), states, 0).sum(dim=1))
        counts, group = rollout.everywhere(mask.sum(dim=1)), rollout.everywhere(rollout.group)
        of_group = torch.zeros(int(group.max()) + 1, states.size(2), device=states.device).index_add(0, group, sums)
        tokens = torch.zeros(len(of_group), device=states.device).index_add(0, group, counts.float())
        centre = (of_group / tokens.clamp(min=1).unsqueeze(1))[rollout.group]
        rows = (states - centre.unsqueeze(1))[mask]
        step = step_factor(moments_everywhere(rows, rollout.total), self.eps_relative, memory)
        if step is None:
            return RolloutEffect()
        whole = step[1]
        shared = {"cholesky": whole.cholesky, "count": whole.count}
        dof = rollout.total(whole.leverage(rows).sum()) / whole.count
        return RolloutEffect(columns={"centre": centre}, shared=shared, metrics={"value": whole.log_det(), "dof": dof})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if "cholesky" not in batch.shared:
            return Effect()
        states = at_least_float32(batch.hidden())
        centre, mask = batch.columns["centre"].unsqueeze(1), batch.mask
        whole = Factor(batch.shared["cholesky"], states.new_zeros(states.size(2)), batch.shared["count"], memory["eps"])
        force = whole.force((states - centre)[mask]) * whole.count
        injected = -(force * states[mask]).sum(dim=-1)
        return Effect(loss=injected.new_zeros(mask.shape).masked_scatter(mask, injected))


@dataclass(frozen=True, kw_only=True)
class Critical(LogDet):
    """The log-det at 1.1 times its critical coefficient, from means over about 20 steps; one process only."""

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        asked = LogDet.__call__(self, batch, memory)
        if asked.loss is None:
            return asked
        whole = Factor(batch.shared["cholesky"], batch.shared["mean"], batch.shared["count"], memory["eps"])
        force, mask = whole.force(batch.hidden()[batch.mask]), batch.mask

        def on_hidden_gradient(gradient: Tensor) -> Mapping[str, Metric]:
            own = gradient[mask].to(force)
            for name, value in (("dot", batch.share * (force * own).sum()), ("power", force.square().sum())):
                memory[name] = 0.95 * memory.get(name, 0.0) + 0.05 * value.item()
            return {}

        coef = 1.1 * max(memory.get("dot", 0.0) / memory["power"], 0.0) if memory.get("power") else 0.0
        metrics = {"critical": asked.loss.new_tensor(coef)}
        return Effect(loss=coef * asked.loss, metrics=metrics, on_hidden_gradient=on_hidden_gradient)
