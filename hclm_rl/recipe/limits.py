"""What the numbers of a recipe may be, by key: said with the key, before TRL or torch meet them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Limit:
    """least <= value <= most, or least < value where `is_open`; infinity where `is_endless`."""

    least: float = -math.inf
    most: float = math.inf
    is_open: bool = False
    is_endless: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value is allowed."""
        if not math.isfinite(value):
            return self.is_endless and value > 0
        return (value > self.least if self.is_open else value >= self.least) and value <= self.most

    def __str__(self) -> str:
        """In words, after `must be`."""
        if self.most < math.inf:
            return f"in {'(' if self.is_open else '['}{self.least:g}, {self.most:g}]"
        if self.least > -math.inf:
            return f"{'more than' if self.is_open else 'at least'} {self.least:g}"
        return "a finite number"


ONE_OR_MORE, NOT_NEGATIVE, POSITIVE = Limit(1), Limit(0), Limit(0, is_open=True)
SHARE, POSITIVE_SHARE, SEED = Limit(0, 1), Limit(0, 1, is_open=True), Limit(0, 2**32 - 1)
CLIP = Limit(0, is_endless=True)

LIMITS: Mapping[str, Limit] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "num_iterations", "steps_per_generation", "generation_batch_size", "max_completion_length",
            "num_generations_eval", "eval_batch", "trace_every", "ref_model_sync_steps",
            "torch_empty_cache_steps", "eval_accumulation_steps", "vllm_tensor_parallel_size", "lora_r", "lora_alpha",
            "dataloader_prefetch_factor", "vllm_max_model_length", "max_tool_calling_iterations",
            "soft_overlong_length", "soft_overlong_cache", "ddp_timeout",
        ),
        ONE_OR_MORE,
    ),
    **dict.fromkeys(
        (
            "learning_rate", "weight_decay", "beta", "warmup_steps", "eval_samples", "dataloader_num_workers",
            "eval_delay", "max_grad_norm", "adam_epsilon", "entropy_coef_min", "entropy_coef_delta", "entropy_target",
            "router_aux_loss_coef", "neftune_noise_alpha", "save_total_limit", "num_completions_to_print",
            "vllm_importance_sampling_clip_min", "top_k",
        ),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            "num_train_epochs", "temperature", "repetition_penalty", "logging_steps", "save_steps", "eval_steps",
            "sapo_temperature_neg", "sapo_temperature_pos", "vllm_server_timeout", "vllm_importance_sampling_clip_max",
            "vllm_importance_sampling_cap", "decay_to_start",
        ),
        POSITIVE,
    ),
    **dict.fromkeys(("min_p", "ref_model_mixup_alpha", "lora_dropout", "label_smoothing_factor"), SHARE),
    **dict.fromkeys(("top_p", "top_entropy_quantile", "vllm_gpu_memory_utilization"), POSITIVE_SHARE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Limit(0, 1)),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    **dict.fromkeys(("epsilon", "epsilon_high", "delta"), CLIP),
    **dict.fromkeys(("vllm_server_port", "vllm_group_port"), Limit(1, 65535)),
    "num_generations": Limit(2),
    "max_steps": Limit(-1),
    "test_split_size": Limit(0, is_open=True),
}  # fmt: skip


def refuse_out_of_range(settings: Mapping[str, object], own: Mapping[str, Limit] = MappingProxyType({})) -> None:
    """All keys at once: a mistake is seldom alone. `own`: a command's limits where they are not those of training."""
    found = []
    for key, value in settings.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        limit = own.get(key, LIMITS.get(key, Limit()))
        for each in values:
            if isinstance(each, (int, float)) and not isinstance(each, bool) and not limit.holds(each):
                found.append(f"{key} must be {limit}, got {each}")
    if settings.get("max_steps") == 0:
        found.append("max_steps must be at least 1, or -1 for num_train_epochs, got 0")
    if found:
        raise ValueError("; ".join(found))
