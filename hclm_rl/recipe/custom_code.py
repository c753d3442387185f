"""What in a recipe runs code from outside the library and is no dotted path, which responses/names.py looks after."""

import json
from collections.abc import Iterator, Mapping

from ..responses.names import FLAG

# variables that change what is logged, where and by how many threads, but not which code runs
HARMLESS = {
    *("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_API_KEY", "WANDB_MODE", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_TAGS"),
    *("WANDB_NOTES", "WANDB_LOG_MODEL", "WANDB_WATCH", "WANDB_DISABLED", "WANDB_SILENT"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_FLATTEN_PARAMS", "MLFLOW_TRACKING_TOKEN"),
    *("COMET_API_KEY", "COMET_PROJECT_NAME", "COMET_MODE", "TENSORBOARD_LOGGING_DIR"),
    *("HF_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"),
    *("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_LAUNCH_BLOCKING"),
    *("NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM", "TRL_EXPERIMENTAL_SILENCE"),
}


def refuse_unnamed_code(recipe: Mapping[str, object]) -> None:
    """All that the recipe would run or let run, in one sentence."""
    found = [f"env: {name} can change which code runs" for name in variables_of(recipe) if name not in HARMLESS]
    for key, value in recipe.items():
        found += dict.fromkeys(of_settings(key, value))
    if found:
        raise ValueError(f"{'; '.join(found)}: add {FLAG} to the command line if you trust this")


def variables_of(recipe: Mapping[str, object]) -> list[str]:
    """The names below `env`."""
    env = recipe.get("env") or {}
    return list(env) if isinstance(env, Mapping) else []


def of_settings(key: str, value: object) -> Iterator[str]:
    """What of a key, or of the mappings below it, brings code along."""
    if key in ("trust_remote_code", "use_kernels", "custom_generate", "kernel_config") and is_on(value):
        yield f"{key} runs code that comes with a model"
    elif key == "attn_implementation" and isinstance(value, str) and "/" in value:
        yield f"attn_implementation '{value}' fetches a kernel, which is code"
    if isinstance(value, str) and value.lstrip()[:1] == "{":  # as on the command line
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from of_settings(str(name), each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from of_settings("", each)


def is_on(value: object) -> bool:
    """As argparse and YAML read it."""
    return str(value).lower() not in ("none", "false", "no", "f", "n", "0", "", "off")
