"""GRPO with entropy terms."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (TRL declares num_generations as int | None)

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import trl
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.utils import is_peft_available
from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc
from trl.trainer.utils import nanstd

from ..chain.chain import Link
from ..types import Term
from .mixin import EntropyTermsMixin

if is_peft_available():  # only named in annotations
    from peft import PeftConfig, PeftModel


class GRPOTrainer(EntropyTermsMixin, trl.GRPOTrainer):
    """TRL's GRPOTrainer with `entropy_terms` (an argument here, or a field of GRPOConfig): see docs/extending.md."""

    # TRL's parameters one by one, so that an editor knows them: that alone makes it long
    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: trl.GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        tools: list[Callable] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
        *,
        entropy_terms: Sequence[Term | Link | str | Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
            entropy_terms=entropy_terms,
        )

    def _hclm_is_sequence_level(self) -> bool:
        return self.importance_sampling_level == "sequence"

    def _hclm_refuse_weighted_kl(self) -> None:
        if self.beta:
            raise ValueError(
                "token weights with importance_sampling_level='sequence' act on the log-probs, so with beta > 0 they "
                "would weight the KL penalty too: set beta=0, or importance_sampling_level='token'"
            )

    def _hclm_is_old(self, logps: Tensor, output: Mapping[str, Any]) -> bool:
        return logps is output.get("old_per_token_logps")

    def _hclm_centre(self, rewards: Tensor) -> Tensor:
        mean = torch.nanmean(rewards.view(-1, self.num_generations), dim=1)
        return rewards - mean.repeat_interleave(self.num_generations, dim=0)

    def _hclm_reward_scale(self, rewards: Tensor) -> Tensor:
        if self.scale_rewards == "none" or self.multi_objective_aggregation != "sum_then_normalize":
            return torch.ones_like(rewards)
        if self.scale_rewards == "batch":
            return nanstd(rewards).expand_as(rewards) + 1e-4
        std = nanstd(rewards.view(-1, self.num_generations), dim=1)
        return std.repeat_interleave(self.num_generations, dim=0) + 1e-4
