"""A trainer's own state, behind the one attribute `_hclm`, and the small questions that every stage asks of it.

`trainer` is a GRPOTrainer or RLOOTrainer of this folder, in all its modules. It is declared Any, because a type of both
would have to import them, and TRL declares ints as `int | None`.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..chain.chain import Chain, Outcome
from ..chain.door import strength
from ..chain.finite import Watch
from ..chain.generators import link_generator
from ..chain.metrics import StepMetrics
from ..chain.state import ChainState
from ..rollouts.strategy import RolloutStrategy
from ..types import Transcript
from ..watch.callback import CollapseCallback
from ..watch.trace import Trace
from .states import States

# keys in the batch dict, which TRL shuffles and splits with it
AFFECTED, COLUMN, TRACED = "hclm/affected/", "hclm/column/", "hclm/traced/"
ROW = "hclm/row"  # a response's place before the shuffle


@dataclass
class Scores:
    """What one pass over a batch gives."""

    logps: Tensor
    entropy: Tensor
    hidden: Tensor | None = None  # (B, T, D), of the loss's own pass, with gradient
    states: States | None = None  # of the sampling policy, for the first stage
    passed: dict[Callable[..., Tensor], Any] | None = None  # moments and means of its states, which were not kept


@dataclass
class Generation:
    """What was seen while TRL made a generation batch."""

    scores: list[Scores] = field(default_factory=list)  # of the sampling policy, of the whole batch
    mask: Tensor | None = None  # (N, T): the tokens that count, where a pass comes late enough to know them
    reward_parts: Tensor | None = None  # of all processes
    prompts: list = field(default_factory=list)
    texts: list = field(default_factory=list)
    rows: list = field(default_factory=list)


@dataclass
class Strengths:
    """Every link's coefficient in one optimiser step, and the sampled entropy that made them."""

    step: int
    coefs: dict[str, float]  # by link
    sampled_entropy: float | None


@dataclass
class Run:
    """All of a trainer's own state, behind one attribute, so that no name collides with TRL's."""

    chain: Chain
    state: ChainState
    trace: Trace
    metrics: StepMetrics = field(default_factory=StepMetrics)
    watch: Watch = field(default_factory=Watch)  # what the links put into this optimiser step
    said: set[str] = field(default_factory=set)  # what is said or looked at once a run
    shared: dict[str, Tensor] = field(default_factory=dict)
    shapers: tuple[str, ...] = ()  # links that had a hand in the advantages of the generation batch, in stage 1
    strengths: Strengths | None = None
    sampled_entropy: float | None = None  # nats, mean of the last scoring pass over all processes; NaN of no token
    generation: Generation | None = None  # set while TRL makes a generation batch
    deferred: tuple[dict[str, Any], Generation] | None = None  # a batch whose first stage waits for the loss's pass
    inputs: dict[str, Any] | None = None  # set while TRL computes a training loss: the copy whose advantages we shape
    outcome: Outcome | None = None
    vespo: Tensor | None = None  # of the micro-batch: the weight of each response in the loss of this name
    micro_batches: int = 0
    # set during evaluation, a pair a batch: reward parts of all processes, this one's completions as text or messages
    evaluated: list[tuple[Tensor, list]] | None = None
    reference_gives_entropy: bool = False
    watcher: CollapseCallback | None = None  # the detector that the run got by itself
    generated: dict[int, int] = field(default_factory=dict)  # optimiser step: generation batches that began in it
    epochs_done: int = 0  # before the step that training begins with
    rollout: RolloutStrategy | None = None  # where responses come from in training
    rolling: Any = None  # set while TRL makes a generation batch from it: trainer/rollouts.py's Rolling
    rolled: tuple[int, int] = (-1, 0)  # optimiser step of the last, and its number in that step

    @property
    def is_on(self) -> bool:
        """Whether there is anything to do beside TRL."""
        return bool(self.chain.links) or self.trace.is_on or self.rollout is not None


def once(trainer: Any, what: str) -> bool:
    """Whether this is the first time in the run that somebody asks."""
    is_first = what not in trainer._hclm.said
    trainer._hclm.said.add(what)
    return is_first


def progress(trainer: Any) -> float:
    """Share of the training done."""
    return trainer.state.global_step / max(trainer.state.max_steps, 1)


def strengths(trainer: Any) -> Strengths:
    """Made once an optimiser step."""
    run, step = trainer._hclm, trainer.state.global_step
    if run.strengths is None or run.strengths.step != step:
        entropy, done = run.sampled_entropy, progress(trainer)
        coefs = {
            link.name: strength(link.coef, link.name, done, run.state.controller[link.name], entropy, step)
            for link in run.chain.links
        }
        run.strengths = Strengths(step=step, coefs=coefs, sampled_entropy=entropy)
    return run.strengths


def generator(trainer: Any, stage: str, link: str) -> torch.Generator:
    """That of a link in the step at hand."""
    return link_generator(trainer.args.seed, trainer.state.global_step, stage, link)


def note(trainer: Any, metrics: Mapping[str, float], mode: str = "train") -> None:
    """Numbers for TRL's log."""
    for name, value in metrics.items():
        # transformers keeps every entry of the log in memory: without `intern` each would hold names of its own
        trainer._metrics[mode][sys.intern(name)].append(value)


def everywhere(trainer: Any, x: Tensor) -> Tensor:
    """The rows of all processes, in the order of the processes; padded to the widest with zeros.

    `x`: (N,) or (N, T, ...), the same number of rows on every process; gives (processes x N, ...).
    """
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1:
        return x
    sent = x.to(torch.uint8) if x.dtype == torch.bool else x
    if x.dim() > 1:
        sent = accelerator.pad_across_processes(sent, dim=1)
    return accelerator.gather(sent.contiguous()).to(x.dtype)


def mask_of(batch: Mapping[str, Any]) -> Tensor:
    """The response tokens that count, (N, T): neither padding nor what a tool wrote."""
    mask = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if batch.get("tool_mask") is not None else mask


def transcript_of(batch: Mapping[str, Any]) -> Transcript:
    """The batch as the model reads it."""
    return Transcript(
        prompt_ids=batch["prompt_ids"],
        prompt_mask=batch["prompt_mask"].bool(),
        ids=batch["completion_ids"],
        present=batch["completion_mask"].bool(),
    )
