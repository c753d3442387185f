"""The pages made from the code: `python docs/pages.py` writes those of KEPT, the site has the others besides."""

import argparse
import csv
import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from hclm_rl.commands.cli import COMMANDS, Method, find_method, known_methods
from hclm_rl.watch.meanings import Metric, own_metrics, rollouts_metrics, terms_metrics, trls_metrics

__all__ = ["KEPT", "REPOSITORY", "known_methods", "made_pages"]

DOCS = Path(__file__).parent
ROOT = DOCS.parent
REPOSITORY = "https://github.com/hclm-rl/hclm-rl"
SHOWN = 4  # of many choices of a flag
METRICS = """\
# Every logged metric

Written by `python docs/pages.py` from the lines below `Metrics:` in the docstrings of the code that logs them; do not
edit it by hand. `hclm-rl metrics NAME` shows one, `hclm-rl methods NAME` those of a method.

- A term's metrics stand in the log as `<link>/<name>`; a link has its term's name unless the recipe gives it another.
- Each is a mean over the tokens, or the responses, of the whole optimiser step and all processes, unless it says more.
- `q*` stands for quantiles: `q05`, `q50`, `q95`. In the trace of a run these, and what is a mean over tokens, stand
  token by token ([report.md](report.md)).
- A range stands only where one is known. "Start" is the run's own first steps.
- An evaluation logs its own with `eval_` before the name.
"""
ROLLOUTS = """\
As `<rollout>/<name>`, beside the `rollout/...` of every run with one ([rollouts.md](rollouts.md)). Means are over the
responses or prompts of a generation batch, all processes.
"""
COMMAND_LINE = """\
# Command line

Written by `python docs/pages.py` from the commands themselves; `hclm-rl COMMAND --help` says the same. A mistake is one
sentence on stderr and exit code 2. `--quiet` with any command: no progress, no log lines, no warnings; what you asked
for and mistakes are still printed, and files written.

## hclm-rl grpo, hclm-rl rloo

    hclm-rl grpo --config recipe.yaml --seed 2
    hclm-rl grpo --task coins --entropy_terms '["entropy_flow"]'

They train. `--config` names a recipe, every other flag overrides one of its keys: [recipe keys](recipe_keys.md).
`--help` shows the most used, `--help_all` all of them.
`--accelerate_config NAME|FILE` starts several processes, `--num_processes` so many of them:
[several GPUs](howto/gpus.md).

## hclm-rl methods

    hclm-rl methods
    hclm-rl methods right_anchor

Lists the methods, or shows one with its hyper-parameters and what it logs. A dotted path names a class of your own.
"""
RECIPE_KEYS = """\
# Recipe keys and schedules

A recipe is a YAML file of keys; each is a flag on the command line too (`max_steps: 100` is `--max_steps 100`). Keys
are those of TRL's [GRPOConfig](https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig), RLOOConfig, ModelConfig
and ScriptArguments, plus these (written by `python docs/pages.py`). An unknown key is refused with the nearest ones.
"""
INTEGRATIONS_TERMS = """\
# Which terms work under verl and SkyRL

Written by `python docs/pages.py` from what each term declares that it reads and from what it does on a small batch with
its default values; do not edit it by hand. [integrations.md](integrations.md) says how to switch terms on.

A cell says "yes", or what the term reads and does not get there: such a run is refused in a sentence, before its first
update. "verl" is `trainer_mode=hclm_rl_sync` and its asynchronous forms, "verl, loss alone" is `loss_mode=hclm_rl`,
"SkyRL" is `override_entrypoint=hclm_rl.integrations.skyrl`. Where a term reads log-probs of a frozen model, "yes" is
meant with verl's or SkyRL's `use_kl_loss`.

"yes" says that a term can be run. The gradients of `clip_cov`, `kl_cov`, `max_rl`, `forking_tokens`, `entropy_bonus`
and `unlikeliness` under verl, and of `clip_cov` and `max_rl` under SkyRL, are compared with those under TRL.
"""
BESIDE_PLAIN = """\
The difference from plain GRPO on the same seeds and prompts, at the recipe's values; ▲ and ▼ where it is significant.
"affected" is the share of the tokens that each term of the recipe changed.
"""
SCHEDULES = """\
## Schedules: what `coef` may be

A number, or a mapping with `kind`. In a recipe:

```yaml
entropy_terms:
  - entropy_bonus: {coef: {kind: linear, start: 0.01, end: 0.0, warmup: 0.1}}
  - information_force
```
"""


def cell(text: str) -> str:
    """As it may stand in a table; what looks like a tag, as text."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def prose(text: str) -> str:
    """A docstring's paragraphs, with its formulas left as they are."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<\[])", r"\\\1", part) for part in parts)


def rows(head: tuple[str, ...], cells: list[tuple[str, ...]]) -> str:
    """A table; cells are escaped already."""
    lines = [head, ("---",) * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def metrics_table(metrics: list[Metric]) -> str:
    """One row a metric."""
    return rows(
        ("metric", "unit", "meaning", "healthy", "what to do outside"),
        [(f"`{m.name}`", *map(cell, (m.unit, m.meaning, m.healthy, m.otherwise))) for m in metrics],
    )


def page(parts: list[str]) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def metrics_page() -> str:
    """docs/metrics.md."""
    parts = [METRICS, "## Every run", metrics_table(own_metrics())]
    parts += ["## TRL and transformers", metrics_table(trls_metrics()), "## Terms"]
    silent = []
    for name in known_methods():
        if found := terms_metrics(name):
            parts += [f"### {name}", f"{find_method(name).title}.", metrics_table(found)]
        else:
            silent.append(f"`{name}`")
    parts += [f"{', '.join(silent)} log `coef` and `affected` alone.", "## Rollouts", ROLLOUTS]
    for name, found in rollouts_metrics().items():
        parts += [f"### {name}, the rollout", metrics_table(found)]
    return page(parts)


def with_links(paper: str) -> str:
    """arXiv numbers and addresses as links."""
    paper = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    return re.sub(r"(?<![(\w])(https?://[^\s,)]+)", r"<\1>", paper)


def split_recipe(name: str) -> tuple[str, str, str] | None:
    """(what its header says, the entry below entropy_terms, what stands at its end of larger models)"""
    file = ROOT / "recipes" / "methods" / f"{name}.yaml"
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    header = "\n".join(re.sub(r"^# ?", "", line) for line in re.match(r"(?:#.*\n)*", text)[0].splitlines())  # type: ignore[index]
    terms = re.search(r"^entropy_terms:\n(?:[ #].*\n)+", text, flags=re.MULTILINE)
    last = re.search(r"(?:^#.*\n?)+\Z", text, flags=re.MULTILINE)
    larger = " ".join(line.lstrip("# ") for line in last[0].splitlines()) if last else ""
    return header, terms[0] if terms else "", larger


def verdict(name: str) -> str:
    """The last cell of the method's row in docs/methods.md: what the board says of it, in words."""
    for line in (DOCS / "methods.md").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"| [`{name}`]("):
            return re.sub(r"\]\((?!http)", "](../", line.strip("| ").rpartition(" | ")[2])
    return "not yet on the board"


def differences(name: str) -> str:
    """From plain GRPO on each task, at the recipe's values: the numbers of the verdict, docs/verdicts.csv."""
    with (DOCS / "verdicts.csv").open(encoding="utf-8", newline="") as file:
        found = [row for row in csv.DictReader(file) if row.pop("name") == name]
    if not found:
        return ""
    head = ("task", "verdict", "Δ AUC", "Δ pass@1", "Δ pass@32", "seeds", "affected")
    return rows(head, [tuple(map(cell, row.values())) for row in found])


def with_pages(text: str) -> str:
    """docs/methods.md as the site shows it: a method that has a page is a link to that, not to its recipe."""
    known = "|".join(known_methods())
    return re.sub(rf"^\| \[`({known})`\]\([^)]*\)", r"| [`\1`](methods/\1.md)", text, flags=re.MULTILINE)


def with_breaks(html: str) -> str:
    """Names and paths in the cells of tables may break between their words; copied, they are whole."""

    def code(found: re.Match) -> str:
        return found[1] + re.sub(r"([_/=,.(]|::)(?=\w)", r"\1<wbr>", found[2]) + found[3]

    def cell(found: re.Match) -> str:
        return re.sub(r"(<code>)([^<]*)(</code>)", code, found[0])

    return re.sub(r"<t[dh][ >].*?</t[dh]>", cell, html, flags=re.DOTALL)


def per_task_board() -> Path:
    """The page with a section for each task: behind the main table, or the board itself where it has none."""
    behind = DOCS / "leaderboard_all.md"
    return behind if behind.is_file() else DOCS / "leaderboard.md"


def board(name: str) -> str:
    """The method's rows of the board at its recipe's values, beside plain GRPO's."""
    found, section, part = [], "", ""
    for line in per_task_board().read_text(encoding="utf-8").splitlines():
        section = line[3:] if line.startswith("## ") else section
        part = line[4:] if line.startswith("### ") else "" if line.startswith("## ") else part
        cells = [each.strip() for each in line.strip("|").split("|")]
        if part == "At the recipe's values" and len(cells) > 5 and cells[0] in (f"`{name}`", "`plain`"):
            found.append((section, cells[0], *cells[1:5], cells[-1]))
    sections = {row[0] for row in found if row[1] == f"`{name}`"}
    return (
        rows(
            ("task, setting", "entry", "Δ AUC", "AUC of pass@k", "pass@1", "pass@32", "seeds"),
            [row for row in found if row[0] in sections],
        )
        if sections
        else ""
    )


def method_page(name: str) -> str:
    """How to use it, what it is, what it logs, what was measured, where it comes from."""
    method: Method = find_method(name)
    recipe = split_recipe(name)
    first, _, rest = method.docstring.partition("\n\n")
    parts = [f"# {name}", prose(first)]
    parts.append(f"Kind: {', '.join(method.kinds)}. Needs: {', '.join(method.needs) or 'nothing more'}.")
    parts.append("## How to use it")
    if recipe:
        parts.append(f"```yaml\n{recipe[1]}```" if recipe[1] else "")
        parts.append(
            f"The whole recipe: [recipes/methods/{name}.yaml]({REPOSITORY}/blob/main/recipes/methods/{name}.yaml)."
        )
        parts.append(f"```\n{recipe[0]}\n```")
        parts += ["### On a larger model", prose(recipe[2])] if recipe[2] else []
    else:
        parts.append(f"```yaml\nentropy_terms:\n  - {name}\n```")
    fields = [(f"`{n}`", f"`{cell(t)}`", f"`{cell(d)}`", cell(meaning)) for n, t, d, meaning in method.parameters]
    parts += ["## Parameters", rows(("name", "type", "default", "meaning"), fields) if fields else "None."]
    parts += ["## How it works, and what it assumes", prose(rest)] if rest else []
    parts.append("## What it logs")
    parts.append(f"As `{name}/NAME`, beside `coef` and `affected` ([metrics](../metrics.md#every-run)).")
    parts.append(metrics_table(method.metrics) if method.metrics else "")
    levels, said = board(name), verdict(name)
    parts += ["## Evidence"] if levels and said.startswith("not yet") else ["## Evidence", f"{said.rstrip('.')}."]
    parts += [BESIDE_PLAIN, against] if (against := differences(name)) else []
    parts += ["As trained, with 95 % intervals:", levels] if levels else []
    parts.append(f"What the columns and marks mean: [the board](../{per_task_board().name}).")
    source = method.paper if method.title == method.paper else f"{method.title}: {method.paper}"
    code = f"[hclm_rl/terms/{name}.py]({REPOSITORY}/blob/main/hclm_rl/terms/{name}.py)"
    parts += ["## Source", f"{with_links(prose(source))}. Code: {code}."]
    return page(parts)


class Found(Exception):
    """Carries a command's parser out of its `main`."""


def parser_of(main: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """What the command would have read its arguments with."""
    own = argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        raise Found(self)

    argparse.ArgumentParser.parse_known_args = stop  # type: ignore[method-assign]
    try:
        main([])
    except Found as found:
        return found.args[0]
    finally:
        argparse.ArgumentParser.parse_known_args = own  # type: ignore[method-assign]
    raise ValueError(f"{main.__module__} reads no arguments")


def written(action: argparse.Action) -> tuple[str, str]:
    """(how it is given, what it means)"""
    names = {
        each.lstrip("-").replace("-", "_"): each for each in reversed(action.option_strings)
    }  # one spelling of each
    name = ", ".join(reversed(names.values())) or action.metavar or action.dest
    if action.choices:
        choices = [*map(str, action.choices)]
        more = [f"and {len(choices) - SHOWN} more"] if len(choices) > 2 * SHOWN else []
        name += f" {{{', '.join([*choices[: SHOWN if more else None], *more])}}}"
    elif action.option_strings and action.nargs != 0:
        name += f" {action.metavar or action.dest.upper()}"
    meaning = action.help or ""
    if action.default not in (None, False, argparse.SUPPRESS) and not (
        "default" in meaning or meaning.endswith(f"({action.default})")
    ):
        meaning = f"{meaning} (default {action.default})".strip()
    return f"`{name}`", cell(meaning)


def command_line_page() -> str:
    parts = [COMMAND_LINE]
    for command, (module, about) in COMMANDS.items():
        parser = parser_of(importlib.import_module(module).main)
        actions = [each for each in parser._actions if not isinstance(each, argparse._HelpAction)]
        parts += [f"## hclm-rl {command}", cell(parser.description or f"{about}.")]
        parts.append(rows(("argument", "meaning"), list(map(written, actions))))
        parts.append(prose(parser.epilog or ""))
    return page(parts)


def keys_of(kind: type, without: type) -> str:
    """The keys that a dataclass adds to another."""
    theirs = {each.name for each in dataclasses.fields(without)}
    found = []
    for each in dataclasses.fields(kind):
        if each.name not in theirs and each.init:
            default = each.default if each.default is not dataclasses.MISSING else each.default_factory()  # type: ignore[misc]
            found.append((f"`{each.name}`", f"`{default}`", cell(each.metadata.get("help", ""))))
    return rows(("key", "default", "meaning"), found)


def recipe_keys_page() -> str:
    import trl
    from trl.scripts.utils import ScriptArguments

    from hclm_rl.chain.coefficients import KINDS
    from hclm_rl.recipe.arguments import RunArguments
    from hclm_rl.recipe.config import GRPOConfig

    parts = [RECIPE_KEYS, "## The run", keys_of(RunArguments, ScriptArguments)]
    parts += ["## Entropy terms, trace, pass@k", keys_of(GRPOConfig, trl.GRPOConfig), SCHEDULES]
    for kind, coefficient in KINDS.items():
        fields = [
            (f"`{f.name}`", "needed" if f.default is dataclasses.MISSING else f"`{f.default}`")
            for f in dataclasses.fields(coefficient)
        ]
        text = "\n\n".join(" ".join(each.split()) for each in (coefficient.__doc__ or "").split("\n\n"))
        parts += [f"### {kind}", prose(text), rows(("key", "default"), fields)]
    return page(parts)


def integrations_page() -> str:
    from hclm_rl.integrations.works import table

    return page(
        [
            INTEGRATIONS_TERMS,
            rows(("term", "verl", "verl, loss alone", "SkyRL"), [(f"`{name}`", *cells) for name, *cells in table()]),
        ]
    )


def index_page() -> str:
    """The README, seen from docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = text.replace("](docs/", "](")
    return re.sub(r"\]\((?=[A-Z]+\.(md|cff)|examples/)", f"]({REPOSITORY}/blob/main/", text)


def made_pages() -> dict[str, str]:
    """{path in docs/: text} of the pages that stand in the site alone."""
    return {"index.md": index_page()} | {f"methods/{name}.md": method_page(name) for name in known_methods()}


KEPT: Mapping[str, Callable[[], str]] = {
    "metrics.md": metrics_page,
    "command_line.md": command_line_page,
    "recipe_keys.md": recipe_keys_page,
    "integrations_terms.md": integrations_page,
}

if __name__ == "__main__":
    for name, text_of in KEPT.items():
        (DOCS / name).write_text(text_of(), encoding="utf-8")
