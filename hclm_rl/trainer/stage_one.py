"""Generating, and stage 1: the chain reads a whole generation batch before TRL shuffles and splits it."""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import is_async_callable

from ..chain.chain import RolloutOutcome
from ..chain.finite import Watch
from ..chain.metrics import StepMetrics
from ..equations.vocab import OnePass
from ..recipe.refusals import acts_between
from ..responses.rewards import checked
from ..types import Rollout, last_layer
from .head import entropy_by_head_of, over_vocab_of, slope_by_head_of, slope_of
from .judging import EXCESS, judge, say_of_policy
from .run import (
    AFFECTED,
    COLUMN,
    ROW,
    TRACED,
    Generation,
    Scores,
    everywhere,
    generator,
    mask_of,
    note,
    once,
    progress,
    strengths,
    transcript_of,
)
from .scoring import aside, reference_hidden, score
from .states import Passing, Shuffled
from .tracing import traced


@contextmanager
def checked_rewards(trainer: Any) -> Iterator[None]:
    """What stands in for the user's own list and objects is there inside alone; without terms they are TRL's alone."""
    given = trainer.reward_funcs
    if not trainer._hclm.chain.links:
        yield
        return
    trainer.reward_funcs = [
        func if isinstance(func, torch.nn.Module) else checked(func, name, is_async_callable(func))
        for func, name in zip(given, trainer.reward_func_names, strict=True)
    ]
    try:
        yield
    finally:
        trainer.reward_funcs = given


def count_unscored(trainer: Any, reward_parts: Tensor) -> None:
    """Logs the share of responses that a reward function did not score; refuses infinities of reward models.

    `reward_parts` (N, reward functions) are those of all processes.

    Metrics:
        rewards/<name>/not_scored (share): of the responses for which the reward function returned None, in a run with
            terms. Healthy: 0, or what you mean it to be. Else: such a response is not trained on: mend the function
    """
    unscored, infinite = torch.stack(
        [reward_parts.isnan().float().mean(dim=0), reward_parts.isinf().float().sum(dim=0)]
    )
    mode = "train" if trainer.model.training else "eval"
    for name, share, count in zip(trainer.reward_func_names, unscored.tolist(), infinite.tolist(), strict=True):
        if count:
            raise ValueError(
                f"the reward function '{name}' returned {count:.0f} infinities for {len(reward_parts)} responses; "
                "return a finite number, or None for a response that it does not score"
            )
        note(trainer, {f"rewards/{name}/not_scored": share}, mode)


def trls_scores(trainer: Any, output: dict[str, Any], generation: Generation) -> Scores | None:
    """What TRL's own pass for old log-probs saw, if it made one."""
    for scores in generation.scores:  # TRL scores with the reference adapter through the same method
        if trainer._hclm_is_old(scores.logps, output):
            return scores
    generation.scores.clear()
    return None


def can_wait(trainer: Any) -> bool:
    """Whether the loss's own pass will see the generation batch all at once; within it no other pass may run."""
    is_whole = trainer.args.steps_per_generation == trainer.num_iterations == 1
    terms = [link.term for link in trainer._hclm.chain.links]
    return is_whole and not any(each.needs_rescoring and not each.rescores_in_loss for each in terms)


def deferred(trainer: Any, output: dict[str, Any], generation: Generation) -> dict[str, Any]:
    """The batch as TRL goes on with it, its first stage put off to the loss's pass."""
    trainer._hclm.deferred = dict(output), generation
    return output | {ROW: torch.arange(len(output["prompt_ids"]), device=trainer.accelerator.device)}


def catch_up(trainer: Any, inputs: dict[str, Any], shuffled: Scores) -> None:
    """The deferred first stage, in the order in which the batch was generated."""
    (output, generation), trainer._hclm.deferred = trainer._hclm.deferred, None
    row, order, chain = inputs[ROW], inputs[ROW].argsort(), trainer._hclm.chain
    sampled: dict[str, Any] = {}
    with torch.no_grad():
        if shuffled.hidden is not None and chain.needs_sampled_states:
            sampled["states"] = Shuffled(shuffled.hidden.detach(), order)
        elif shuffled.hidden is not None and chain.sampled_moments:
            passing = Passing(mask_of(inputs), chain.sampled_moments)
            passing.add(shuffled.hidden)
            sampled["passed"] = passing.passed(order)
        scores = Scores(shuffled.logps.detach()[order], shuffled.entropy.detach()[order], **sampled)
        new = stage_one(trainer, output, generation, scores)
    inputs |= {key: value[row] if value.dim() else value for key, value in new.items()}


def own_scores(trainer: Any, output: dict[str, Any], generation: Generation) -> Scores:
    """A pass of our own over the generation batch, where TRL made none and a term asks."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    generation.mask = mask_of(output)
    with aside(trainer):
        trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, output["completion_ids"].size(1), trainer.args.per_device_train_batch_size
        )
    return generation.scores[0]


def stage_one(trainer: Any, output: dict[str, Any], generation: Generation, scores: Scores | None) -> dict[str, Tensor]:
    """Runs the chain's first stage; gives the new keys of the batch dict, each (N,), (N, T) or ()."""
    run, policy = trainer._hclm, ""
    rollout = rollout_of(trainer, output, generation, scores)
    if scores is not None:
        sums = torch.stack([torch.where(rollout.mask, scores.entropy, 0).sum(), rollout.mask.sum()])
        entropy, count = trainer.accelerator.reduce(sums, reduction="sum").tolist()
        run.sampled_entropy = entropy / count if count and math.isfinite(entropy) else math.nan
        policy = say_of_policy(trainer, entropies=not math.isfinite(entropy))
    watch = Watch()
    outcome = run.chain.on_rollout(
        rollout,
        run.state.memory,
        strengths(trainer).coefs,
        functools.partial(generator, trainer, "rollout"),
        functools.partial(renormalise, trainer),
        watch,
    )
    run.shared, run.shapers = outcome.shared, outcome.shapers
    stage_metrics = StepMetrics()
    stage_metrics.add(EXCESS, watch.excess(rollout.mask.device), rollout.mask)
    for name, metric in outcome.metrics.items():
        stage_metrics.add(name, metric, rollout.mask)
    metrics = stage_metrics.flush(trainer.accelerator)
    judge(trainer, watch, metrics.pop(EXCESS), policy)
    if once(trainer, "memory after a first rollout"):
        run.state.require_savable()
    note(trainer, metrics)
    keys = keys_of(trainer, rollout, outcome)
    if "old_logps" in output:  # RLOO keeps the sum over a response only
        keys["hclm/old_logps"] = generation.scores[0].logps
    return keys


def keys_of(trainer: Any, rollout: Rollout, outcome: RolloutOutcome) -> dict[str, Tensor]:
    """What the first stage made, as it travels with TRL's batch to the second: each (N,), (N, T) or ()."""
    items = trainer.accelerator.reduce(rollout.mask.sum(), reduction="sum")
    keys = {"hclm/rewards": outcome.rewards, "hclm/group_rewards": outcome.group_rewards, "hclm/items": items}
    if outcome.advantages is not None:
        keys["advantages"] = outcome.advantages
    keys |= {AFFECTED + link: affected for link, affected in outcome.affected.items()}
    if trainer._hclm.trace.is_on:
        keys |= {TRACED + name: values for name, values in traced(trainer, rollout, outcome.metrics).items()}
    return keys | {COLUMN + name: column for name, column in outcome.columns.items()}


def rollout_of(trainer: Any, output: dict[str, Any], generation: Generation, scores: Scores | None) -> Rollout:
    """This process's generation batch, as terms see it."""
    n, rank = len(output["prompt_ids"]), trainer.accelerator.process_index
    own = slice(rank * n, (rank + 1) * n)
    parts = generation.reward_parts
    assert parts is not None
    rewards = (parts * trainer.reward_weights.to(parts.device)).nansum(dim=1)
    rewards = rewards.masked_fill(parts.isnan().all(dim=1), torch.nan)
    group = torch.arange(own.start, own.stop, device=parts.device) // trainer.num_generations
    mask = mask_of(output)
    loss_type = getattr(trainer.args, "loss_type", None)  # RLOO has one loss, a sum over tokens
    return Rollout(
        ids=output["completion_ids"],
        mask=mask,
        advantages=output["advantages"],
        rewards=rewards[own],
        reward_parts=parts[own],
        group_rewards=rewards.view(-1, trainer.num_generations)[group],
        group=group,
        reward_scale=trainer._hclm_reward_scale(rewards)[own],
        logps=None if scores is None else scores.logps,
        entropy=None if scores is None else scores.entropy,
        ref_logps=output.get("ref_per_token_logps"),
        beta=trainer.beta,
        loss_mean="sequences" if loss_type in ("grpo", "sapo") else "tokens",
        sampler_ratio=None if loss_type == "vespo" else output.get("importance_sampling_ratio"),
        rows=generation.rows,
        prompts=generation.prompts,
        texts=generation.texts,
        tokenizer=trainer._tokenizer,
        progress=progress(trainer),
        step=trainer.state.global_step,
        everywhere=functools.partial(everywhere, trainer),
        here=lambda x: x[own, : mask.size(1)] if x.dim() > 1 else x[own],
        total=lambda x: trainer.accelerator.reduce(x, reduction="sum"),
        **reads_of(trainer, output, scores, mask),
    )


def reads_of(trainer: Any, output: dict[str, Any], scores: Scores | None, mask: Tensor) -> dict[str, Any]:
    """The fields of a Rollout that its terms must have declared; `mask`: (N, T), the tokens that count."""
    chain = trainer._hclm.chain
    reads: dict[str, Any] = {}
    if scores is not None and scores.passed is not None:
        reads |= {"hidden": moments_alone, "passed": scores.passed}
    if scores is not None and scores.states is not None:
        states = scores.states
        reads |= {"hidden": last_layer(states.whole), "packed": lambda: states.of(mask)}
        if chain.needs_vocab:
            ids = output["completion_ids"]
            reads["over_vocab"] = OnePass(lambda f: over_vocab_of(trainer, f, states, mask), chain.vocab_functionals)
            reads["slope"] = lambda direction: slope_of(trainer, direction, states, ids, mask)
            reads["entropy_by_head"] = lambda tokens: entropy_by_head_of(trainer, states, tokens)
            reads["slope_by_head"] = lambda direction, tokens: slope_by_head_of(trainer, direction, tokens, states, ids)
    if chain.needs_rescoring:
        reads["score"] = functools.partial(score, trainer, trainer.model)
        reads["transcript"] = transcript_of(output)
        reads["reference_hidden"] = lambda: reference_hidden(trainer, reads["transcript"])
    return reads


def moments_alone(layer: int = -1) -> Tensor:
    """Stands for the hidden states (N, T, D) that were not kept: refuses to give them."""
    raise ValueError(
        "the hidden states were not kept: this chain's terms read moments or means alone (`sampled_moments`), and a "
        "term that reads states in stage 1 names none there"
    )


def renormalise(trainer: Any, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """This process's rewards (N,) -> its advantages as the base algorithm would have made them, and their scale.

    Refuses settings in which TRL does something between rewards and advantages.
    """
    if sentence := acts_between(trainer.args):
        raise ValueError(f"a term shapes the rewards, {sentence}")
    of_all = everywhere(trainer, rewards)
    scale = trainer._hclm_reward_scale(of_all)
    advantages = torch.nan_to_num(trainer._hclm_centre(of_all) / scale, nan=0.0)
    first = trainer.accelerator.process_index * len(rewards)
    own = slice(first, first + len(rewards))
    return advantages[own], scale[own]
