"""The light way: `actor_rollout_ref.actor.policy_loss.loss_mode=hclm_rl`, for terms that look at a micro-batch alone.

verl gives a policy loss log-probs, advantages and the mask. It gives it no entropies, rewards, groups or step, so a
term that reads one of them is refused; the trainers in `trainer.py` have all of them. The base is verl's "vanilla".
"""

# pyright: reportMissingImports=false
# (verl is no dependency)

import functools
import os
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn

from ...chain.chain import Chain
from ...chain.coefficients import Constant
from ..absent import Absent
from ..recipe import chain_of_file
from ..refusals import refuse_what_is_lacking
from ..second_stage import added, logged, second_stage, token_batch
from ..told import Told
from .settings import NO_ENTROPY, OF_THE_LOSS, TRAINER, VARIABLE


@functools.cache
def chain_from(path: str | None) -> Chain:
    """The terms of the file that the environment names; each worker reads it once."""
    if not path:
        raise ValueError(
            f"loss_mode=hclm_rl needs {VARIABLE}, the path of a YAML file with entropy_terms, in the workers: "
            f"+ray_kwargs.ray_init.runtime_env.env_vars.{VARIABLE}=/path/to/terms.yaml"
        )
    chain = chain_of_file(path)
    refuse_what_is_lacking(chain, OF_THE_LOSS)
    for link in chain.links:
        if not isinstance(link.coef, Constant):
            raise ValueError(
                f"the coefficient of '{link.name}' changes over time, and a policy loss of verl does not know the "
                f"step: {TRAINER}"
            )
    return chain


# long: the parameters that verl gives, and those that its own loss takes
def compute_policy_loss_hclm_rl(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's own PPO loss on the advantages that the terms leave, plus their losses."""
    chain, mask = chain_from(os.environ.get(VARIABLE)), response_mask.bool()
    coefs = {link.name: link.coef.value(0.0, {}) for link in chain.links}
    told = Told(step=0, progress=0.0, coefs=coefs)
    batch = token_batch(
        told,
        {},
        logps=log_prob,
        old_logps=old_log_prob,
        entropy=Absent.like(log_prob, NO_ENTROPY),
        advantages=advantages,
        mask=mask,
        ids=torch.zeros_like(mask, dtype=torch.long),
        clip_range=(config.clip_ratio_low, config.clip_ratio_high),
    )
    outcome = second_stage(chain, told, batch, {})
    shaped = advantages if outcome.advantages is None else outcome.advantages
    loss, metrics = get_policy_loss_fn("vanilla")(
        old_log_prob=old_log_prob,
        log_prob=log_prob,
        advantages=shaped,
        response_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        config=config,
        rollout_is_weights=rollout_is_weights,
    )

    def of_tokens(values: Tensor) -> Tensor:
        whole = {key: config.global_batch_info.get(key) for key in ("dp_size", "batch_num_tokens")}
        return agg_loss(
            torch.where(mask, values, 0), mask, "token-mean", whole["dp_size"] or 1, whole["batch_num_tokens"]
        )

    rows = config.global_batch_info.get("global_batch_size")
    share = len(mask) / rows * config.global_batch_info.get("dp_size", 1) if rows else 1.0
    if (more := added(outcome, told, of_tokens, share)) is not None:
        loss = loss + more
    count = max(int(mask.sum()), 1)
    said = {
        f"hclm_rl/{name}": value / (count if of == "token" else 1)
        for name, (value, of) in logged(outcome, mask).items()
    }
    return loss, metrics | said
