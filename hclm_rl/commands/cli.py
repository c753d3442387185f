"""`hclm-rl`: training runs from recipes, and what methods there are."""

import argparse
import ast
import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hclm_rl.recipe.shipped import shipped_folder
from hclm_rl.responses.names import look_here, nearest

from ..watch.meanings import METRIC, Metric, metrics_of, read_docstring
from .helps import ALL, HELPS
from .quiet import QUIET, is_asked, quiet

ALGORITHMS: Final = ("grpo", "rloo")
# command -> (the module whose main(arguments) runs it, imported when called for; what it does)
COMMANDS: Final = {
    "sft": ("hclm_rl.commands.sft", "supervised fine-tuning, plain or with a method that minds the entropy"),
    "generate": ("hclm_rl.commands.generate", "responses with a method of decoding, and what they cost"),
    "doctor": ("hclm_rl.commands.doctor", "before training: forces, regimes and mistakes of a recipe"),
    "ablate": ("hclm_rl.commands.ablate", "a step without each tenth of its tokens: does a score know who moves H?"),
    "forecast": ("hclm_rl.evaluation.forecast", "the reward ceiling that the first part of a run points to"),
    "eval": (
        "hclm_rl.evaluation.command",
        "pass@k and diversity of a model; beside its base, whether its answers collapsed",
    ),
    "watch": ("hclm_rl.commands.watch", "what the entropy of a run does, from its log or another library's"),
    "report": ("hclm_rl.watch.report.command", "one self-contained page of runs side by side"),
    "recipes": ("hclm_rl.commands.recipes", "the recipes and accelerate configurations that come along; copy one"),
    "metrics": ("hclm_rl.commands.metrics", "what the numbers in a run's log mean, and what to do about them"),
}
TERMS = Path(__file__).parents[1] / "terms"
ACCELERATE_FOLDERS = (Path("recipes/accelerate"), shipped_folder() / "accelerate")
KINDS = {"rewards": "reward", "advantages": "advantage", "loss": "loss"}  # the Effect's field that a term fills
NEEDS = {
    "needs_scores": "scoring pass",
    "needs_hidden": "hidden states",
    "needs_vocab": "next-token distribution",
    "needs_rescoring": "reads other texts",
    "needs_attention": "eager attention",
    "needs_reference": "beta above 0",
    "needs_reference_model": "the reference",
    "inert_on_policy": "several updates per rollout",
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A term as its source describes it; read without importing it."""

    name: str
    title: str  # what the module's docstring says before the paper
    paper: str
    kinds: list[str]
    needs: list[str]
    docstring: str
    parameters: list[tuple[str, str, str, str]]  # name, type, default, meaning
    metrics: list[Metric]  # names without the link


def class_variables(of: ast.ClassDef) -> dict[str, object]:
    """The ClassVars with the values that the class gives them."""
    return {
        node.target.id: ast.literal_eval(node.value)
        for node in of.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
        if ast.unparse(node.annotation).startswith("ClassVar")
    }


def properties(of: ast.ClassDef) -> set[str]:
    """The names that the class computes from its fields."""
    return {
        node.name
        for node in of.body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(each) == "property" for each in node.decorator_list)
    }


def parameters_of(term: ast.ClassDef, meaning: Mapping[str, str]) -> list[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of each field, and of the coefficient."""
    parameters = [
        (
            ast.unparse(node.target),
            ast.unparse(node.annotation),
            ast.unparse(node.value) if node.value else "required",
            meaning.get(ast.unparse(node.target), ""),
        )
        for node in term.body
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar")
    ]
    variables = class_variables(term)
    if not variables.get("is_diagnostic"):
        about = ["strength: a number or a schedule", *filter(None, [meaning.get("default_coef")])]
        parameters.append(("coef", "float | schedule", str(variables.get("default_coef", 1.0)), "; ".join(about)))
    return parameters


def read_method(name: str, file: Path, class_name: str) -> Method:
    """Title and paper from the module's docstring, kind from the fields of the effects, needs from the ClassVars."""
    module = ast.parse(file.read_text())
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    if class_name not in classes:
        raise ValueError(f"{file} has no class {class_name}, only {', '.join(classes) or 'functions'}")
    found = classes[class_name]
    summary = " ".join((ast.get_docstring(module) or "").split("\n\n")[0].split())
    title, _, paper = summary.rpartition(": ")
    calls = [node for node in ast.walk(found) if isinstance(node, ast.Call)]
    effects = [call for call in calls if ast.unparse(call.func) in ("Effect", "RolloutEffect")]
    filled = {keyword.arg for effect in effects for keyword in effect.keywords}
    variables, computed, docstring = class_variables(found), properties(found), read_docstring(found)
    fields = [each for each in docstring.params if each.args[0] != METRIC]
    meaning = {each.arg_name: " ".join((each.description or "").split()) for each in fields}
    return Method(
        name=name,
        title=title or summary,
        paper=paper,
        kinds=[kind for field, kind in KINDS.items() if field in filled] or ["diagnostic"],
        needs=[
            need if variables.get(variable) else f"{need} (some forms)"
            for variable, need in NEEDS.items()
            if variables.get(variable) or variable in computed
        ],
        docstring="\n\n".join(" ".join(each.split()) for each in (docstring.description or "").split("\n\n")),
        parameters=parameters_of(found, meaning),
        metrics=metrics_of(docstring),
    )


def known_methods() -> list[str]:
    return sorted(file.stem for file in TERMS.glob("*.py") if not file.stem.startswith("_"))


def find_method(name: str) -> Method:
    """The shipped term of that name, or the class at a dotted path."""
    if "." in name:
        module, _, class_name = name.rpartition(".")
        look_here()
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # a parent package is missing
            spec = None
        if spec is None or not spec.origin:
            raise ValueError(f"no module '{module}' for the method '{name}'")
        return read_method(name, Path(spec.origin), class_name)
    if name not in known_methods():
        close = nearest(name, known_methods())
        raise ValueError(f"unknown method '{name}'; the nearest are {close}; `hclm-rl methods` lists all")
    return read_method(name, TERMS / f"{name}.py", "".join(word.capitalize() for word in name.split("_")))


def show_methods(console: Console) -> None:
    table = Table(title="Methods: names for entropy_terms", title_justify="left")
    table.add_column("name", no_wrap=True)
    for column in ("paper", "kind", "needs"):
        table.add_column(column, overflow="fold")
    for name in known_methods():
        method = find_method(name)
        kinds, needs = ", ".join(method.kinds), ", ".join(method.needs) or "-"
        table.add_row(*map(escape, (name, method.paper, kinds, needs)))
    console.print(table)
    console.print("hclm-rl methods NAME shows a method with its hyper-parameters.")


def show_method(console: Console, name: str) -> None:
    method = find_method(name)
    console.print(f"[bold]{escape(method.name)}[/bold]: {escape(method.title)}")
    console.print(f"{escape(method.paper)}\nkind: {', '.join(method.kinds)}; needs: {', '.join(method.needs) or '-'}\n")
    console.print(method.docstring + "\n", markup=False, highlight=False)
    table = Table(title="Hyper-parameters", title_justify="left")
    for column in ("name", "type", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for row in method.parameters:
        table.add_row(*map(escape, row))
    console.print(table)
    if not method.metrics:
        return
    table = Table(title=f"What it logs, as {method.name}/NAME", title_justify="left")
    for column in ("name", "unit", "meaning"):
        table.add_column(column, overflow="fold")
    for each in method.metrics:
        table.add_row(*map(escape, (each.name, each.unit, each.told)))
    console.print(table)


def accelerate_file(name: str) -> Path:
    """The accelerate configuration: a file, a name in recipes/accelerate, or one that TRL ships."""
    trl = importlib.util.find_spec("trl")
    shipped = [Path(folder) / "accelerate_configs" for folder in (trl.submodule_search_locations or [])] if trl else []
    folders = [*ACCELERATE_FOLDERS, *shipped]
    for candidate in (Path(name), *(folder / f"{name}.yaml" for folder in folders)):
        if candidate.is_file():
            return candidate
    names = {file.stem for folder in folders for file in folder.glob("*.yaml")}
    raise ValueError(f"no accelerate configuration '{name}': give a file or one of {nearest(name, sorted(names))}, ...")


def launch(algorithm: Literal["grpo", "rloo"], arguments: Sequence[str]) -> int:
    """Runs the job here, or through `accelerate launch` where its configuration is named or there are several GPUs."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--accelerate_config")
    own.add_argument("--num_processes")
    options, rest = own.parse_known_args(list(arguments))
    if options.num_processes and not options.accelerate_config:
        raise ValueError("--num_processes needs --accelerate_config, which says how they are started")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if options.accelerate_config:
        command += ["--config_file", str(accelerate_file(options.accelerate_config))]
    else:
        import torch

        if torch.cuda.device_count() < 2 or "LOCAL_RANK" in os.environ:
            try:
                from hclm_rl.commands.launch import main as train
            except ImportError as error:  # a TRL outside the supported range, a missing package
                raise ValueError(str(error)) from error
            return train(algorithm, rest)
    command += ["--num_processes", options.num_processes] if options.num_processes else []
    return subprocess.run([*command, "--module", "hclm_rl", algorithm, *rest]).returncode


def train(algorithm: Literal["grpo", "rloo"], line: Sequence[str]) -> int:
    """TRL 1.16 uses transformers' old names, which a user of either can do nothing about."""
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
    return launch(algorithm, line)


def run_verb(line: Sequence[str]) -> int:
    """What a verb does with its arguments; a plain --help needs no torch."""
    verb, rest = line[0], ["--help" if each == ALL else each for each in line[1:]]
    if verb in HELPS and line[1:] in (["--help"], ["-h"]):
        HELPS[verb]().print_help()
        return 0
    for algorithm in ALGORITHMS:
        if verb == algorithm:
            return train(algorithm, rest)
    return importlib.import_module(COMMANDS[verb][0]).main(rest)


def main(arguments: Sequence[str] | None = None) -> int:
    line = list(sys.argv[1:] if arguments is None else arguments)
    if not is_asked(line):
        return answer(line)
    verb = next((each for each in line if each != QUIET), "")
    with quiet(hides_output=verb in (*ALGORITHMS, "sft")):
        return answer([each for each in line if each != QUIET])


def answer(line: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="hclm-rl", description="Entropy control in RL fine-tuning on top of TRL.")
    parser.add_argument(QUIET, action="store_true", help="with any command: no progress, no log lines, no warnings")
    parser.add_argument("--version", action="store_true", help="print the versions of hclm-rl and TRL")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for algorithm in ALGORITHMS:
        about = f"train with {algorithm.upper()}: --config RECIPE, TRL's flags, --accelerate_config NAME|FILE"
        commands.add_parser(algorithm, help=about, add_help=False)
    for command, (_, about) in COMMANDS.items():
        commands.add_parser(command, help=about, add_help=False)
    methods = commands.add_parser("methods", help="list the entropy-control methods, or show one")
    methods.add_argument("name", nargs="?", help="a method's name, or the dotted path of a class")
    try:
        if line and line[0] in (*ALGORITHMS, *COMMANDS):
            return run_verb(line)
        if line and not line[0].startswith("-") and line[0] not in commands.choices:
            close = nearest(line[0], commands.choices)
            raise ValueError(f"unknown command '{line[0]:.80}'; the nearest are {close}; `hclm-rl --help` lists all")
        options = parser.parse_args(line)
        if options.version:
            from importlib.metadata import version

            from hclm_rl import __version__

            print(f"hclm-rl {__version__} (trl {version('trl')})")
        elif options.command == "methods":
            console = Console()
            show_method(console, options.name) if options.name else show_methods(console)
        else:
            parser.print_help()
    except ValueError as error:
        print(f"hclm-rl: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
