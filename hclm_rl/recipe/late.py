"""Settings that transformers and torch would refuse only once training begins: tried before a model is loaded."""

import inspect

import torch
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.optimization import get_scheduler
from transformers.training_args import trainer_log_levels


def refuse_what_fails_late(config: TrainingArguments) -> None:
    """In a sentence with the key."""
    refuse_schedule(config)
    for key in ("log_level", "log_level_replica"):
        if (level := getattr(config, key)) not in trainer_log_levels:
            raise ValueError(f"{key} must be one of {', '.join(trainer_log_levels)}, got {level!r:.80}")
    pairs = config.optim_args.replace(" ", "").split(",") if config.optim_args else []
    if wrong := [pair for pair in pairs if pair.count("=") != 1 or not all(pair.split("="))]:
        raise ValueError(f"optim_args must be names and values, as in 'rank=8, scale=2', got {wrong[0]!r:.80}")
    if config.gradient_checkpointing and config.gradient_checkpointing_kwargs:
        known = [*list(inspect.signature(checkpoint).parameters)[1:], "preserve_rng_state"]
        known = [name for name in known if name not in ("args", "kwargs")]
        if strange := [name for name in config.gradient_checkpointing_kwargs if name not in known]:
            raise ValueError(
                f"gradient_checkpointing_kwargs has no {strange[0]!r:.80}; torch's checkpoint takes {', '.join(known)}"
            )


def refuse_schedule(config: TrainingArguments) -> None:
    """A learning rate schedule that lacks what it needs, or is given what it does not take: made for no weight."""
    kind, kwargs = config.lr_scheduler_type, config.lr_scheduler_kwargs
    assert not isinstance(kwargs, str)  # TRL's parser has read it
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    try:
        get_scheduler(
            kind,
            optimizer=optimiser,
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=kwargs,
        )
    except ZeroDivisionError:
        raise ValueError(
            f"learning_rate must be above 0 for lr_scheduler_type '{getattr(kind, 'value', kind)}'"
        ) from None
    except (TypeError, ValueError) as error:
        name, given = getattr(kind, "value", kind), kwargs or "none"
        raise ValueError(f"lr_scheduler_type '{name}' with lr_scheduler_kwargs {given!s:.200}: {error}") from error
