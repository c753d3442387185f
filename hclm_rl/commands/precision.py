"""What the doctor says of numbers: casts that change log-probs, a sampler that disagrees, a masked vocabulary"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ..trainer.head import output_head
from ..trainer.keeping import Kept, states
from .dry_run import DryRun

EXACT = 1e-5  # nats; log-probs that differ by less are the same but for the order of sums
SAMPLER = "sampling/sampling_logp_difference"  # as TRL logs it with vLLM
ROWS = 16  # responses looked at


def of_precision(run: DryRun) -> tuple[list[str], list[str]]:
    """(mistakes, notes)"""
    kept = next((each for each in run.others if each.mask.any()), None)
    if kept is None:
        return [], sampler_notes(run.log)
    piece = next(kept.pieces(ROWS))
    if not piece.mask.any():
        piece = kept
    masked = masked_vocabulary(run, piece)
    if masked:
        return [masked], sampler_notes(run.log)
    return [], cast_notes(run, piece) + sampler_notes(run.log)


def sampler_notes(log: list[dict]) -> list[str]:
    """Where vLLM samples: how far its log-probs are from those that are trained."""
    means = [entry[f"{SAMPLER}/mean"] for entry in log if f"{SAMPLER}/mean" in entry]
    most = [entry[f"{SAMPLER}/max"] for entry in log if f"{SAMPLER}/max" in entry]
    if not means or max(most, default=0.0) < EXACT:
        return []
    return [
        f"the sampler's log-probs differ from the trainer's by {statistics.fmean(means):.2g} nats a token in the mean "
        f"and {max(most):.2g} at most: each rollout is off-policy by that much before its first update"
    ]


@torch.no_grad()
def logits_of(run: DryRun, kept: Kept) -> tuple[Tensor, Tensor]:
    """(states, logits) of the response tokens, at temperature 1."""
    rows = torch.cat(list(states(run.trainer, kept)))
    with output_head(run.trainer) as head, run.trainer.accelerator.autocast():
        return rows, torch.nn.functional.linear(rows.to(head.weight.dtype), head.weight, head.bias)


def masked_vocabulary(run: DryRun, kept: Kept) -> str:
    """The sentence on logits of -inf, or none."""
    _, logits = logits_of(run, kept)
    masked = (logits == -torch.inf).all(dim=0)
    if not masked.any():
        return ""
    return (
        f"{int(masked.sum())} of the {len(masked)} ids of the vocabulary have a logit of -inf: 0 x -inf makes the "
        "entropy and its gradient NaN; give them a large negative number instead, -1e4 say"
    )


@contextmanager
def in_float32(run: DryRun) -> Iterator[None]:
    """Weights and products in float32 inside, and as they were afterwards: widening loses nothing."""
    model = run.trainer.model
    narrow = [each for each in model.parameters() if each.dtype in (torch.bfloat16, torch.float16)]
    types = [each.dtype for each in narrow]
    for each in narrow:
        each.data = each.data.float()
    try:
        yield
    finally:
        for each, dtype in zip(narrow, types, strict=True):
            each.data = each.data.to(dtype)


def logps_of(run: DryRun, kept: Kept) -> Tensor:
    """Of the response tokens, as the trainer's pass has them."""
    _, logits = logits_of(run, kept)
    return logits.float().log_softmax(dim=-1).gather(1, kept.transcript.ids[kept.mask].unsqueeze(1)).squeeze(1)


def cast_notes(run: DryRun, kept: Kept) -> list[str]:
    """What the recipe's precision does to log-probs, and to updates that are smaller than a weight's last digit."""
    narrow = [each for each in run.trainer.model.parameters() if each.dtype in (torch.bfloat16, torch.float16)]
    precision = run.trainer.accelerator.mixed_precision
    has_casts = precision in ("bf16", "fp16")
    if not narrow and not has_casts:
        return []
    as_trained = logps_of(run, kept)
    accelerator = run.trainer.accelerator
    autocast = accelerator.autocast
    accelerator.autocast = lambda *_, **__: nullcontext()
    try:
        with in_float32(run):
            exact = logps_of(run, kept)
    finally:
        del accelerator.autocast
    assert accelerator.autocast == autocast
    off = (as_trained - exact).abs()
    if off.max() < EXACT:
        return []
    names = sorted({str(each.dtype).removeprefix("torch.") for each in narrow})
    what = [f"{'/'.join(names)} weights"] if names else []
    what += [f"{precision} casts"] if has_casts else []
    notes = [
        f"{' and '.join(what)} change the policy's log-probs by {off.mean():.2g} nats a token in the mean and "
        f"{off.max():.2g} at most, against float32 with the same weights"
    ]
    trained = [each for each in run.parameters if each.dtype in (torch.bfloat16, torch.float16)]
    if trained and (rate := run.recipe_rate) > 0:
        notes.append(lost_updates(trained, rate))
    return notes


def lost_updates(trained: list[torch.nn.Parameter], rate: float) -> str:
    """The share of weights on which an update of the size of the learning rate, about Adam's, is rounded away."""
    count = sum(each.numel() for each in trained)
    lost = 0
    for each in trained:
        value = each.detach()
        lost += int(((value.float() + rate).to(value.dtype) == value).sum())
    name = str(trained[0].dtype).removeprefix("torch.")
    return (
        f"an update of {rate:g}, which is about Adam's at this learning rate, is rounded away on "
        f"{100 * lost / count:.0f} % of the {name} weights that are trained: keep them in float32 (dtype: float32) and "
        "cast (bf16: true)"
    )
