"""The loss, and stage 2: the chain reads a micro-batch in the middle of TRL's loss."""

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..equations.functional import per_token, split_token_weights
from ..equations.selections import outside_clip
from ..recipe.refusals import is_on_policy
from ..types import Attention, TokenBatch, Total, last_layer
from .head import over_vocab_of
from .hooks import Seen, watch_gradient
from .judging import ENTROPY, LOGP, Watched
from .run import AFFECTED, COLUMN, Scores, generator, mask_of, progress, strengths
from .scoring import score
from .stage_one import catch_up
from .tracing import open_trace, record


def stage_two(trainer: Any, model: Any, scores: Scores, seen: Seen, attention: Attention | None) -> Tensor:
    """Runs the chain on a micro-batch; shapes the advantages of the armed inputs, gives TRL its log-probs, (B, T)."""
    run, inputs = trainer._hclm, trainer._hclm.inputs
    if run.deferred is not None:
        catch_up(trainer, inputs, scores)
    batch = token_batch(trainer, model, inputs, scores, attention)
    affected = {key.removeprefix(AFFECTED): value for key, value in inputs.items() if key.startswith(AFFECTED)}
    with torch.autocast(scores.logps.device.type, enabled=False):
        generators = functools.partial(generator, trainer, f"micro-batch {run.micro_batches}")
        watched = Watched(trainer, scores.logps)
        coefs = strengths(trainer).coefs
        outcome = run.chain(batch, run.state.memory, coefs, generators, affected, run.watch, watched)
    run.outcome = outcome
    batch = replace(batch, logps=watched.logps)
    if shapers := dict.fromkeys((*run.shapers, *outcome.shapers)):
        through = "log-probs, through the base algorithm's loss on its advantages"
        batch = replace(batch, logps=run.watch.alias(", ".join(shapers), through, batch.logps))
    shaped = inputs["advantages"] if outcome.advantages is None else outcome.advantages
    if run.trace.wants(trainer.state.global_step + 1):
        open_trace(trainer, inputs, batch, shaped)
    tokens = batch.mask.sum().float()
    for name, values in ((ENTROPY, scores.entropy), (LOGP, scores.logps)):
        total = torch.where(batch.mask, values.detach(), 0).sum()
        run.metrics.add(name, Total(sums=(total, tokens), form=mean_or_infinity), batch.mask)
    for name, metric in outcome.metrics.items():
        record(trainer, name, metric, batch.mask)
    if outcome.on_hidden_gradient:
        watch_gradient(trainer, outcome, seen.through_head[0], batch.mask)
    return hand_to_trl(trainer, inputs, shaped, batch)


def mean_or_infinity(total: float, count: float) -> float:
    """The mean; NaN where no token counts, an infinity where one has a value that is not finite."""
    if not count:
        return math.nan
    return total / count if math.isfinite(total) else math.inf


def token_batch(
    trainer: Any, model: Any, inputs: Mapping[str, Any], scores: Scores, attention: Attention | None
) -> TokenBatch:
    """The micro-batch as terms see it."""
    logps, hidden, chain = scores.logps, scores.hidden, trainer._hclm.chain
    mask = mask_of(inputs)
    old_logps = inputs.get("old_per_token_logps", inputs.get("hclm/old_logps"))
    reads: dict[str, Any] = {} if attention is None else {"attention": lambda: attention}
    if hidden is not None:
        reads["hidden"] = last_layer(lambda: hidden)
    if chain.needs_vocab_gradient and hidden is not None:
        reads["over_vocab"] = lambda functional: over_vocab_of(trainer, functional, hidden, mask)
    if chain.needs_rescoring:
        reads["score"] = functools.partial(score, trainer, model)
    return TokenBatch(
        ids=inputs["completion_ids"],
        mask=mask,
        logps=logps,
        # RLOO scores them in a pass of its own, whose dropout and rounding differ, also where the policy does not
        old_logps=logps.detach() if old_logps is None or is_on_policy(trainer.args) else old_logps,
        ref_logps=inputs.get("ref_per_token_logps"),
        entropy=scores.entropy,
        advantages=per_token(inputs["advantages"], mask),
        rewards=inputs["hclm/rewards"],
        group_rewards=inputs["hclm/group_rewards"],
        columns={key.removeprefix(COLUMN): value for key, value in inputs.items() if key.startswith(COLUMN)},
        shared=trainer._hclm.shared,
        clip_range=(trainer.epsilon_low, trainer.epsilon_high),
        is_clipped=clipped(trainer, logps, old_logps, per_token(inputs["advantages"], mask), mask),
        progress=progress(trainer),
        step=trainer.state.global_step,
        share=trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation,
        **reads,
    )


def clipped(trainer: Any, logps: Tensor, old_logps: Tensor | None, advantages: Tensor, mask: Tensor) -> Tensor | None:
    """The tokens whose gradient PPO's clip drops, by the ratio that the loss clips; None where it clips none.

    All (B, T); log-probs in nats. The ratio of a response is that of GSPO, Zheng et al., 2025, arXiv:2507.18071, or,
    with RLOO, the product of its tokens'.
    """
    args = trainer.args
    if old_logps is None or is_on_policy(args) or getattr(args, "loss_type", None) in ("cispo", "sapo", "vespo"):
        return None
    ratio = torch.where(mask, logps.detach() - old_logps, 0)
    if trainer._hclm_is_sequence_level():  # RLOO has no levels: the ratio of a response is the product of its tokens'
        is_mean = hasattr(args, "importance_sampling_level")
        ratio = ratio.sum(dim=1, keepdim=True) / (mask.sum(dim=1, keepdim=True).clamp(min=1) if is_mean else 1)
    return outside_clip(ratio.exp(), advantages, mask, (trainer.epsilon_low, trainer.epsilon_high))


def hand_to_trl(trainer: Any, inputs: dict[str, Any], shaped: Tensor, batch: TokenBatch) -> Tensor:
    """Puts the shaped advantages where TRL's loss reads them; gives the log-probs that it goes on with, (B, T).

    `shaped`: (B,) or (B, T). A loss with one ratio a response gets the latter split (`split_token_weights`).
    """
    logps = batch.logps
    if shaped.dim() == 1:
        return logps
    if trainer._hclm_is_sequence_level():
        shaped, weights = split_token_weights(shaped, batch.mask)
        if (weights != 1).any():
            trainer._hclm_refuse_weighted_kl()
            logps = logps.detach() + weights * (logps - logps.detach())
    inputs["advantages"] = shaped
    return logps


def share_of_step(trainer: Any, loss: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """A loss (B, T) as its share of the mean over all tokens of the optimiser step, a scalar one, (), of its mean."""
    accumulation = trainer.current_gradient_accumulation_steps
    undo = 1.0 if trainer.loss_is_scaled_for_ga else accumulation  # RLOO's loss is divided once more afterwards
    if loss.dim() == 0:
        return loss / accumulation * undo
    items = inputs["hclm/items"].clamp(min=1.0) / trainer.accelerator.num_processes
    normaliser = items * accumulation / trainer.args.steps_per_generation
    return torch.where(mask_of(inputs), loss, 0).sum() / normaliser * undo


def vespo_weights(weights: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """phi of each response, (B,), of TRL's (B, 1) or (B, T): the mean over the tokens that it acts on.

    phi depends on a token by the sign of its advantage alone, and a token that a term dropped has the phi of A >= 0.
    """
    if weights.size(1) == 1:
        return weights.squeeze(1)
    counts = mask.bool()
    acts = counts & (advantages != 0)
    mean = torch.where(acts, weights, 0).sum(dim=1) / acts.sum(dim=1).clamp(min=1)
    first = weights.gather(1, counts.int().argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(acts.any(dim=1), mean, first)


def log_vespo(trainer: Any) -> None:
    """`vespo/phi_seq_mean` as TRL has it, a mean over responses: with (B, T) advantages it would be one over tokens."""
    weights, trainer._hclm.vespo = trainer._hclm.vespo, None
    if weights is None:
        return
    sums = torch.stack([weights.sum(), weights.new_tensor(float(len(weights)))])
    total, count = trainer.accelerator.reduce(sums, reduction="sum")
    trainer._metrics["train"]["vespo/phi_seq_mean"][-1] = (total / count.clamp(min=1.0)).item()
