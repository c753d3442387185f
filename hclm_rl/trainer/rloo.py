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
from .rollouts import prompts_of, roll

if is_peft_available():  # only named in annotations
    from peft import PeftConfig, PeftModel


class RLOOTrainer(EntropyTermsMixin, trl.RLOOTrainer):
    """REINFORCE Leave-One-Out with `entropy_terms`: TRL's RLOOTrainer and one argument more.

    RLOO (arXiv:2402.14740) compares each response with the mean of the others to the same prompt. Terms shape its
    rewards or advantages, or add a loss. RLOO's ratio is that of a whole response, so a token weight acts on the
    gradient of the token's log-prob. Terms that shape rewards need `beta=0`, `normalize_advantages=False` and no
    `reward_clip_range`.
    TRL's own page says more of its part: https://huggingface.co/docs/trl/rloo_trainer

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from hclm_rl import RLOOConfig, RLOOTrainer
    >>> from trl.rewards import accuracy_reward

    >>> trainer = RLOOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=RLOOConfig(output_dir="out", num_generations=8),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ...     entropy_terms=[{"entropy_bonus": {"coef": 0.01}}, "information_force"],
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy to train, a causal language model: a name on the Hub or a folder that `save_pretrained` wrote,
            loaded with `args.model_init_kwargs` (in float32 unless `dtype` stands there), or a model already loaded.
            Terms that read attention need `model_init_kwargs={"attn_implementation": "eager"}`.
        reward_funcs (`RewardFunc | list[RewardFunc]`):
            What scores the responses; of several the sum counts, weighted by `args.reward_weights`. Each is a function,
            called with `prompts`, `completions` and every further column of the data set as keywords, which returns a
            number a response, or `None` for a response that it does not judge (it may be `async`); or a sequence
            classifier with one label, by name or loaded. NaN counts as `None`; with
            terms, an infinity stops the run with the function's name.
        args ([`RLOOConfig`], *optional*):
            All settings of the run. `hclm_rl.RLOOConfig` is TRL's with `entropy_terms`, the trace and pass@k as further
            fields; TRL's own will do where the terms come as an argument here. By default TRL's default settings.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Prompts to train on, in the column `"prompt"`: text, or the messages of a chat. Further columns go to the
            reward functions and to terms (`Rollout.rows`). A streamed data set has no length, so it needs
            `args.max_steps`.
        eval_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], or a `dict` of them, *optional*):
            Prompts to evaluate on, of the same form; of several named ones each gets metrics of its own. Terms do not
            act in evaluation.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer or processor of the policy, padding on the left. By default the one saved with the model; one
            that has no padding token pads with its end-of-text token.
        reward_processing_classes (`PreTrainedTokenizerBase` or `list[PreTrainedTokenizerBase]`, *optional*):
            Tokenizers of the reward models, in the order of `reward_funcs`. Functions need none, so what stands in
            their place is passed over; a model with `None` gets the one saved with it.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks beside the default ones, as in any trainer of transformers;
            `hclm_rl.CollapseCallback()` watches for entropy collapse.
        optimizers (`tuple[Optimizer | None, LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            An optimizer and a scheduler of your own in place of those that `args` describes.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            How to quantise a policy that is loaded by name; with `peft_config` this is QLoRA. A model already loaded
            stays as it is.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter to train instead of all weights, such as a `LoraConfig`. By default all weights are trained.
        entropy_terms (`list` of [`Term`], [`Link`], `str` or `Mapping`, *optional*):
            What controls the entropy, from left to right: each sees the advantages that those before it left. An entry
            is a name (`"clip_cov"`), a name with hyper-parameters as in a recipe
            (`{"clip_cov": {"ratio": 0.002, "coef": 0.5}}`, where `coef` is the strength, a number or a schedule, and
            `name` the name in logs), a term object (`ClipCov(ratio=0.002)`), or a `Link(name=..., term=..., coef=...)`
            of these. A dotted path names a class of your own. Give them here or in `args`, not in both; without any,
            this is TRL's trainer bit for bit. `hclm-rl methods` lists the names, docs/methods.md the methods, and
            docs/extending.md all forms.

    Raises:
        ValueError: before training, in one sentence, where a term is misspelt, gets what it does not take, or reads
            what this run cannot give it.
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

    def _generate(self, prompts: list) -> tuple:
        if self._hclm.rolling is not None:
            self._hclm.rolling.raw = prompts
        return super()._generate(prompts)

    def _generate_single_turn(self, prompt_ids: list, images: Any, multimodal_fields: Any) -> list[list[int]]:
        if self._hclm.rolling is None:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        responses = roll(self, prompt_ids, images)
        prompt_ids[:] = prompts_of(responses, prompt_ids)  # TRL goes on with the list that it handed over
        return [list(each.ids) for each in responses]

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
