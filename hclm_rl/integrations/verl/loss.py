"""Stage 2 in verl's workers: around verl's own loss, which keeps clipping, aggregation, KL and rollout correction."""

# pyright: reportMissingImports=false
# (verl is no dependency)

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding, response_to_nested

from ...chain.chain import Chain, Outcome
from ..absent import Absent
from ..second_stage import added, logged, second_stage, token_batch
from ..told import Told, arrived

PREFIX = "hclm_rl/"  # of fields that travel with the rows, and of metrics
TOLD = "hclm_rl_told"
NO_ENTROPY = "verl computed no entropies in the update: actor_rollout_ref.actor.calculate_entropy must be True"
CLIPPING = ("vanilla", "clip_cov", "kl_cov", "gspo", "geo_mean")  # loss modes that drop gradients out of a range


@dataclass
class TermsLoss:
    """What the workers' engine calls in place of verl's `ppo_loss`, which it calls in turn."""

    config: Any  # verl's ActorConfig
    chain: Chain
    step: int = -1
    micro_batches: int = 0

    def __call__(self, model_output: dict, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
        told = tu.get_non_tensor_data(data=data, key=TOLD, default=None)
        if not isinstance(told, Told):
            raise ValueError(
                f"the batch brought nothing of hclm_rl's first stage to the loss ({TOLD} is {told!r:.40}): this loss "
                "works with hclm_rl's trainers alone"
            )
        self.micro_batches = self.micro_batches + 1 if told.step == self.step else 0
        self.step = told.step
        names = [str(name) for name in data.keys() if str(name).startswith(PREFIX)]  # noqa: SIM118 (it iterates over rows)
        wanted = ["response_mask", "old_log_probs", "advantages", "responses", *names]
        wanted += ["ref_log_prob"] if "ref_log_prob" in data else []
        padded = data.select(*wanted).to_padded_tensor()
        mask, rows = padded["response_mask"].bool(), {name.removeprefix(PREFIX): padded[name] for name in names}
        rows = arrived(rows, told)
        batch = token_batch(
            told,
            rows,
            logps=(logps := no_padding_2_padding(model_output["log_probs"], data)),
            old_logps=padded["old_log_probs"],
            entropy=entropy_of(model_output, data, logps),
            advantages=padded["advantages"],
            mask=mask,
            ids=padded["responses"],
            clip_range=(self.config.clip_ratio_low, self.config.clip_ratio_high),
            clips=self.config.policy_loss.get("loss_mode", "vanilla") in CLIPPING,
            ref_logps=padded["ref_log_prob"] if "ref_log_prob" in data else None,
        )
        outcome = second_stage(self.chain, told, batch, rows, self.micro_batches)
        if outcome.advantages is not None:
            data = data.copy()  # of the dict, not of its tensors
            response_mask = data["response_mask"]
            nested = response_mask.is_nested
            data["advantages"] = response_to_nested(outcome.advantages, response_mask) if nested else outcome.advantages
        loss, metrics = ppo_loss(self.config, model_output, data, dp_group)
        if (more := self.added(outcome, told, data, mask)) is not None:
            loss = loss + more
        return loss, metrics | self.metrics(outcome, told, mask, data)

    def added(self, outcome: Outcome, told: Told, data: Any, mask: Tensor) -> Tensor | None:
        """The links' own losses: a mean over the tokens of the mini-batch, whatever loss_agg_mode is."""
        rows, dp_size = data["global_batch_size"], data["dp_size"]

        def of_tokens(loss: Tensor) -> Tensor:
            clean = torch.where(mask, loss, 0)
            return agg_loss(clean, mask, "token-mean", dp_size, data["batch_num_tokens"])

        return added(outcome, told, of_tokens, len(mask) / rows * dp_size if rows else 1.0)

    def metrics(self, outcome: Outcome, told: Told, mask: Tensor, data: Any) -> dict[str, Any]:
        tokens, found = data["batch_num_tokens"], {}
        for name, (value, of) in logged(outcome, mask).items():
            if of == "token" and tokens is not None:
                value, of_all = value / max(tokens, 1) * data["dp_size"], AggregationType.SUM
            elif of == "token":
                value, of_all = value / max(int(mask.sum()), 1), AggregationType.MEAN
            else:
                of_all = AggregationType.MEAN
            found[PREFIX + name] = Metric(value=value, aggregation=of_all)
        return found


def entropy_of(model_output: dict, data: Any, logps: Tensor) -> Tensor:
    """With gradient, as verl's engine made it."""
    entropy = model_output.get("entropy")
    return Absent.like(logps, NO_ENTROPY) if entropy is None else no_padding_2_padding(entropy, data)
