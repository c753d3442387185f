"""The state before the first token, and what it knows: Intention Collapse, 2026, arXiv:2601.01011v2

The intention of a model at a prompt is its hidden state at the LAST prompt position, the one that predicts the first
token: one forward pass, no generation. Three readings, kept apart because they move apart:

    entropy         H_int = -sum_v p(v) log2 p(v), of the first token, whole vocabulary, temperature 1, BITS
    dimension       d_eff = (sum lam)^2 / sum lam^2 over the covariance of N prompts' states, at most N - 1
    recoverability  AUROC of a linear probe from the states to whether the model answers right, on held-out prompts

H_int hangs on the prompt's format: after RL on one template it can fall to 0 with no loss of diversity, so never alarm
on it alone. d_eff grows with N: compare at equal N. An AUROC is evidence only beside that of shuffled labels, which
must be near 0.5. Definitions are the second version's; the authors' code follows the first (`top_k`,
`variance_dimension`).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..equations.spectra import participation_ratio

STRENGTHS = tuple(10.0**k for k in range(-4, 3))  # C of the probe: the inverse of its L2 penalty
SPLIT = (0.6, 0.2)  # of the prompts for training and for the choice of C; the rest is tested


@dataclass(frozen=True, kw_only=True)
class Intention:
    """What one forward pass over N prompts gives, in float32."""

    logits: Float[Tensor, "N V"]  # of the first token
    states: dict[int, Float[Tensor, "N D"]]  # layer -> states; the last is after the final norm, others are not


def default_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """The last layer and the one at two thirds of the depth (ours); layer l is the output of the l-th block, from 1."""
    depth = model.config.get_text_config().num_hidden_layers
    return tuple(sorted({max(round(2 * depth / 3), 1), depth}))


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def intentions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    layers: Sequence[int] | None = None,
    batch: int = 64,
) -> Intention:
    """Logits and states at the last position of each prompt, whichever side the tokenizer pads.

    Refuses layers that the model does not have.
    """
    depth = model.config.get_text_config().num_hidden_layers
    layers = default_layers(model) if layers is None else list(dict.fromkeys(layers))
    if not layers or not all(1 <= layer <= depth for layer in layers):
        raise ValueError(f"layers must be in [1, {depth}], got {list(layers)}")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    logits: list[Tensor] = []
    states: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with _evaluating(model):
        for start in range(0, len(prompts), batch):
            encoded = tokenizer(list(prompts[start : start + batch]), padding=True, return_tensors="pt")
            mask = encoded["attention_mask"].to(model.device)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            out = model(
                input_ids=encoded["input_ids"].to(model.device),
                attention_mask=mask,
                position_ids=positions,
                output_hidden_states=True,
            )
            rows = torch.arange(len(mask), device=mask.device)
            # the last index with mask 1: not sum - 1, which is wrong under left padding
            last = mask.shape[1] - 1 - mask.flip(dims=(1,)).argmax(dim=1)
            logits.append(out.logits[rows, last].float().cpu())
            for layer in layers:
                states[layer].append(out.hidden_states[layer][rows, last].float().cpu())
    return Intention(logits=torch.cat(logits), states={layer: torch.cat(of) for layer, of in states.items()})


def intention_entropy(logits: Float[Tensor, "N V"], top_k: int | None = None) -> Float[Tensor, "N"]:
    """Bits. `top_k` keeps the largest logits and renormalises: what the authors' code reports, with 100."""
    kept = logits if top_k is None else logits.topk(min(top_k, logits.shape[-1]), dim=-1).values
    logps = kept.double().log_softmax(dim=-1)
    # 0 log 0 = 0 for words that the model rules out
    return -torch.where(logps > -math.inf, logps.exp() * logps, 0).sum(dim=-1) / math.log(2)


def option_entropy(
    logits: Float[Tensor, "N V"], options: Int[Tensor, "K"]
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Bits over the first tokens of K options alone, and the probability that the whole softmax gives them.

    "A" and " A" are different tokens: give the one that follows the prompt.
    """
    mass = logits.double().log_softmax(dim=-1)[:, options].exp().sum(dim=-1)
    return intention_entropy(logits[:, options]), mass


def eigenvalues(states: Float[Tensor, "N D"]) -> Float[Tensor, "K"]:
    """Of the covariance C = Xc^T Xc / (N - 1), descending, in float64; K = min(N, D), whichever is smaller.

    Refuses fewer than 2 prompts.
    """
    if len(states) < 2:
        raise ValueError(f"a covariance needs at least 2 prompts, got {len(states)}")
    x = states.double()
    return torch.linalg.svdvals(x - x.mean(dim=0)).square() / (len(x) - 1)


def effective_dimension(states: dict[int, Float[Tensor, "N D"]]) -> tuple[float, dict[int, float]]:
    """sum_l w_l d_eff(l) with w_l = tr C_l / sum tr C, and d_eff of each layer."""
    spectra = {layer: eigenvalues(of) for layer, of in states.items()}
    each = {layer: participation_ratio(lam).item() for layer, lam in spectra.items()}
    traces = {layer: lam.sum().item() for layer, lam in spectra.items()}
    total = sum(traces.values())
    return sum(traces[layer] * each[layer] for layer in each) / total if total > 0 else 0.0, each


def variance_dimension(states: Float[Tensor, "N D"], share: float = 0.9) -> int:
    """Principal components that hold `share` of the variance: the authors' code's dimension."""
    lam = eigenvalues(states)
    return int((lam.cumsum(dim=0) < share * lam.sum()).sum()) + 1


def auroc(scores: Float[Tensor, "N"], labels: Bool[Tensor, "N"]) -> float:
    """P(score of a right one > score of a wrong one), ties counting one half; NaN without both kinds or scores."""
    right, wrong = scores[labels], scores[~labels]
    if not len(right) or not len(wrong) or scores.isnan().any():
        return math.nan
    ordered = wrong.sort().values.contiguous()
    below = torch.searchsorted(ordered, right.contiguous())
    not_above = torch.searchsorted(ordered, right.contiguous(), right=True)
    return (below + not_above).double().mean().item() / 2 / len(wrong)


@dataclass(frozen=True)
class Probe:
    """P(right) = sigmoid(x w + b)."""

    weight: Float[Tensor, "K"]
    bias: Float[Tensor, ""]

    def scores(self, x: Float[Tensor, "N K"]) -> Float[Tensor, "N"]:
        """x w + b, a logit a row."""
        return x @ self.weight + self.bias


def fit_probe(x: Float[Tensor, "N K"], labels: Bool[Tensor, "N"], strength: float) -> Probe:
    """argmin 0.5 ||w||^2 + strength sum log(1 + exp(-y (x w + b))), y = +-1, the bias free; Newton's method, float64.

    By the representer theorem w lies in the span of the rows, so with K > N the N x N Gram's factor stands in for x.
    Refuses labels of one kind.
    """
    if labels.all() or not labels.any():
        raise ValueError(f"a probe needs right and wrong labels, got {len(labels)} of one kind")
    x = x.double()
    basis = None
    if x.shape[1] > x.shape[0]:
        basis, _, _ = torch.linalg.svd(x.T, full_matrices=False)
        x = x @ basis
    target = labels.double()
    design = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    penalty = torch.cat([x.new_ones(x.shape[1]), x.new_zeros(1)])
    theta = x.new_zeros(design.shape[1])

    def objective(at: Tensor) -> Tensor:
        z = design @ at
        return 0.5 * (penalty * at.square()).sum() + strength * (torch.nn.functional.softplus(z) - target * z).sum()

    for _ in range(100):
        p = torch.sigmoid(design @ theta)
        gradient = penalty * theta + strength * design.T @ (p - target)
        curvature = strength * design.T @ ((p * (1 - p)).unsqueeze(1) * design) + penalty.diag()
        curvature.diagonal().add_(1e-9)  # the bias has no penalty and loses its curvature where all p are 0 or 1
        step = torch.linalg.solve(curvature, gradient)
        size, now = 1.0, objective(theta)
        while objective(theta - size * step) > now - 1e-4 * size * (gradient @ step) and size > 1e-8:
            size /= 2
        theta = theta - size * step
        if (gradient @ step).abs() < 1e-12 * (1 + now.abs()):
            break
    weight = theta[:-1] if basis is None else basis @ theta[:-1]
    return Probe(weight, theta[-1])


@dataclass(frozen=True, kw_only=True)
class Recoverability:
    """How well held-out prompts' states tell right from wrong; NaN where training or test holds one kind alone."""

    auroc: float  # on the test prompts
    low: float  # 95 % bootstrap interval over the test prompts
    high: float
    shuffled: float  # the same with the training and validation labels shuffled: must be near 0.5
    strength: float  # C, by the validation AUROC
    prompts: tuple[int, int, int]  # train, validation, test


def recoverability(
    states: dict[int, Float[Tensor, "N D"]], labels: Bool[Tensor, "N"], seed: int = 0, resamples: int = 1000
) -> Recoverability:
    """`labels`: whether the model answers the prompt right (or pass@k > 0). Refuses fewer than 10 prompts."""
    x = torch.cat(list(states.values()), dim=1).double()
    n = len(x)
    if n < 10 or len(labels) != n:
        raise ValueError(f"a probe needs at least 10 prompts and a label each, got {n} and {len(labels)} labels")
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=draw)
    first, second = round(SPLIT[0] * n), round((SPLIT[0] + SPLIT[1]) * n)
    train, validation, test = order[:first], order[first:second], order[second:]
    scale = x[train].std(dim=0)
    x = (x - x[train].mean(dim=0)) / torch.where(scale > 0, scale, 1)  # statistics of the training prompts alone

    def best_scores(given: Tensor) -> tuple[Tensor, float]:
        if given[train].all() or not given[train].any():
            return x.new_full((len(test),), math.nan), math.nan
        probes = {strength: fit_probe(x[train], given[train], strength) for strength in STRENGTHS}
        quality = {c: auroc(probe.scores(x[validation]), given[validation]) for c, probe in probes.items()}
        chosen = max(quality, key=lambda c: (-math.inf if math.isnan(quality[c]) else quality[c], -c))
        return probes[chosen].scores(x[test]), chosen

    scores, strength = best_scores(labels)
    shuffled = labels.clone()
    known = order[:second]
    shuffled[known] = labels[known[torch.randperm(len(known), generator=draw)]]
    control, _ = best_scores(shuffled)
    draws = torch.randint(len(test), (resamples, len(test)), generator=draw)
    boots = torch.tensor([auroc(scores[rows], labels[test][rows]) for rows in draws], dtype=torch.float64)
    boots = boots[~boots.isnan()]
    low, high = torch.quantile(boots, boots.new_tensor([0.025, 0.975])).tolist() if len(boots) else (math.nan, math.nan)
    return Recoverability(
        auroc=auroc(scores, labels[test]),
        low=low,
        high=high,
        shuffled=auroc(control, labels[test]),
        strength=strength,
        prompts=(len(train), len(validation), len(test)),
    )
