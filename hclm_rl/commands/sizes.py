"""What each term of a run will hold, compute and send, by formulas alone: nothing is loaded or trained

docs/scaling.md derives them. Symbols, all for one GPU: M response tokens of a generation batch, m of a micro-batch, D
hidden width, V vocabulary, P parameters. Lengths are taken to be the longest allowed, so memory is an upper bound.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeGuard

from ..chain.chain import Chain, Link
from ..equations.rows import PIECE_BYTES
from ..equations.vocab import CHUNK_BYTES
from ..terms.entropy_flow import EntropyFlow
from ..terms.force_reweight import ForceReweight
from ..types import Term

GIB = 2**30
ASKED = "--model-size"  # the flag by which this page is asked for
# bytes at once for each token of a generation batch, of the terms that read numbers alone, and float32 copies of a
# chunk of log-probs without and with gradient (counted operation by operation, tests/commands/test_sizes.py and
# tests/equations/test_over_rows.py); by reasoning, not fitted: copies of a piece of states, D x D matrices
TOKEN_BYTES, CHUNKS, CHUNKS_WITH_GRADIENT, PIECES, SQUARES = 51, 7, 12, 4, 6
MODEL_BYTES = 16  # a parameter, its gradient, Adam's two moments, in float32


class Model(NamedTuple):
    """What of a model counts."""

    width: int
    vocabulary: int
    layers: int
    parameters: float


MODELS = {  # of the Qwen2.5 family
    "0.5b": Model(896, 151_936, 24, 0.494e9),
    "1.5b": Model(1536, 151_936, 28, 1.54e9),
    "3b": Model(2048, 151_936, 36, 3.09e9),
    "7b": Model(3584, 152_064, 28, 7.62e9),
    "14b": Model(5120, 152_064, 48, 14.8e9),
    "32b": Model(5120, 152_064, 64, 32.8e9),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run that is asked about."""

    model: Model
    gpus: int
    responses: int  # of a generation batch, on all GPUs
    length: int  # tokens of a response at most
    micro_batch: int = 1  # responses on a GPU
    state_bytes: int = 4  # of a number of the hidden states: those of the model's dtype
    memory: float = 80.0  # GiB of a GPU
    is_sharded: bool = True  # FSDP or ZeRO-3: parameters, gradients and moments lie on all GPUs together
    is_checkpointed: bool = True  # gradient checkpointing

    @property
    def tokens(self) -> int:
        """M."""
        return math.ceil(self.responses / self.gpus) * self.length

    @property
    def tokens_at_once(self) -> int:
        """m."""
        return self.micro_batch * self.length

    @property
    def needs_pass(self) -> bool:
        """Whether statistics of the step need a pass of their own: the loss's sees a micro-batch alone."""
        return self.tokens > self.tokens_at_once

    @property
    def states(self) -> float:
        """GiB of the hidden states of a generation batch, kept between the scoring pass and stage 1."""
        return self.tokens * self.model.width * self.state_bytes / GIB if self.needs_pass else 0.0

    @property
    def base(self) -> float:
        """GiB that the run takes without terms: the model's states, and the states at each layer's entry."""
        states = self.model.parameters * MODEL_BYTES / (self.gpus if self.is_sharded else 1)
        layers = self.model.layers if self.is_checkpointed else 34 * self.model.layers  # 34: Korthikanti et al., 2022
        return (states + layers * self.tokens_at_once * self.model.width * 2) / GIB

    @property
    def flops(self) -> float:
        """Of a step without terms and generation: 6 a parameter and token, 8 where the forward pass is repeated."""
        return (8 if self.is_checkpointed else 6) * self.model.parameters * self.tokens


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one link adds on a GPU; of what several links share, each has the whole."""

    name: str
    kept: float = 0.0  # GiB between the scoring pass and the end of stage 1
    peak: float = 0.0  # GiB at once beside that
    flops: float = 0.0  # in float32, of products with the states
    head_flops: float = 0.0  # in the head's dtype
    pass_flops: float = 0.0  # of the scoring pass, which all links share
    sent: float = 0.0  # MiB a step in all-reduces and gathers
    note: str = ""


def square(run: Run) -> float:
    """Operations of a product of M x D with D x D."""
    return 2.0 * run.tokens * run.model.width**2


# products of M x D x D that stage 1 and stage 2 make together: half a one for a covariance, about one a solve
PRODUCTS = {
    "LogDet": 1.5,  # covariance; the injected force
    "InformationForce": 2.5,  # covariance; the forces of all rows; those of the gradient's rows
    "Variance": 0.5,
    "Spectrum": 0.5,
    "CodingRate": 0.0,  # of N pooled rows
    "VonNeumann": 1.5,
}
POOLS = ("CodingRate", "Dqo", "GroupLogDet", "Spectrum")  # the mean states of all responses go to all processes
HOLDS_FORCES = ("LogDet", "Variance", "CodingRate", "VonNeumann", "FeatureSoftmax", "GroupLogDet")
# of D^3; von Neumann's with the product that gives log C
DECOMPOSES = {"VonNeumann": 26 / 3, "InformationForce": 1 / 3, "LogDet": 1 / 3, "CodingRate": 1 / 3}


def head_products(term: Term) -> float:
    """Products of M x D x V that stage 1 makes: the logits, once for all functionals of the run's terms."""
    if not term.needs_vocab:
        return 0.0
    if isinstance(term, ForceReweight) and term.by == "representation":
        return 2.0  # the forces through the head, and the logits
    if is_through_head(term):
        return 2.0 + 2.0 * term.share  # of all tokens G h and the logits; of those drawn the logits and G
    return 1.0


def is_through_head(term: Term) -> TypeGuard[ForceReweight | EntropyFlow]:
    """Whether it holds and sends the gradient at the output head."""
    return isinstance(term, ForceReweight | EntropyFlow) and term.through == "head"


def cost_of(link: Link, run: Run) -> Cost:
    """By the formulas of docs/scaling.md; of a stranger's term what its declarations say."""
    term, kind = link.term, type(link.term).__name__
    width, vocabulary = run.model.width, run.model.vocabulary
    reads_sampled = bool(Chain((link,)).needs_sampled_states)
    peak, flops, head, passes = run.tokens * TOKEN_BYTES / GIB, 0.0, 0.0, 0.0
    sent, note = 2 * 4 * run.tokens / 2**20, ""
    if term.needs_scores and run.needs_pass:
        passes += 2 * run.model.parameters * run.tokens
    if term.needs_hidden:
        squares = SQUARES * width**2 * (8 if kind == "VonNeumann" else 4)
        forces = run.tokens_at_once * width * 4 if kind in HOLDS_FORCES else 0
        peak += (PIECES * PIECE_BYTES + squares + forces) / GIB
        flops += PRODUCTS.get(kind, 0.0) * square(run) + DECOMPOSES.get(kind, 0.0) * width**3
        sent += 4 * (width**2 + width) / 2**20 if kind in PRODUCTS else 0.0
        sent += 8 * run.responses * width / 2**20 if kind in POOLS else 0.0
        note = "" if kind in PRODUCTS or kind in HOLDS_FORCES else "its own operations are not counted"
    if term.needs_vocab or term.needs_vocab_gradient:
        one = 2.0 * run.tokens * width * vocabulary
        # stage 2: forward, the same again, and two products of the backward pass
        head += head_products(term) * one + (4 * one if term.needs_vocab_gradient else 0)
        cast = 2 * width * vocabulary  # the head in half precision, where autocast asks for it
        peak += ((CHUNKS_WITH_GRADIENT if term.needs_vocab_gradient else CHUNKS) * CHUNK_BYTES["gpu"] + cast) / GIB
    if is_through_head(term):  # G, and what is sent of it; of one half of the prompts, then of the other
        peak += 2 * 4 * width * vocabulary / GIB
        sent += 2 * 4 * width * vocabulary / 2**20
    if term.needs_rescoring:
        note = "passes over other texts: their number depends on the data"
    kept = run.states if reads_sampled else 0.0
    return Cost(
        name=link.name,
        kept=kept,
        peak=peak,
        flops=flops,
        head_flops=head,
        pass_flops=passes,
        sent=sent if run.gpus > 1 else 0.0,
        note=note,
    )


def needed(costs: Sequence[Cost], run: Run, is_each_alone: bool = False) -> float:
    """GiB in all: the states are kept once for all links, all else adds up; or with the greatest of the links alone."""
    if is_each_alone:
        return run.base + max((cost.kept + cost.peak for cost in costs), default=0.0)
    return run.base + max((cost.kept for cost in costs), default=0.0) + sum(cost.peak for cost in costs)


def what_would_fit(links: Sequence[Link], run: Run, is_each_alone: bool = False) -> list[str]:
    """Changes of one thing each that bring the run below the GPU's memory, the mildest first."""
    options: list[tuple[str, Callable[[int], Run | None]]] = [
        (
            "the model in bfloat16 (model_init_kwargs: {{dtype: bfloat16}}), whose states take half",
            lambda i: replace(run, state_bytes=2) if i == 0 and run.state_bytes == 4 else None,
        ),
        (
            "{0.micro_batch} responses at once on a GPU (per_device_train_batch_size)",
            lambda i: replace(run, micro_batch=run.micro_batch >> (i + 1)) if run.micro_batch >> (i + 1) else None,
        ),
        (
            "{0.gpus} GPUs",
            lambda i: replace(run, gpus=run.gpus << (i + 1)) if run.gpus << (i + 1) <= run.responses else None,
        ),
        (
            "{0.responses} responses a generation batch",
            lambda i: (
                replace(run, responses=run.responses >> (i + 1)) if run.responses >> (i + 1) >= run.gpus else None
            ),
        ),
        (
            "responses of at most {0.length} tokens",
            lambda i: replace(run, length=run.length >> (i + 1)) if run.length >> (i + 1) >= 64 else None,
        ),
    ]
    found = []
    for sentence, change in options:
        for i in range(12):
            changed = change(i)
            if changed is None:
                break
            total = needed([cost_of(link, changed) for link in links], changed, is_each_alone)
            if total <= run.memory:
                found.append(sentence.format(changed) + f": {total:.1f} GiB")
                break
    return found


def model_of(name: str) -> Model:
    """A size by name, or a model's config.json."""
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    file = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not file.is_file():
        raise ValueError(f"{ASKED} must be one of {', '.join(MODELS)}, a config.json or its folder, got '{name}'")
    config = json.loads(file.read_text())
    config = config.get("text_config", config)
    try:
        width, vocabulary, layers = (config[key] for key in ("hidden_size", "vocab_size", "num_hidden_layers"))
        inner, heads = config["intermediate_size"], config["num_attention_heads"]
    except KeyError as missing:
        raise ValueError(f"{file} has no {missing}, which the size needs: give one of {', '.join(MODELS)}") from None
    of_keys = config.get("head_dim", width // heads) * config.get("num_key_value_heads", heads)
    of_queries = config.get("head_dim", width // heads) * heads
    layer = 2 * width * of_queries + 2 * width * of_keys + 3 * width * inner  # gated feed-forward
    ends = vocabulary * width * (1 if config.get("tie_word_embeddings") else 2)
    return Model(width, vocabulary, layers, float(layers * layer + ends))
