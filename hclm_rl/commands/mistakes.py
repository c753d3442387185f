"""What `hclm-rl doctor` objects to in a recipe: its terms, their tokens, targets and memory"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from ..chain.chain import Chain
from ..equations.forces import DISTORTION, SURROGATES, Surrogate
from ..recipe.config import GRPOConfig, RLOOConfig
from ..recipe.conflicts import conflicts
from ..recipe.refusals import is_on_policy
from ..terms.force_reweight import ForceReweight

TOKENS_PER_DIMENSION = 4  # below it the covariance of a step is mostly noise
MANY_CUT_OFF = 0.5  # of the responses; from here on most of what is learnt is learnt from unfinished ones
GIB = 2**30


def term_name(term: object) -> str:
    """log_det for LogDet."""
    name = type(term).__name__
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def surrogate_of(term: object) -> Surrogate | None:
    """The surrogate whose gauge is that of the term; None where no gauge is."""
    name = term_name(term)
    if name == "variance" and getattr(term, "form") == "diagonal":  # noqa: B009 (any object)
        return "diagonal"
    settings = (getattr(term, "rows", "tokens"), getattr(term, "distortion", DISTORTION))
    if name == "coding_rate" and settings != ("tokens", DISTORTION):
        return None
    return name if name in SURROGATES else None  # type: ignore[return-value]


def greatest_coef(spec: object) -> float:
    """The strongest that a coefficient gets."""
    found = [
        getattr(spec, name, None) for name in ("coefficient", "start", "end", "maximum", "minimum", "active", "idle")
    ]
    numbers = [float(value) for value in found if isinstance(value, int | float)]
    return max(numbers, key=abs) if numbers else 1.0


def strengths_of(chain: Chain) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """`coef` and `eps_relative` of the surrogates in the chain, and notes on links whose force no gauge shows."""
    coefs: dict[str, float] = {}
    eps: dict[str, float] = {}
    notes = []
    for link in chain.links:
        of = surrogate_of(link.term)
        if of is not None:  # two links on one surrogate push together
            coefs[of] = coefs.get(of, 0.0) + greatest_coef(link.coef)
            eps[of] = getattr(link.term, "eps_relative", 1e-4)
        elif term_name(link.term) in SURROGATES:
            notes.append(
                f"{link.name}: the row below is that of the tokens' states at a distortion of {DISTORTION:g}, not of "
                "this link, whose regime is not known before training"
            )
    return coefs, eps, notes


def chain_mistakes(chain: Chain, config: GRPOConfig | RLOOConfig) -> list[str]:
    """What can be told from the recipe alone."""
    found = conflicts(chain)
    for link in chain.links:
        if link.term.inert_on_policy and is_on_policy(config):
            found.append(
                f"{link.name} does nothing when each rollout is used for one update: set num_iterations > 1 or "
                "steps_per_generation > gradient_accumulation_steps"
            )
        if not link.term.is_diagnostic and greatest_coef(link.coef) == 0 and not link.coef.needs_entropy:
            found.append(f"{link.name} has coef 0 throughout: it does nothing")
    return found


def token_mistakes(chain: Chain, tokens: int, responses: int, width: int) -> list[str]:
    """Statistics that need more tokens, or responses, than a generation batch has."""
    found = []
    row_by_row = "feature_softmax"
    of_covariance = ({*SURROGATES} - {row_by_row}) | {"information_force", "spectrum"}
    for link in chain.links:
        name, of_responses = term_name(link.term), getattr(link.term, "rows", "tokens") != "tokens"
        rows, what = (responses, "responses") if of_responses else (tokens, "tokens")
        has_covariance = name in of_covariance and getattr(link.term, "surrogate", "") != row_by_row
        if name == "coding_rate" and of_responses:  # its distortion is a floor that bounds it by their number
            has_covariance = False
        if has_covariance and rows < TOKENS_PER_DIMENSION * width:
            found.append(
                f"{link.name} takes a covariance of width {width} over about {rows} {what} a rollout: fewer than "
                f"{TOKENS_PER_DIMENSION} per dimension, so its values are biased low and noisy"
            )
        ratio = getattr(link.term, "ratio", None)
        if isinstance(ratio, float) and ratio * tokens < 1:
            found.append(
                f"{link.name} selects {ratio:g} of about {tokens} tokens a rollout, which is less than one token"
            )
    return found


def cut_off(log: Sequence[dict], config: GRPOConfig | RLOOConfig) -> tuple[float, list[str], list[str]]:
    """(share, mistakes, notes) of responses that run into the limit: a mistake where all of them do."""
    shares = [entry["completions/clipped_ratio"] for entry in log if "completions/clipped_ratio" in entry]
    share = statistics.fmean(shares) if shares else 0.0
    if share < MANY_CUT_OFF:
        return share, [], []
    who = "all responses" if share == 1 else f"{100 * share:.0f} % of the responses"
    told = f"{who} of the dry run were cut off at max_completion_length {config.max_completion_length}"
    if config.mask_truncated_completions:
        told += ", and mask_truncated_completions leaves them out" + (": nothing is trained" if share == 1 else "")
    told += ": raise max_completion_length"
    return (share, [told], []) if share == 1 else (share, [], [told])


def target_mistakes(chain: Chain, entropy: float) -> list[str]:
    """Controllers whose target the policy is already under."""
    found = []
    for link in chain.links:
        target = getattr(link.coef, "target", None)
        if isinstance(target, int | float) and target > entropy:
            found.append(
                f"{link.name} steers towards {target:g} nats and the policy starts at {entropy:.3g}: it pushes from "
                "the first step"
            )
        if isinstance(link.term, ForceReweight):
            found += band_mistakes(link.name, link.term, entropy)
    return found


def band_mistakes(name: str, term: ForceReweight, entropy: float) -> list[str]:
    """A floor above the start, or a ceiling below it; by representation both are changes from it."""
    what, start = ("entropy", entropy) if term.by == "policy" else ("change of the log-det", 0.0)
    floor, ceiling = term.edges(entropy)
    off = [f"above its floor of {floor:.3g}"] if floor > start else []
    off += [f"below its ceiling of {ceiling:.3g}"] if ceiling < start else []
    return [
        f"{name} holds the {what} {edge} nats and the policy starts at {start:.3g}: it pushes from the first step"
        for edge in off
    ]


def memory_mistakes(model, config) -> list[str]:
    """Weights, gradients and Adam's two moments against the device: a lower bound, activations come on top."""
    trained = [p for p in model.parameters() if p.requires_grad]
    bytes_needed = sum(p.numel() * p.element_size() for p in model.parameters())
    bytes_needed += sum(3 * p.numel() * p.element_size() for p in trained)
    device = next(model.parameters()).device
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        pages = Path("/proc/meminfo")
        lines = pages.read_text().splitlines() if pages.exists() else []
        total = next((line.split()[1] for line in lines if line.startswith("MemTotal")), None)
        available = int(total) * 1024 if total else math.inf
    if bytes_needed <= available:
        return []
    return [
        f"weights, gradients and optimiser need at least {bytes_needed / GIB:.1f} GiB and the device has "
        f"{available / GIB:.1f} GiB: use LoRA, FSDP or ZeRO, or a smaller model"
    ]
