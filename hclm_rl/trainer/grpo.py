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
from .rollouts import done
from .stage_two import log_vespo, vespo_weights

if is_peft_available():  # only named in annotations
    from peft import PeftConfig, PeftModel


class GRPOTrainer(EntropyTermsMixin, trl.GRPOTrainer):
    """Group Relative Policy Optimization with `entropy_terms`: TRL's GRPOTrainer and one argument more.

    GRPO (arXiv:2402.03300) compares each response with the others to the same prompt. Terms shape its rewards or
    advantages, or add a loss.
    TRL's own page says more of its part: https://huggingface.co/docs/trl/grpo_trainer

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from hclm_rl import GRPOConfig, GRPOTrainer
    >>> from trl.rewards import accuracy_reward

    >>> trainer = GRPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=GRPOConfig(output_dir="out", num_generations=8),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ...     entropy_terms=[{"clip_cov": {"ratio": 0.002}}, "information_force"],
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy to train, a causal language model: a name on the Hub or a folder that `save_pretrained` wrote,
            loaded with `args.model_init_kwargs` (in float32 unless `dtype` stands there), or a model already loaded.
            Terms that read attention need `model_init_kwargs={"attn_implementation": "eager"}`.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            What scores the responses; of several the sum counts, weighted by `args.reward_weights`. Each is a function,
            called with `prompts`, `completions` and every further column of the data set as keywords, which returns a
            number a response, or `None` for a response that it does not judge (it may be `async`); or a sequence
            classifier with one label, by name or loaded. NaN counts as `None`; with
            terms, an infinity stops the run with the function's name.
            May be left out where the environments have a `get_reward`.
        args ([`GRPOConfig`], *optional*):
            All settings of the run. `hclm_rl.GRPOConfig` is TRL's with `entropy_terms`, the trace and pass@k as further
            fields; TRL's own will do where the terms come as an argument here. By default TRL's default settings.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Prompts to train on, in the column `"prompt"`: text, or the messages of a chat. Further columns go to the
            reward functions and to terms (`Rollout.rows`). A streamed data set has no length, so it needs
            `args.max_steps`. So does a run without a data set, whose one environment makes the prompts.
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
        tools (`list` of `Callable`, *optional*):
            Functions that the policy may call while it answers, plain or `async`, with annotated arguments and a
            docstring in Google's style, which the chat template shows to it. Tokens that a tool wrote are not trained,
            and no term counts them.
        rollout_func (`RolloutFunc`, *optional*):
            Generates in TRL's place: called with this process's prompts and the trainer; returns a dict with
            `"prompt_ids"`, `"completion_ids"` and `"logprobs"`, a value a response, and whatever else the reward
            functions read. TRL calls it experimental.
        environment_factory (`EnvironmentFactory` or `dict[str, EnvironmentFactory]`, *optional*):
            Makes an environment for each response: an object whose `reset` may return a text that is added to the
            prompt, and whose other public methods are tools. If it has `get_reward`, that is one more reward. Of a
            dict, the data set's column `environment` names the one to use. TRL calls it experimental.
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

    def get_gamma_weights(self, **given: Any) -> Tensor:
        """TRL's weights of the loss "vespo", (B, 1) or (B, T); in training those of the responses are kept, (B,)."""
        weights = super().get_gamma_weights(**given)
        if self._hclm.inputs is not None:
            self._hclm.vespo = vespo_weights(weights, given["advantages"], given["mask"])
        return weights

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        log_vespo(self)
        return loss

    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        if self._hclm.rolling is not None:  # a rollout of ours draws all turns; TRL only runs the tools between them
            return [[] for _ in prompt_ids], None
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> tuple:
        if self._hclm.rolling is not None:
            return done(self._hclm.rolling)
        return super()._tool_call_loop(*args, **kwargs)

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
