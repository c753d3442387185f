"""Whether what `hclm-rl doctor --try` says of a recipe is what a measured step does: twelve recipes, every sentence.

    python eval/doctor.py --out runs/doctor                     # all recipes that this machine has the models for
    python eval/doctor.py --out runs/doctor --only log_det lora
    python eval/doctor.py --out runs/doctor --table             # of what is there

The recipes: each surrogate's term at its default strength on the testbed, a log_det that destroys the policy, several
updates a rollout, LoRA, several turns with a tool, an entropy bonus alone, and SmolLM2 where models/smollm2-135m is. A
sentence is confirmed by the change of the surrogate on responses that the step was not made from:

    change       predicted, to first order, and the odd part of what was realised, half of the difference between the
                 step and the opposite one, differ by at most 5 % of the larger of the recipe's and the plain step's
                 and of the even part, which is told beside it as the step's bend: what bends much has a third order too
    sign         "to first order a step changes it", "without a term it falls": where told from 0, realised with that
                 sign
    critical     at the critical coefficient, where told, less than 35 % of the plain step's change is left, and of its
                 first order no more than two errors of the coefficient allow
    regime       dominant: the term's part of the change of its surrogate is larger than the rest's; healthy: it pushes
                 its way; weak: it is no larger than what a step does anyway; dead: it is not told from 0
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from hclm_rl.commands.diagnosis import CLEAR, Diagnosis, Force
from hclm_rl.commands.doctor import examine
from hclm_rl.commands.trial import Tried

COINS = """\
task: coins
task_kwargs: {prompts: 256}
model_name_or_path: testbed
num_generations: 8
per_device_train_batch_size: 64
learning_rate: 4.0e-4
adam_beta2: 0.95
bf16: false
gradient_checkpointing: false
use_cpu: true
"""
TURNS = """\
task: hidden_number
task_kwargs: {prompts: 64}
model_name_or_path: models/hidden_number
num_generations: 8
per_device_train_batch_size: 64
max_tool_calling_iterations: 3
learning_rate: 1.0e-3
adam_beta2: 0.95
bf16: false
gradient_checkpointing: false
use_cpu: true
"""
SMOLLM2 = """\
task: arithmetic
task_kwargs: {problem: sums, prompts: 400}
model_name_or_path: models/smollm2-135m
num_generations: 8
per_device_train_batch_size: 32
learning_rate: 1.0e-5
bf16: false
gradient_checkpointing: false
use_cpu: true
"""
RECIPES: Mapping[str, str] = {
    "log_det": f"{COINS}entropy_terms: [log_det]\n",
    "diagonal": f"{COINS}entropy_terms: [{{variance: {{form: diagonal, coef: 1.0e-3}}}}]\n",
    "variance": f"{COINS}entropy_terms: [variance]\n",
    "feature_softmax": f"{COINS}entropy_terms: [feature_softmax]\n",
    "coding_rate": f"{COINS}entropy_terms: [{{coding_rate: {{rows: tokens}}}}]\n",
    "von_neumann": f"{COINS}entropy_terms: [von_neumann]\n",
    "log_det_strong": f"{COINS}entropy_terms: [{{log_det: {{coef: 0.01}}}}]\n",
    "off_policy": f"{COINS}entropy_terms: [log_det]\nsteps_per_generation: 2\nnum_iterations: 2\n",
    "lora": f"{COINS}entropy_terms: [log_det]\nuse_peft: true\nlora_r: 8\nlora_target_modules: all-linear\n",
    "multi_turn": f"{TURNS}entropy_terms: [log_det]\n",
    "entropy_bonus": f"{COINS}entropy_terms: [{{entropy_bonus: {{coef: 0.05}}}}]\n",
    "smollm2": f"{SMOLLM2}entropy_terms: [log_det]\n",
}
NEEDS = {"multi_turn": "models/hidden_number", "smollm2": "models/smollm2-135m"}  # folders
CLOSE = 0.05  # of the larger change and of the bend, by which a first-order prediction may be off
LEFT = 0.35  # of the plain step's change, at the critical coefficient


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One claim of the page and what the step did."""

    surrogate: str
    kind: str
    said: str
    is_confirmed: bool


def missing(name: str) -> str:
    """Why a recipe cannot be examined here, or nothing."""
    folder = NEEDS.get(name)
    return "" if folder is None or Path(folder).is_dir() else f"there is no folder {folder}"


def examined(name: str, steps: int = 8) -> Diagnosis:
    """The doctor's page on one of the recipes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.yaml"
        file.write_text(RECIPES[name] + f"output_dir: {folder}/out\n")
        return examine(["--config", str(file)], steps=steps, tries=True)


def of_kind(force: Force, what: str) -> Tried | None:
    return next((each for each in force.tried if each.what == what), None)


def sentences(force: Force) -> list[Sentence]:
    """Every claim on the surrogate that a step can confirm."""
    whole, without = of_kind(force, "the recipe's"), of_kind(force, "without its term")
    assert whole is not None
    plain = without or whole
    size = max(abs(whole.straight), abs(plain.straight))
    found = [
        Sentence(
            surrogate=force.surrogate,
            kind="change",
            said=f"{each.what}: {each.predicted:.3g}, realised {each.straight:.3g} and a bend of {each.bend:.3g}",
            is_confirmed=abs(each.predicted - each.straight) <= CLOSE * (size + abs(each.bend)),
        )
        for each in force.tried
    ]
    if abs(force.change) > CLEAR * force.change_error and is_seen(whole):
        told = f"{force.change:.3g} ± {force.change_error:.1g}, realised {whole.straight:.3g}"
        is_so = force.change * whole.straight > 0
        found.append(
            Sentence(surrogate=force.surrogate, kind="sign", said=f"a step changes it by {told}", is_confirmed=is_so)
        )
    return [*found, *critical_sentences(force, plain), *regime_sentences(force, whole, without)]


def critical_sentences(force: Force, plain: Tried) -> list[Sentence]:
    """Of a critical coefficient that is told; `plain`: the step without a term of the surrogate's."""
    coef, error, critical = force.critical_coef, force.critical_coef_error, of_kind(force, "at the critical coef")
    if coef is None or not abs(coef) > CLEAR * error or not is_seen(plain):
        return []
    way = "falls" if coef > 0 else "rises"
    said = f"without a term it {way}, realised {plain.realised:.3g}"
    is_so = (plain.realised < 0) == (way == "falls")
    found = [Sentence(surrogate=force.surrogate, kind="sign", said=said, is_confirmed=is_so)]
    if critical is not None:
        left, of_first, allowed = *left_at(critical, plain), error / abs(coef)
        said = (
            f"at {coef:.3g} it stands still: {100 * left:.0f} % of the plain step's change is left, "
            f"{100 * of_first:.0f} % of its first order, ± {100 * allowed:.0f} %"
        )
        is_so = left < LEFT and of_first <= CLEAR * allowed
        found.append(Sentence(surrogate=force.surrogate, kind="critical", said=said, is_confirmed=is_so))
    return found


def left_at(critical: Tried, plain: Tried) -> tuple[float, float]:
    """What is left of the plain step's change: of all of it, and of its first order."""
    return abs(critical.realised / plain.realised), abs(critical.straight / plain.straight)


def is_seen(of: Tried) -> bool:
    """Whether the measured change is told from 0 itself."""
    return abs(of.realised) > CLEAR * of.realised_error


def regime_sentences(force: Force, whole: Tried, without: Tried | None) -> list[Sentence]:
    """Of a surrogate whose term is in the recipe: what its part of the change says."""
    if without is None:
        return []
    part = whole.realised - without.realised
    said = f"{force.regime}: its part of the change is {part:.3g} beside {without.realised:.3g} of the rest"
    is_up = part * force.coef > 0  # the term does push its surrogate up
    match force.regime:
        case "dominant":
            is_so = is_up and abs(part) > abs(without.realised)
        case "healthy":
            is_so = is_up
        case "dead":
            is_so = abs(part) <= CLEAR * max(without.realised_error, whole.realised_error)
        case _:
            is_so = force.regime != "weak" or abs(part) < size_of_noise(whole, without)
    return [Sentence(surrogate=force.surrogate, kind="regime", said=said, is_confirmed=is_so)]


def size_of_noise(whole: Tried, without: Tried) -> float:
    """What a step does anyway, or what other responses tell apart."""
    return max(abs(without.realised), CLEAR * without.realised_error, CLEAR * whole.realised_error)


def row(name: str, of: Diagnosis) -> str:
    """Of the table in docs/results.md."""
    every = [each for force in of.forces for each in sentences(force)]
    own = [force for force in of.forces if force.is_in_recipe]
    regimes = ", ".join(force.regime for force in own) or "-"
    shown = own or of.forces[:1]
    cells = []
    for what in ("the recipe's", "without its term"):
        tried = [each for force in shown if (each := of_kind(force, what))]
        cells.append(", ".join(f"{each.predicted:.2g} / {each.realised:.2g}" for each in tried) or "-")
    off, bends = [], []
    for force in of.forces:
        largest = max(abs(each.straight) for each in force.tried)
        off += [abs(each.predicted - each.straight) / largest for each in force.tried]
        bends += [abs(each.bend) / largest for each in force.tried]
    cells += [f"{100 * statistics.median(each):.0f} % ({100 * max(each):.0f} %)" for each in (off, bends)]
    cells.append(", ".join(lefts(force) for force in of.forces if lefts(force)) or "none told")
    confirmed = sum(each.is_confirmed for each in every)
    return f"| {name} | {regimes} | {' | '.join(cells)} | {confirmed} of {len(every)} |"


def lefts(force: Force) -> str:
    """What is left at the critical coefficient, of it of first order, and what the coefficient's error allows."""
    plain, critical = of_kind(force, "without its term") or force.tried[0], of_kind(force, "at the critical coef")
    if critical is None or not any(each.kind == "critical" for each in critical_sentences(force, plain)):
        return ""
    left, of_first = left_at(critical, plain)
    allowed = force.critical_coef_error / abs(critical.coef)
    return f"{100 * left:.0f} % ({100 * of_first:.0f} ± {100 * allowed:.0f})"


def again(found: Mapping) -> Diagnosis:
    """From what was written down."""
    forces = [Force(**{**each, "tried": [Tried(**step) for step in each["tried"]]}) for each in found["forces"]]
    return Diagnosis(**{**found, "forces": forces})


def tell(console: Console, name: str, found: Diagnosis) -> None:
    """The row, and what was not confirmed."""
    console.print(f"{row(name, found)}  ({found.seconds:.0f} s)", highlight=False)
    for each in [each for force in found.forces for each in sentences(force)]:
        if not each.is_confirmed:
            console.print(f"   not confirmed: {each.surrogate}, {each.said}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/doctor"), help="folder of the findings")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), help="these recipes alone")
    parser.add_argument("--steps", type=int, default=8, help="dry steps")
    parser.add_argument("--table", action="store_true", help="judge what is there, and examine nothing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=200)
    for name in options.only:
        file = options.out / f"{name}.json"
        if options.table:
            if file.exists():
                tell(console, name, again(json.loads(file.read_text())))
            continue
        if why := missing(name):
            console.print(f"{name}: left out, {why}", highlight=False)
            continue
        found = examined(name, options.steps)
        if not found.forces:
            console.print(f"{name}: {found.mistakes} {found.notes}", highlight=False)
            continue
        file.write_text(json.dumps(asdict(found), indent=1))
        tell(console, name, found)


if __name__ == "__main__":
    main()
