"""Packages that a recipe's settings need and this environment lacks: said before a model is loaded."""

import importlib.util
from collections.abc import Iterator, Mapping

# where a run is logged: the modules, one of which will do, and what to install
TRACKERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "wandb": (("wandb",), "wandb"),
    "mlflow": (("mlflow",), "mlflow"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "trackio": (("trackio",), "trackio"),
    "swanlab": (("swanlab",), "swanlab"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "dvclive": (("dvclive",), "dvclive"),
    "neptune": (("neptune",), "neptune"),
    "dagshub": (("dagshub",), "dagshub mlflow"),
    "flyte": (("flytekit",), "flytekit"),
    "azure_ml": (("azureml",), "azureml-sdk"),
    "kubeflow": (("kubeflow",), "kubeflow"),
}
# a key that is on: what it needs
SWITCHES = {
    "use_liger_kernel": ("liger_kernel", "liger-kernel"),
    "use_vllm": ("vllm", "'hclm-rl[vllm]'"),
    "use_peft": ("peft", "'hclm-rl[peft]'"),
    "load_in_8bit": ("bitsandbytes", "bitsandbytes"),
    "load_in_4bit": ("bitsandbytes", "bitsandbytes"),
    "deepspeed": ("deepspeed", "'hclm-rl[deepspeed]'"),
    "eval_pass_at_k": ("scipy", "'hclm-rl[eval]'"),
}
# a word that a key's text holds: what it needs
WORDS = {
    "optim": {
        "8bit": ("bitsandbytes", "bitsandbytes"),
        "paged": ("bitsandbytes", "bitsandbytes"),
        "bnb": ("bitsandbytes", "bitsandbytes"),
        "lion": ("bitsandbytes", "bitsandbytes"),
        "ademamix": ("bitsandbytes", "bitsandbytes"),
        "galore": ("galore_torch", "galore-torch"),
        "apollo": ("apollo_torch", "apollo-torch"),
        "lomo": ("lomo_optim", "lomo-optim"),
        "grokadamw": ("grokadamw", "grokadamw"),
        "schedule_free": ("schedulefree", "schedulefree"),
        "stable_adamw": ("optimi", "torch-optimi"),
        "torch_4bit": ("torchao", "torchao"),
        "torch_8bit": ("torchao", "torchao"),
    },
    "attn_implementation": {"flash_attention_2": ("flash_attn", "flash-attn")},
    "reward_funcs": {
        "accuracy_reward": ("math_verify", "'hclm-rl[eval]'"),
        "right_answer": ("math_verify", "'hclm-rl[eval]'"),
    },
}


def is_there(module: str) -> bool:
    """Whether the module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def missing_packages(settings: Mapping[str, object]) -> Iterator[str]:
    """A sentence for each."""
    for key, (module, package) in SWITCHES.items():
        if settings.get(key) and not is_there(module):
            yield f"{key} needs {module}: pip install {package}"
    for key, words in WORDS.items():
        value = settings.get(key)
        for text in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
            needs = next((of for word, of in words.items() if word in str(text)), None)
            if needs and "/" not in str(text) and "." not in str(text) and not is_there(needs[0]):
                yield f"{key}: {text} needs {needs[0]}: pip install {needs[1]}"
    trackers = settings.get("report_to")
    for name in [trackers] if isinstance(trackers, str) else trackers if isinstance(trackers, list) else []:
        if name in ("none", "all"):
            continue
        if name not in TRACKERS:
            yield f"report_to must be none, all or some of {', '.join(TRACKERS)}, got {name!r:.80}"
        elif not any(map(is_there, TRACKERS[name][0])):
            yield f"report_to: {name} needs a package that is missing: pip install {TRACKERS[name][1]}"


def refuse_missing_packages(settings: Mapping[str, object]) -> None:
    """All of them at once."""
    if found := list(missing_packages(settings)):
        raise ValueError("; ".join(found))
