"""What a run cannot give its terms, said in one sentence before anything is loaded."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import trl
from transformers import AutoConfig, PretrainedConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..chain.chain import Chain
from .links import NOTHING

CLIPPING_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")


def refuse_what_the_run_lacks(chain: Chain, model: Any, config: Any) -> None:
    """Before anything is loaded: terms that need what this model or this way of sharding cannot give."""
    if not chain.links:
        return
    refuse_without_reference_model(chain, config)
    model_config: PretrainedConfig | None = getattr(model, "config", None)
    if isinstance(model, str):
        more = getattr(config, "model_init_kwargs", None)
        more = json.loads(more) if isinstance(more, str) else more or {}
        trusts = bool(more.get("trust_remote_code", getattr(config, "trust_remote_code", False)))
        model_config = AutoConfig.from_pretrained(model, trust_remote_code=trusts)
    gated = [link.name for link in chain.links if link.coef.needs_entropy]
    scored = [link.name for link in chain.links if link.term.needs_scores]
    reads = sorted({*chain.needs_hidden, *chain.needs_vocab, *chain.needs_rescoring, *scored})
    if reads and getattr(model_config, "vision_config", None) is not None:
        raise ValueError(
            f"{', '.join(reads)}: reads scores or hidden states of the whole batch, which this library does not take "
            "from vision models; use terms that need neither, such as entropy_bonus or qae"
        )
    if gated and getattr(model_config, "vision_config", None) is not None:
        raise ValueError(
            f"{', '.join(gated)}: its coefficient reads the entropy of the sampled batch, which this library does not "
            "take from vision models; use a rule that reads that of the step before: 'trl' or 'skywork' of "
            "step_to_target, 'lagged' of proportional_integral"
        )
    whole = "the whole next-token distribution"
    if chain.needs_vocab_gradient and is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{', '.join(chain.needs_vocab_gradient)}: reads {whole} with gradient, for which the output head must be "
            "whole from the forward to the backward pass; under ZeRO-3 it is not: use FSDP2, DDP or ZeRO-2"
        )
    if chain.needs_vocab and is_fsdp1(config):
        raise ValueError(
            f"{', '.join(chain.needs_vocab)}: reads {whole}, for which FSDP1 does not leave the output head whole: use "
            "FSDP2 (fsdp_version: 2), DDP or ZeRO-2"
        )
    if config is not None:
        refuse_what_the_settings_lack(chain, config)


def refuse_what_the_settings_lack(chain: Chain, config: Any) -> None:
    """What no model is needed to see."""
    refuse_without_reference(chain, config)
    refuse_rewards_out_of_sight(chain, config)
    refuse_ratios_out_of_reach(chain, config)
    refuse_small_groups(chain, config)


def refuse_frozen(model: Any) -> None:
    """A model without a weight that trains, such as an adapter that was loaded for inference."""
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            "no weight of the model trains: load an adapter with PeftModel.from_pretrained(..., is_trainable=True), or "
            "set requires_grad where it should learn"
        )


def refuse_unwritable(folder: Path) -> None:
    """A run's folder that is a file, or lies where nothing may be written; leaves no trace of the try."""
    there = folder.absolute()
    try:
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except (OSError, ValueError) as error:  # a NUL in the path is a ValueError
        raise ValueError(f"output_dir '{folder}' cannot be written to: {error}") from error


def refuse_two_controls(config: trl.GRPOConfig, chain: Chain) -> None:
    """TRL's own entropy controls and ours on one run: two hands on one wheel."""
    if config.entropy_coef or config.use_adaptive_entropy:
        key = "use_adaptive_entropy" if config.use_adaptive_entropy else "entropy_coef"
        raise ValueError(
            f"TRL's {key} beside entropy_terms: the two would fight over one entropy; drop {key} and add the term "
            "`entropy_bonus` (its coef is a number, or {kind: step_to_target, target: ...} for the adaptive one)"
        )
    if config.top_entropy_quantile < 1.0 and any(type(link.term).__name__ == "ForkingTokens" for link in chain.links):
        raise ValueError("TRL's top_entropy_quantile beside forking_tokens selects tokens twice; drop one of the two")


def refuse_rewards_out_of_sight(chain: Chain, config: Any) -> None:
    """Terms that shape rewards, or replace the advantages, where TRL's advantages are not made of the rewards alone."""
    sentence = acts_between(config)
    on = [link for link in chain.links if link.coef != NOTHING]
    replaces = ", ".join(each.name for each in on if each.term.sets_baseline)
    shapes = ", ".join(each.name for each in on if each.term.shapes_rewards)
    if sentence and replaces:
        raise ValueError(f"{replaces}: replaces the advantages that TRL makes of the rewards, {sentence}")
    if sentence and shapes:
        raise ValueError(f"{shapes}: shapes the rewards, {sentence}")


def refuse_ratios_out_of_reach(chain: Chain, config: Any) -> None:
    """Terms that put something in the place of what PPO's clip drops, where the loss has no such clip."""
    names = ", ".join(each.name for each in chain.links if each.term.needs_token_clip and each.coef != NOTHING)
    if not names or is_on_policy(config):
        return
    level, loss = getattr(config, "importance_sampling_level", "sequence"), getattr(config, "loss_type", None)
    if level != "token" or loss not in CLIPPING_LOSSES:
        given = "RLOO" if loss is None else f"loss_type '{loss}' with importance_sampling_level '{level}'"
        raise ValueError(
            f"{names}: keeps or stops gradients where a token's own ratio is clipped, which {given} does not do: use "
            f"{', '.join(CLIPPING_LOSSES)} with importance_sampling_level 'token'"
        )


def refuse_small_groups(chain: Chain, config: Any) -> None:
    """Terms that need more responses to a prompt than are sampled."""
    given = config.num_generations
    for link in chain.links:
        if given is not None and link.coef != NOTHING and link.term.least_group > given:
            raise ValueError(
                f"{link.name}: needs groups of {link.term.least_group} responses or more, and num_generations is "
                f"{given}: raise it, or lower what the term asks for"
            )


def refuse_without_reference_model(chain: Chain, config: Any) -> None:
    """Terms that run the frozen model of the KL penalty, where none is loaded."""
    reads = [link for link in chain.links if link.term.needs_reference_model and link.coef != NOTHING]
    frozen = [link.name for link in reads]
    if isinstance(config, trl.RLOOConfig) and (shapes := [each.name for each in reads if each.term.shapes_rewards]):
        raise ValueError(
            f"{', '.join(shapes)}: shapes rewards by the frozen model of the KL penalty, and RLOO puts that KL into "
            "the rewards, beside which none are shaped: use GRPO, or features: policy"
        )
    if frozen and config is not None and not config.beta:
        raise ValueError(
            f"{', '.join(frozen)}: reads the frozen model of the KL penalty, which this run does not load: set beta "
            "above 0, as in beta: 1.0e-6, which loads it and hardly pulls"
        )


def refuse_without_reference(chain: Chain, config: Any) -> None:
    """Terms that read the frozen model of the KL penalty, where there is none."""
    names = ", ".join(each.name for each in chain.links if each.term.needs_reference and each.coef != NOTHING)
    if names and isinstance(config, trl.RLOOConfig):
        raise ValueError(f"{names}: acts against the KL in the loss, which RLOO puts into the rewards: use GRPO")
    if names and not config.beta:
        raise ValueError(
            f"{names}: acts against the run's KL penalty to a frozen model, and beta is 0, where it would do nothing: "
            "set beta, such as 1e-3"
        )


def is_on_policy(config: Any) -> bool:
    """Whether each rollout is used for one update only."""
    return config.gradient_accumulation_steps % (config.steps_per_generation * config.num_iterations) == 0


def acts_between(config: Any) -> str | None:
    """What TRL does to the rewards before its advantages, which a term that shapes rewards would not see or undo."""
    if isinstance(config, trl.RLOOConfig):
        if config.beta or config.reward_clip_range or config.normalize_advantages:
            return (
                "which this library does for RLOO only with beta=0, reward_clip_range unset and "
                "normalize_advantages=False: those act on the rewards too, and the term would not see it"
            )
    elif getattr(config, "multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        return (
            "of which it takes the sum, and multi_objective_aggregation='normalize_then_sum' does not use that: set it "
            "to 'sum_then_normalize'"
        )
    return None


def is_fsdp1(config: Any) -> bool:
    """Whether the first FSDP is asked for, in the config (where 2 is the default) or by accelerate (where 1 is)."""
    if getattr(config, "fsdp", None):
        return int((config.fsdp_config or {}).get("version", 2)) == 1
    is_launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return is_launched and int(os.environ.get("FSDP_VERSION", "1")) == 1
