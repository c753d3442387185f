"""What of verl's own settings the terms depend on, and which of them work against terms; nothing here imports verl."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from ...chain.chain import Chain
from ...recipe.links import NOTHING
from ..refusals import Gives, refuse_what_is_lacking

RENORMALISES = ("grpo", "grpo_vectorized", "rloo", "rloo_vectorized")  # advantages of a response's reward and group
DIVIDES = ("grpo", "grpo_vectorized")  # by the group's deviation, plus EPSILON
EPSILON = 1e-6
# loss modes in which an advantage (B, T) weighs single tokens, as tests/integrations/test_verl.py has it
TAKES_TOKEN_ADVANTAGES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "cispo")
ACTOR = "actor_rollout_ref.actor"

# the light way, a policy loss
VARIABLE = "HCLM_RL_TERMS"
TRAINER = "use trainer.v1.trainer_mode=hclm_rl_sync with +hclm_rl.recipe"
OF_THE_LOSS = Gives(
    where="in a policy loss of verl",
    instead=TRAINER,
    scores=False,
    entropies=False,
    columns=False,
    rewards=False,
    reference=False,
)
NO_ENTROPY = f"verl hands no entropies to a policy loss: {TRAINER}"


def at(config: Any, path: str, default: Any = None) -> Any:
    """A value of nested mappings by its dotted path."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, Mapping) or hasattr(config, "get") else None
        if config is None:
            return default
    return config


def gives(config: Any) -> Gives:
    """What verl's trainer can hand to the chain under these settings."""
    bypasses = bool(at(config, "algorithm.rollout_correction.bypass_mode", False))
    return Gives(
        where="under verl with algorithm.rollout_correction.bypass_mode" if bypasses else "under verl's trainer",
        instead="leave that mode off" if bypasses else "train it with hclm_rl.GRPOTrainer, or take another term",
        scores=not bypasses,  # the pass for old log-probs, which gives entropies too, is left out there
        entropies=not bypasses,
        columns=True,
        rewards=True,
        reference=has_reference(config),
    )


def has_reference(config: Any) -> bool:
    """Whether verl makes log-probs of a frozen model."""
    return bool(at(config, f"{ACTOR}.use_kl_loss", False) or at(config, "algorithm.use_kl_in_reward", False))


def refuse_settings(config: Any, chain: Chain) -> None:
    """Raises one sentence with the first setting that the terms cannot work beside."""
    refuse_what_is_lacking(chain, gives(config))
    if coefficient := at(config, f"{ACTOR}.entropy_coeff", 0):
        raise ValueError(
            f"verl's entropy_coeff {coefficient} beside entropy_terms: the two would fight over one entropy; set it to "
            "0 and add the term `entropy_bonus`"
        )
    mode = at(config, f"{ACTOR}.policy_loss.loss_mode", "vanilla")
    if mode not in TAKES_TOKEN_ADVANTAGES:
        raise ValueError(
            f"{ACTOR}.policy_loss.loss_mode {mode} does not take an advantage for each token, or controls entropy "
            f"itself; allowed beside entropy terms: {', '.join(TAKES_TOKEN_ADVANTAGES)}"
        )
    if at(config, "distillation.enabled", False):
        raise ValueError("verl's distillation has a loss of its own, in which entropy terms have no place: disable it")
    if (strategy := at(config, f"{ACTOR}.strategy", "fsdp")) not in ("fsdp", "fsdp2"):
        raise ValueError(f"{ACTOR}.strategy {strategy} is not tested with entropy terms; allowed: fsdp, fsdp2")
    refuse_rewards_out_of_sight(config, chain)
    refuse_ratios_out_of_reach(mode, chain)
    group = at(config, "actor_rollout_ref.rollout.n", 1)
    for link in chain.links:
        if link.coef != NOTHING and link.term.least_group > group:
            raise ValueError(
                f"{link.name}: needs groups of {link.term.least_group} responses or more, and "
                f"actor_rollout_ref.rollout.n is {group}"
            )


def refuse_rewards_out_of_sight(config: Any, chain: Chain) -> None:
    """Terms that give rewards or replace advantages, where verl's own are not made of a response's reward alone."""
    estimator = str(at(config, "algorithm.adv_estimator", "gae"))
    names = ", ".join(
        link.name
        for link in chain.links
        if link.coef != NOTHING and (link.term.sets_baseline or link.term.shapes_rewards)
    )
    if names and estimator not in RENORMALISES:
        raise ValueError(
            f"{names}: makes advantages anew from the rewards, which algorithm.adv_estimator {estimator} does not "
            f"allow; allowed: {', '.join(RENORMALISES)}"
        )
    if names and at(config, "algorithm.use_kl_in_reward", False):
        raise ValueError(f"{names}: would not see the KL that verl takes off the rewards: set use_kl_in_reward False")


def refuse_ratios_out_of_reach(mode: str, chain: Chain) -> None:
    """Terms that put something in the place of what PPO's clip of a token's ratio drops."""
    names = ", ".join(link.name for link in chain.links if link.coef != NOTHING and link.term.needs_token_clip)
    if names and mode != "vanilla":
        raise ValueError(f"{names}: needs a loss that clips each token's own ratio, and {mode} does not: use vanilla")


def epsilon(config: Any) -> float | None:
    """What verl adds to the deviation by which it divides; None where it does not divide."""
    estimator = str(at(config, "algorithm.adv_estimator", "gae"))
    divides = estimator in DIVIDES and at(config, "algorithm.norm_adv_by_std_in_grpo", True)
    return EPSILON if divides else None


def share_of_update(config: Any) -> float:
    """Of the generation batch in one optimiser step."""
    mini, whole = at(config, f"{ACTOR}.ppo_mini_batch_size"), at(config, "data.train_batch_size")
    return 1.0 if not (mini and whole) else min(1.0, mini / whole)


def loss_mean(config: Any) -> Literal["tokens", "sequences"]:
    """What verl's policy loss averages, in the words of Rollout."""
    return "sequences" if at(config, f"{ACTOR}.loss_agg_mode", "token-mean") == "seq-mean-token-mean" else "tokens"


def progress(step: int, total: int | None) -> float:
    """Share of the training done before this step, which verl counts from 1."""
    return min(max(step - 1, 0) / total, 1.0) if total and math.isfinite(total) else 0.0
