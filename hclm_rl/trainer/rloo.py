"""RLOO with entropy terms."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (TRL declares num_generations as int | None)

from collections.abc import Mapping, Sequence
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
from trl.trainer.rloo_trainer import RewardFunc

from ..chain.chain import Link
from ..types import Term
from .mixin import EntropyTermsMixin

if is_peft_available():  # only named in annotations
    from peft import PeftConfig, PeftModel


class RLOOTrainer(EntropyTermsMixin, trl.RLOOTrainer):
    """TRL's RLOOTrainer with `entropy_terms` (an argument here, or a field of RLOOConfig): see docs/extending.md.

    RLOO's ratio is that of a whole response, so a token weight acts on the gradient of the token's log-prob.
    """

    # TRL's parameters one by one, so that an editor knows them: that alone makes it long
    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: RewardFunc | list[RewardFunc],
        args: trl.RLOOConfig | None = None,
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
            entropy_terms=entropy_terms,
        )

    def _hclm_is_sequence_level(self) -> bool:
        return True

    def _hclm_refuse_weighted_kl(self) -> None:
        """RLOO's KL is in the reward, where token weights do not reach it."""

    def _hclm_is_old(self, logps: Tensor, output: Mapping[str, Any]) -> bool:
        return torch.equal((logps * output["completion_mask"]).sum(1), output["old_logps"])

    def _hclm_centre(self, rewards: Tensor) -> Tensor:
        grouped = rewards.view(-1, self.num_generations)
        others = (~grouped.isnan()).sum(dim=1, keepdim=True) - 1
        return rewards - ((grouped.nansum(dim=1, keepdim=True) - grouped) / others).view(-1)

    def _hclm_reward_scale(self, rewards: Tensor) -> Tensor:
        return torch.ones_like(rewards)
