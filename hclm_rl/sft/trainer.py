"""Supervised fine-tuning with `sft_method`: how a method sits in TRL's loss.

Nothing of that loss is copied. TRL sums `-outputs.log_probs` of its fused forward pass and divides by the labels of the
optimiser step; a method's losses stand in that field instead. Methods act in training only: evaluation is TRL's own.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
# (transformers' Trainer declares its model as optional)

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate.utils import AutocastKwargs, is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from safetensors.torch import load_file, save_file
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput
from transformers.utils import is_peft_available

from ..trainer.checkpoints import find_checkpoint
from .config import as_recipe, build_method, name_of, refuse_settings
from .curio_sft import CurioSft
from .em_ft import EmFt
from .method import SftBatch, SftMethod
from .own_responses import with_own_responses
from .teacher import Teacher

if is_peft_available():  # only named in annotations
    from peft import PeftConfig, PeftModel

METHOD_FILE, TEACHER_FILE = "sft_method.json", "sft_teacher.safetensors"


class SFTTrainer(trl.SFTTrainer):
    """Supervised fine-tuning with `sft_method`: TRL's SFTTrainer and one argument more.

    TRL's own page says more of its part: https://huggingface.co/docs/trl/sft_trainer

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from hclm_rl import SFTConfig, SFTTrainer

    >>> trainer = SFTTrainer(
    ...     model="Qwen/Qwen2.5-0.5B",
    ...     args=SFTConfig(output_dir="out", sft_method={"entropy_sft": {"ratio": 0.8}}),
    ...     train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_loss_func, compute_metrics,
        callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics, quantization_config,
        peft_config, formatting_func: TRL's.
        sft_method (`SftMethod`, `str` or `Mapping`, *optional*):
            What stands in place of plain cross-entropy: a name (`"mix_ce"`), a name with hyper-parameters
            (`{"curio_sft": {"alpha": 0.5}}`), or an object (`MixCe(eta=0.5)`). Give it here or in `args`. Without it,
            this is TRL's trainer bit for bit.
    """

    # TRL's parameters one by one, so that an editor knows them: that alone makes it long
    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        formatting_func: Callable[[dict], str] | None = None,
        *,
        sft_method: SftMethod | str | Mapping[str, Any] | None = None,
    ) -> None:
        from_config = getattr(args, "sft_method", None)
        if sft_method is not None and from_config is not None:
            raise ValueError("sft_method came twice, as an argument of the trainer and in its config: use one of them")
        self._hclm_method = build_method(sft_method if from_config is None else from_config)
        self._hclm_teacher: Teacher | None = None
        self._hclm_metrics: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._hclm_micro_batches = 0
        if self._hclm_method is not None and compute_loss_func is not None:
            raise ValueError(f"{name_of(self._hclm_method)} beside compute_loss_func: a run has one loss")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        if self._hclm_method is not None:
            refuse_settings(self.args, self._hclm_method)
            refuse_machines(self, self._hclm_method)
            self.add_callback(_Checkpoints(self))

    # ---- the loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        method = self._hclm_method
        if method is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if isinstance(method, EmFt):
            number = f"{self.state.global_step}/{self._hclm_micro_batches}"
            inputs = with_own_responses(self, method, inputs, number)
        columns = {}
        if isinstance(method, CurioSft):
            # as the student's pass, but without its cache of weights in half precision, which are the student's
            with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
                columns = self._hclm_teachers().columns(self._hclm_plain(), inputs, inputs["labels"], method.of_teacher)
        self._hclm_micro_batches += 1

        def watched(**given: Any) -> Any:
            outputs = model(**given)
            if given.get("fused_lm_head"):
                outputs.log_probs = -self._hclm_losses(method, outputs, columns, num_items_in_batch)
            return outputs

        return super().compute_loss(watched, inputs, return_outputs, num_items_in_batch)

    def _hclm_losses(self, method: SftMethod, outputs: Any, columns: dict, num_items: Any) -> torch.Tensor:
        """The method's losses in place of the labels' negative log-probs."""
        mask = outputs.label_mask
        tokens = here = float(mask.sum() if num_items is None else num_items)
        if num_items is not None:
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            here = tokens / (processes * self.current_gradient_accumulation_steps)
        batch = SftBatch(
            mask=mask,
            logps=outputs.log_probs.float(),
            entropy=outputs.entropy.float(),
            tokens=tokens,
            tokens_here=here,
            columns=columns,
        )
        found = method(batch)
        if not found.losses.isfinite().all():
            whose = "of the model" if not batch.logps.isfinite().all() else f"of {name_of(method)}"
            raise ValueError(
                f"sft_method: a loss {whose} is not finite at step {self.state.global_step}; training stopped before "
                "the optimiser step, and the weights are those of the step before"
            )
        for name, value in found.metrics.items():
            self._hclm_metrics[f"{name_of(method)}/{name}"].append(value.detach().float())
        return found.losses

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._hclm_metrics and self.model.training:
            means = {name: torch.stack(values).mean() for name, values in self._hclm_metrics.items()}
            means = self.accelerator.reduce(means, reduction="mean")
            logs.update({name: value.item() for name, value in means.items()})
            self._hclm_metrics.clear()
        super().log(logs, start_time)

    # ---- the teacher

    def _hclm_plain(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _hclm_teachers(self) -> Teacher:
        """Begins as the student is at the first step."""
        if self._hclm_teacher is None:
            self._hclm_teacher = Teacher(self._hclm_plain())
        return self._hclm_teacher

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._hclm_micro_batches = 0
            method, done = self._hclm_method, self.state.global_step + 1
            if isinstance(method, CurioSft) and done % method.sync_every == 0:
                self._hclm_teachers().follow(self._hclm_plain(), method.new_weight)
        return loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As TRL's; a checkpoint keeps the teacher, and a run resumes only with the method that wrote it."""
        self._hclm_teacher = None
        if self._hclm_method is not None:
            resume_from_checkpoint = find_checkpoint(resume_from_checkpoint, self.args, has_terms=False)
            if resume_from_checkpoint is not None:
                read_checkpoint(self, self._hclm_method, Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)


def refuse_machines(trainer: SFTTrainer, method: SftMethod) -> None:
    """Runs in which a method would see part of a model or of a sequence."""
    name, parallelism = name_of(method), trainer.accelerator.parallelism_config
    if parallelism is not None and (parallelism.sp_enabled or parallelism.cp_enabled):
        raise ValueError(f"{name} needs whole sequences: turn context and sequence parallelism off")
    if isinstance(method, (CurioSft, EmFt)) and (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
        raise ValueError(f"{name} needs the whole model on each process: use DDP or ZeRO-2, not FSDP or ZeRO-3")
    if is_peft_model(trainer.model) and trainer.model.active_peft_config.is_prompt_learning:
        raise ValueError(f"{name} does not work with prompt-learning adapters: use LoRA, or train all weights")


class _Checkpoints(TrainerCallback):
    """Adds the method and its teacher to each checkpoint."""

    def __init__(self, trainer: SFTTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        method = self.trainer._hclm_method
        if not (state.is_world_process_zero and method is not None and folder.is_dir()):
            return
        if isinstance(method, CurioSft):
            weights = self.trainer._hclm_teachers().weights
            save_file({name: each.contiguous() for name, each in weights.items()}, folder / TEACHER_FILE)
        (folder / METHOD_FILE).write_text(json.dumps(as_recipe(method), indent=1) + "\n")


def read_checkpoint(trainer: SFTTrainer, method: SftMethod, folder: Path) -> None:
    """The teacher as it was; a sentence where the checkpoint is another method's. Refuses another method's."""
    wanted, file = as_recipe(method), folder / METHOD_FILE
    came = json.loads(file.read_text()) if file.is_file() else None
    if came != wanted:
        said = "of no method" if came is None else f"of {json.dumps(came)}"
        raise ValueError(
            f"{folder} is a checkpoint {said}, and this run has {json.dumps(wanted)}: resume with the same sft_method"
        )
    if isinstance(method, CurioSft):
        model = trainer._hclm_plain()
        trainer._hclm_teacher = Teacher(model)
        device = next(model.parameters()).device
        trainer._hclm_teacher.weights = load_file(folder / TEACHER_FILE, device=str(device))
