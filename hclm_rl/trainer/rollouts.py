"""How a rollout of ours sits in TRL's generation: as GRPO's `rollout_func`, for RLOO in place of its sampling.

In training alone: evaluation is TRL's own. TRL makes the old log-probs of the loss itself: by a pass over the whole
texts where a generation batch serves several updates, else those of the loss's own pass. So what a rollout returns as
log-probs is checked, logged and handed on (`sampling_per_token_logps`), and the loss's ratio does not rest on it; the
weights with which TRL's GRPO corrects for vLLM do.
"""

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.models.utils import unwrap_model_for_generation

from ..recipe.rollout import name_of
from ..rollouts.checks import checked
from ..rollouts.sampler import Sampler
from ..rollouts.strategy import Asked, Response, RolloutStrategy
from ..rollouts.vllm_sampler import VllmSampler
from .engine import VllmEngine, engine_of
from .run import note
from .tools import TrlTools, talk_of


@dataclass
class Rolling:
    """What is known while a rollout of ours makes the responses of a generation batch."""

    raw: list = field(default_factory=list)  # the prompts as the data set has them, one a response
    responses: list[Response] = field(default_factory=list)
    tools: TrlTools | None = None


def refuse_rollout(trainer: Any, rollout: RolloutStrategy) -> None:
    """What a rollout cannot do in this run, said before training; recipe/rollout.py reads the settings alone."""
    args, name, has_tools = trainer.args, name_of(rollout), bool(getattr(trainer, "tools", None))
    group, here = trainer.num_generations, args.per_device_train_batch_size * args.steps_per_generation
    if getattr(trainer, "rollout_func", None) is not None:
        raise ValueError(
            f"the rollout '{name}' beside rollout_func: the responses have one source; drop one of the two"
        )
    if trainer.is_fsdp_enabled or (is_deepspeed_zero3_enabled() and not args.ds3_gather_for_generation):
        raise ValueError(f"the rollout '{name}' needs the whole model on each process: use DDP or ZeRO-2")
    if here % group:
        raise ValueError(
            f"the rollout '{name}' makes all responses to a prompt on one process: per_device_train_batch_size x "
            f"steps_per_generation, {here}, must be a multiple of num_generations, {group}"
        )
    if rollout.needs_tools and not has_tools:
        raise ValueError(
            f"the rollout '{name}' branches behind the replies of tools, and this run has none: give tools or an "
            "environment, or use cure or entropy_fork, which branch inside a text"
        )
    if has_tools and not rollout.takes_tools:
        raise ValueError(
            f"the rollout '{name}' branches inside a turn, where what the tools did cannot be taken back: use arpo or "
            "entropy_balanced, which branch behind a tool's reply"
        )


@contextmanager
def rolling(trainer: Any) -> Iterator[None]:
    """Inside, TRL takes responses from the run's rollout, if it has one."""
    run = trainer._hclm
    if run.rollout is None:
        yield
        return
    run.rolling = Rolling()
    is_grpo = hasattr(trainer, "rollout_func")
    if is_grpo:
        trainer.rollout_func = as_rollout_func
    try:
        yield
    finally:
        run.rolling = None
        if is_grpo:
            trainer.rollout_func = None


def as_rollout_func(prompts: list, trainer: Any) -> dict[str, list]:
    """What TRL's GRPO asks a `rollout_func` for."""
    trainer._hclm.rolling.raw = prompts
    prompt_ids, images, _ = trainer._tokenize_prompts(prompts)
    responses = roll(trainer, prompt_ids, images)
    # of several turns TRL reads the first here, and the others in `_tool_call_loop`
    lengths = [len(each.ids) for each in responses]
    if trainer.tools:
        lengths = [first_turn(mask) for mask in masks_of(responses)]
    made = {
        "prompt_ids": prompts_of(responses, prompt_ids),
        "completion_ids": [list(each.ids)[:n] for each, n in zip(responses, lengths, strict=True)],
        "logprobs": [list(each.logps)[:n] for each, n in zip(responses, lengths, strict=True)],
    }
    return made | ({"env_mask": masks_of(responses)} if leaves_out(responses) else {})


def done(batch: Rolling) -> tuple:
    """What TRL's own loop over tool calls would give: all turns were drawn, and their tools run, in the rollout."""
    assert batch.tools is not None
    ids, logps = [list(each.ids) for each in batch.responses], [list(each.logps) for each in batch.responses]
    messages = [talk_of(each).messages for each in batch.responses]
    counts = batch.tools.calls, batch.tools.failures
    return masks_of(batch.responses), messages, ids, logps, *counts, [[] for _ in ids]


def leaves_out(responses: Sequence[Response]) -> bool:
    """Whether a token has no part in the loss."""
    return any(each.is_trained is not None and not all(each.is_trained) for each in responses)


def first_turn(mask: list[int]) -> int:
    """Tokens before the first that a tool wrote."""
    return max(1, mask.index(0)) if 0 in mask else len(mask)


def prompts_of(responses: Sequence[Response], asked: list[list[int]]) -> list[list[int]]:
    """The tokens that each response answers."""
    return [ids if each.prompt is None else list(each.prompt) for each, ids in zip(responses, asked, strict=True)]


def masks_of(responses: Sequence[Response]) -> list[list[int]]:
    """1 on the tokens that are trained."""
    return [[1] * len(each.ids) if each.is_trained is None else list(map(int, each.is_trained)) for each in responses]


def roll(trainer: Any, prompt_ids: list[list[int]], images: Any) -> list[Response]:
    """The responses of the run's rollout to TRL's prompts, of which each stands there once a response.

    Refuses images, and a group whose prompts differ.
    """
    run, group = trainer._hclm, trainer.num_generations
    rollout, batch = run.rollout, run.rolling
    name = name_of(rollout)
    if images is not None:
        raise ValueError(f"the rollout '{name}' reads text alone, and this prompt has images")
    for start in range(0, len(prompt_ids), group):
        if any(ids != prompt_ids[start] for ids in prompt_ids[start : start + group]):
            raise ValueError(
                f"the rollout '{name}' makes all {group} responses to one prompt, and the environment gave prompt "
                f"{start // group} of this process different texts"
            )
    batch.tools = TrlTools(trainer, batch.raw, group) if getattr(trainer, "tools", None) else None
    with engine_of(trainer) as engine, generating(trainer) as model:
        asked = asked_of(trainer, sampler_of(trainer, model, engine), prompt_ids[::group], batch)
        responses = checked(name, rollout(asked), asked, model.get_input_embeddings().num_embeddings)
    batch.responses = responses
    if batch.tools is not None:
        batch.tools.settle(name, responses)
    log(trainer, name, asked, responses)
    return responses


@contextmanager
def generating(trainer: Any) -> Iterator[Any]:
    """The policy as TRL samples from it, without dropout."""
    with (
        unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model,
        torch.no_grad(),
    ):
        was_training = model.training
        model.eval()
        try:
            yield model
        finally:
            model.train(was_training)


def sampler_of(trainer: Any, model: Any, engine: VllmEngine | None) -> Sampler:
    """Draws as the run's settings say, with vLLM where the run has it."""
    args = trainer.args
    given: dict[str, Any] = {
        "model": model, "ends": trainer.eos_token_ids, "pad": trainer._tokenizer.pad_token_id,
        "longest": trainer.max_completion_length, "temperature": trainer.temperature, "top_k": args.top_k,
        "top_p": args.top_p, "min_p": args.min_p, "repetition_penalty": args.repetition_penalty,
    }  # fmt: skip
    return Sampler(**given) if engine is None else VllmSampler(**given, engine=engine)


def asked_of(trainer: Any, sampler: Sampler, prompts: list[list[int]], batch: Rolling) -> Asked:
    """What the rollout is asked for."""
    args, run, tokenizer = trainer.args, trainer._hclm, trainer._tokenizer
    group, step = trainer.num_generations, trainer.state.global_step
    first = trainer.accelerator.process_index * len(prompts)
    number = run.rolled[1] + 1 if run.rolled[0] == step else 0  # of the generation batch in this optimiser step
    run.rolled = step, number

    def stream(prompt: int, *names: object) -> random.Random:
        return random.Random("/".join(map(str, (args.seed, step, number, first + prompt, *names))))

    return Asked(
        prompts=prompts,
        responses=group,
        longest=trainer.max_completion_length,
        sampler=sampler,
        stream=stream,
        raw=batch.raw[::group],
        encode=functools.partial(encode, trainer),
        tokenizer=tokenizer,
        tools=batch.tools,
        memory=run.state.memory.get(name_of(run.rollout), {}),
        entropy=run.sampled_entropy,
        progress=step / max(trainer.state.max_steps, 1),
        step=step,
    )


def encode(trainer: Any, prompt: Any) -> list[int]:
    """The tokens of a prompt as the data set might have it. Refuses to where environments make the prompts."""
    if getattr(trainer, "environment_factories", None) is not None:
        raise ValueError("a rollout that changes prompts does not work in a run with environments, which make them")
    return trainer._tokenize_prompts([prompt])[0][0]


def log(trainer: Any, name: str, asked: Asked, responses: Sequence[Response]) -> None:
    """What a generation batch cost, counted in the sampler; sums over all processes.

    Metrics:
        rollout/tokens_drawn (tokens): drawn from the model for a generation batch, those thrown away included
        rollout/tokens_read (tokens): run through the model without a draw: each prompt once, tools' replies; with vLLM
            also what the policy reads to score responses
        rollout/tokens_reused (tokens): of prompts and responses, found in the cache where a text went on; with vLLM as
            it says, of its own
        rollout/tokens_returned (tokens): of the responses. Healthy: more than were drawn where branches share prefixes
        rollout/share_trained (share): of those, in the loss: neither tools' nor a prefix that counts as prompt
        rollout/logp (nats): mean log-prob of the tokens that are trained, as they were drawn
    """
    counts, masks = asked.sampler.counts, masks_of(responses)
    trained = [logp for each, mask in zip(responses, masks, strict=True)
               for logp, counts_here in zip(each.logps, mask, strict=True) if counts_here]  # fmt: skip
    names = sorted(asked.notes)
    sums = [
        *(counts.drawn, counts.read, counts.reused, sum(len(each.ids) for each in responses)),
        *(len(trained), sum(trained)),
        *(value for note in names for value in (sum(asked.notes[note]), len(asked.notes[note]))),
    ]
    told = torch.tensor(sums, dtype=torch.float64).to(trainer.accelerator.device, torch.float32)
    drawn, read, reused, returned, count, logp, *notes = trainer.accelerator.reduce(told, reduction="sum").tolist()
    found = {
        "rollout/tokens_drawn": drawn,
        "rollout/tokens_read": read,
        "rollout/tokens_reused": reused,
        "rollout/tokens_returned": returned,
        "rollout/share_trained": count / returned,
        "rollout/logp": logp / max(count, 1),
    }
    found |= {f"{name}/{note}": notes[2 * i] / notes[2 * i + 1] for i, note in enumerate(names) if notes[2 * i + 1]}
    note(trainer, found)


def take_columns(trainer: Any, rows: list[dict]) -> None:
    """What the rollout says of each response, for reward functions and terms. Refuses a name that the data has."""
    batch = trainer._hclm.rolling
    if batch is not None and batch.responses:
        for row, response in zip(rows, batch.responses, strict=True):
            if taken := sorted(response.columns.keys() & row.keys()):
                raise ValueError(
                    f"the data has a column '{taken[0]}', which the rollout gives its responses: rename it in the data"
                )
            row.update(response.columns)


def loss_mask(trainer: Any, like: Tensor) -> dict[str, Tensor]:
    """For RLOO, which has no such mask, under GRPO's name: (N, T), 1 on the tokens that are trained, and on padding.

    `like`: the responses' tokens, (N, T). Empty where all are trained.
    """
    batch = trainer._hclm.rolling
    if batch is None or hasattr(trainer, "rollout_func") or not leaves_out(batch.responses):
        return {}
    mask = torch.ones_like(like)
    for row, each in zip(mask, masks_of(batch.responses), strict=True):
        row[: len(each)] = torch.tensor(each, device=like.device)
    return {"tool_mask": mask}


def without_the_rest(inputs: Mapping[str, Any], logps: Tensor) -> Tensor:
    """For RLOO: tokens that are not trained keep their old log-prob, so the response's ratio is that of the others.

    `logps`: (B, T), in nats; so is what it gives.
    """
    if "old_logps" not in inputs or "tool_mask" not in inputs:
        return logps
    return torch.where(inputs["tool_mask"].bool(), logps, inputs["hclm/old_logps"])
