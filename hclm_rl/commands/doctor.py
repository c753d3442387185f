"""`hclm-rl doctor`: what a recipe's forces and mistakes will be, said before training

A dry run of a few optimiser steps at learning rate 0 on the recipe's own model, prompts and rewards, with one
`information_force` gauge for each surrogate. Nothing is written but what is asked for.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback

from ..chain.chain import Chain
from ..equations.forces import DISTORTION, LEAST_RATIO, SURROGATES, Regime, Surrogate, regime
from ..recipe.arguments import Algorithm, parse, recipe_of, with_recipe_apart
from ..recipe.config import GRPOConfig, RLOOConfig, build_chain, refuse_two_controls
from ..recipe.conflicts import conflicts
from ..recipe.refusals import is_on_policy, refuse_what_the_run_lacks
from .loading import build_trainer

CLEAR = 2.0  # standard errors from 0 at which the sign of the critical coefficient counts
MARGIN = 1.1  # over the critical coefficient, the card's
TOKENS_PER_DIMENSION = 4  # below it the covariance of a step is mostly noise
# The embedded default, for `hclm-rl doctor` without a recipe: the testbed as the quickstart trains on it.
DEFAULT = {
    "task": "coins",
    "task_kwargs": '{"prompts": 256}',
    "model_name_or_path": "testbed",
    "num_generations": 16,
    "per_device_train_batch_size": 128,
    "steps_per_generation": 2,
    "bf16": "false",
    "gradient_checkpointing": "false",
}
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Force:
    """What the dry run shows of one surrogate; means over its steps."""

    surrogate: str
    value: float
    force_norm: float
    rho: float  # ||F|| over its bound, in [0, 1]
    live: float  # share of the directions
    dead: float | None
    weak: float | None
    drift_budget: float | None  # how far S may move, in units of variance, while half of the force stays
    gradient_norm: float  # of the policy loss at the hidden states
    alignment: float
    critical_coef: float
    critical_coef_error: float  # standard error over the steps
    unsteadiness: float  # deviation of ||F|| over its mean, over the steps; NaN for a single one
    coef: float | None  # of the recipe, where it has this surrogate's term; else that which would be recommended
    is_in_recipe: bool
    regime: Regime
    reason: str
    recommended_coef: float | None
    recommendation: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The whole page."""

    recipe: str
    entropy: float | None = None  # nats, mean over the tokens of the dry run
    tokens_per_step: int | None = None  # of the recipe's optimiser step, at the responses' present length
    width: int | None = None  # D
    forces: list[Force] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)  # what will not work, or not as meant
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.forces:
            return "the recipe cannot run as it stands"
        own = [force for force in self.forces if force.is_in_recipe]
        sick = [f"{force.surrogate} is {force.regime}" for force in own if force.regime != "healthy"]
        found = f"{len(self.mistakes)} mistake{'s' if len(self.mistakes) != 1 else ''} in the recipe"
        return "; ".join([*sick, found]) if sick or self.mistakes else "nothing to object to"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error; the error of a single value is not known."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def unsteadiness(norms: Sequence[float]) -> float:
    """Deviation over mean, as MOST_UNSTEADY limits it; 0 where there is no force."""
    if len(norms) < 2:
        return math.nan
    mean = statistics.fmean(norms)
    return statistics.stdev(norms) / mean if mean > 0 else 0.0


def recommended(critical: float, error: float, force: float, gradient: float) -> tuple[float | None, str]:
    """A `coef` from the critical coefficient, with its reason."""
    if force == 0 or gradient == 0:
        return None, "no coefficient acts" if force == 0 else "no policy gradient in the dry run: more prompts or steps"
    least = MARGIN * LEAST_RATIO * gradient / force
    is_clear = math.isnan(error) or abs(critical) > CLEAR * error
    if critical > 0 and is_clear and MARGIN * critical >= least:
        return MARGIN * critical, f"{MARGIN:g} x the critical coefficient"
    if critical > 0 and is_clear:
        return least, "the critical coefficient would be weak: the least that is not"
    side = "the loss raises this surrogate by itself" if is_clear else "the critical coefficient is not told from 0"
    return least, f"{side}: the least that is not weak"


def force_of(surrogate: str, log: Sequence[dict], coef: float | None) -> Force | None:
    """From the gauge's metrics of the dry steps; None where the states had no spread."""
    seen = [
        {key.partition("/")[2]: value for key, value in entry.items() if key.startswith(f"{surrogate}/")}
        for entry in log
    ]
    seen = [each for each in seen if "force_norm" in each and "gradient_norm" in each]
    if not seen:
        return None

    def mean(name: str) -> float:
        return statistics.fmean(each[name] for each in seen if name in each)

    def optional(name: str) -> float | None:
        return mean(name) if any(name in each for each in seen) else None

    critical, error = mean_and_error([each["critical_coef"] for each in seen])
    force, gradient = mean("force_norm"), mean("gradient_norm")
    wanted, why = recommended(critical, error, force, gradient)
    live = optional("live")
    used = coef if coef is not None else wanted or 0.0
    found, reason = regime(used, force, gradient, mean("alignment"), 1.0 if live is None else live)
    return Force(
        surrogate=surrogate,
        value=mean("value"),
        force_norm=force,
        rho=mean("rho"),
        live=1.0 if live is None else live,
        dead=optional("dead"),
        weak=optional("weak"),
        drift_budget=optional("drift_budget"),
        gradient_norm=gradient,
        alignment=mean("alignment"),
        critical_coef=critical,
        critical_coef_error=error,
        unsteadiness=unsteadiness([each["force_norm"] for each in seen]),
        coef=used,
        is_in_recipe=coef is not None,
        regime=found,
        reason=reason,
        recommended_coef=wanted,
        recommendation=why,
    )


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


def dry_settings(
    config: GRPOConfig | RLOOConfig, eps: Mapping[str, float], prompts: int, steps: int, folder: str
) -> dict[str, object]:
    """What stands in for the recipe's keys: a gauge for each surrogate, `steps` on-policy steps that change nothing."""
    group = config.num_generations or 1
    rows = min(config.per_device_train_batch_size, prompts * group)
    rows = max(rows - rows % group, group)
    pieces = max(prompts * group // rows, 1)
    gauges = [
        {"information_force": {"name": of, "surrogate": of, "eps_relative": eps.get(of, 1e-4), "spectrum_every": 1}}
        for of in SURROGATES
    ]
    return {
        "entropy_terms": gauges,
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": 0.0,
        "optim": "sgd",
        "logging_steps": 1,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": pieces,
        "steps_per_generation": pieces,
        "generation_batch_size": None,
        "num_iterations": 1,
        "entropy_coef": 0.0,  # the gauges are terms, beside which TRL's own control is refused
        "use_adaptive_entropy": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_on_start": False,
        "load_best_model_at_end": False,
        "logging_strategy": "steps",
        "eval_samples": 0,
        "push_to_hub": False,
        "log_completions": False,
        "log_completions_hub_repo": None,
        "report_to": "none",
        "disable_tqdm": True,
        "save_final": False,
    }


def examine(line: Sequence[str], algorithm: Algorithm = "grpo", prompts: int = 8, steps: int = 4) -> Diagnosis:
    """`line`: --config RECIPE and any overrides, as `hclm-rl grpo` takes them."""
    start = time.perf_counter()
    recipe = str(recipe_of(line) or "the embedded default")
    mistakes: list[str] = []

    def unusable(error: Exception) -> Diagnosis:
        found = [*mistakes, " ".join(str(error).split())]
        return Diagnosis(recipe=recipe, mistakes=found, seconds=time.perf_counter() - start)

    try:
        _, config, _, _ = parse(algorithm, line)
        chain = build_chain(config.entropy_terms)
        if chain.links and isinstance(config, GRPOConfig):
            refuse_two_controls(config, chain)
    except (ValueError, OSError, ImportError) as error:
        return unusable(error)
    mistakes += chain_mistakes(chain, config)
    coefs, eps, notes = strengths_of(chain)
    with tempfile.TemporaryDirectory() as folder:
        try:
            settings = parse(algorithm, line, instead=dry_settings(config, eps, prompts, steps, folder))
            trainer, _ = build_trainer(algorithm, settings, [])
            refuse_what_the_run_lacks(chain, trainer.model, config)
        except (ValueError, OSError, ImportError) as error:
            return unusable(error)
        mistakes += memory_mistakes(trainer.model, config)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "entropy" in entry]
        width = getattr(trainer.model, "config").get_text_config().hidden_size  # noqa: B009 (typed as a module)
        torch.cuda.empty_cache() if torch.cuda.is_available() else None
    forces = [force_of(name, log, coefs.get(name)) for name in SURROGATES]
    entropy, length = (statistics.fmean(entry[key] for entry in log) for key in ("entropy", "completions/mean_length"))
    rows_at_once = config.per_device_train_batch_size * max(config.world_size, 1)
    tokens = round(length * rows_at_once * config.gradient_accumulation_steps)
    rollout = rows_at_once * (config.steps_per_generation or 1)  # over which terms take their statistics
    mistakes += token_mistakes(chain, round(length * rollout), rollout, width) + target_mistakes(chain, entropy)
    if all(entry.get("reward_std", 0) == 0 for entry in log):
        notes.append("no group of the dry run had different rewards, so there was no policy gradient to compare with")
    notes += [
        f"{name}: the states have no spread" for name, force in zip(SURROGATES, forces, strict=True) if force is None
    ]
    return Diagnosis(
        recipe=recipe,
        entropy=entropy,
        tokens_per_step=tokens,
        width=width,
        forces=[force for force in forces if force is not None],
        mistakes=mistakes,
        notes=notes,
        seconds=time.perf_counter() - start,
    )


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """As on the command line."""
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


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
    return found


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


def show(console: Console, of: Diagnosis) -> None:
    """One page."""
    console.print(f"[bold]{of.recipe}[/bold]: {of.verdict}", highlight=False)
    if of.entropy is not None:
        console.print(
            f"policy entropy {of.entropy:.3f} nats; about {of.tokens_per_step} tokens of width {of.width} a step; "
            f"{of.seconds:.0f} s\n",
            highlight=False,
        )
    if of.forces:
        table = Table(title="Forces before training", title_justify="left")
        for column in ("surrogate", "regime", "rho", "live", "critical coef", "coef", "advised"):
            table.add_column(column, no_wrap=column == "surrogate", overflow="fold")
        for each in of.forces:
            coef = f"{each.coef:.2g}" if each.is_in_recipe else "-"
            error = "" if math.isnan(each.critical_coef_error) else f" ± {each.critical_coef_error:.1g}"
            table.add_row(
                each.surrogate, each.regime, f"{each.rho:.2f}", f"{100 * each.live:.0f} %",
                f"{each.critical_coef:.2g}{error}", coef,
                "-" if each.recommended_coef is None else f"{each.recommended_coef:.2g}",
            )  # fmt: skip
        console.print(table)
        for each in of.forces:
            told = f"{each.surrogate}: {each.regime}; {each.reason}"
            if each.drift_budget is not None:
                told += f"; half of the force stays while S moves by less than {each.drift_budget:.2g}"
            console.print(f"{told}. Advised coef: {each.recommendation}.", highlight=False)
    for title, lines in (("Mistakes", of.mistakes), ("Notes", of.notes)):
        if lines:
            console.print(f"\n[bold]{title}[/bold]")
            for each in lines:
                console.print(f"- {each}", highlight=False)


def main(arguments: Sequence[str]) -> int:
    """Exit code 1 where the recipe has a mistake or one of its forces is not healthy."""
    parser = argparse.ArgumentParser(
        prog="hclm-rl doctor",
        description="Forces, regimes and mistakes of a recipe before training. Further flags override the recipe.",
    )
    parser.add_argument("--algorithm", choices=("grpo", "rloo"), default="grpo")
    parser.add_argument("--prompts", type=int, default=8, help="of a dry step")
    parser.add_argument("--steps", type=int, default=4, help="dry steps; more of them narrow the critical coefficient")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the page")
    options, line = parser.parse_known_args(arguments)
    if options.prompts < 1 or options.steps < 1:
        raise ValueError(f"--prompts and --steps must be at least 1, got {options.prompts} and {options.steps}")
    line = with_recipe_apart(line)
    if recipe_of(line) is None:
        line = [*as_flags(DEFAULT), *line]
    found = examine(line, options.algorithm, options.prompts, options.steps)
    if options.json:
        print(json.dumps(asdict(found) | {"verdict": found.verdict}, indent=1))
    else:
        show(Console(), found)
    is_sick = any(force.is_in_recipe and force.regime != "healthy" for force in found.forces)
    return 1 if found.mistakes or is_sick else 0
