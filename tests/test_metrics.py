"""Every number that a run logs is said in words beside the code that logs it, and on docs/metrics.md."""

import ast
import inspect
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from trl.trainer import grpo_trainer, rloo_trainer

from hclm_rl import CollapseCallback, Quantiles, Term, known_terms
from hclm_rl.commands import cli
from hclm_rl.watch import meanings as metrics

from .term_batches import first_stage, make_step, rollout, second_stage, token_batch
from .test_contract import FOR_PARITY, FORMS, TERMS
from .tiny import make, prompts

ROOT = Path(__file__).parents[1]
TRAINERS = ("coef", "affected")  # of every link, by the trainer
ADD = (
    "{file} logs {names} without saying what it means. Add below `Metrics:`, the last part of the class's docstring, "
    "a line `name (unit): meaning. Healthy: range. Else: what to do` each, the last two only where they are known "
    "(hclm_rl/terms/right_anchor.py has some); then run `python docs/pages.py`"
)


def logged_by(term: Term) -> set[str]:
    """Names of what it logs in four steps; `/q*` behind those of quantiles."""
    memory, found = {}, set()
    for i in range(4):
        step = make_step(i)
        first = first_stage(term, replace(rollout(step), step=i), memory)
        outcome = second_stage(term, replace(token_batch(step), step=i), first, memory)
        said = {**first.metrics, **outcome.metrics}
        for link, callback in outcome.on_hidden_gradient.items():
            said |= {f"{link}/{name}": metric for name, metric in callback(torch.ones_like(step.hidden)).items()}
        found |= {name.partition("/")[2] + "/q*" * isinstance(metric, Quantiles) for name, metric in said.items()}
    return found.difference(TRAINERS)


def written_in(source: str) -> set[str]:
    """Names in the dicts that go by the name of `metrics`: those of a case that no step of the tests may be."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        is_named = isinstance(node, ast.keyword) and node.arg == "metrics"
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            is_named = any(isinstance(each, ast.Name) and each.id == "metrics" for each in targets)
            for each in targets:
                if isinstance(each, ast.Subscript) and ast.unparse(each.value) == "metrics":
                    found |= {leaf.value for leaf in ast.walk(each.slice) if isinstance(leaf, ast.Constant)}
        value = getattr(node, "value", None)
        if is_named and isinstance(value, ast.AST):
            dicts = [each for each in ast.walk(value) if isinstance(each, ast.Dict)]
            found |= {key.value for each in dicts for key in each.keys if isinstance(key, ast.Constant)}
    return {name for name in found if isinstance(name, str)}


@cache
def forms_of(name: str) -> list[Term]:
    return [term for key, term in (TERMS | FORMS | FOR_PARITY).items() if key.partition(",")[0] == name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", known_terms())
def test_what_a_term_logs_is_said_in_words(name: str):
    said = {each.name for each in metrics.terms_metrics(name)}
    file = ROOT / "hclm_rl" / "terms" / f"{name}.py"
    logged = set().union(*map(logged_by, forms_of(name)))
    literal = {each for each in written_in(file.read_text()) if f"{each}/q*" not in said}
    missing = sorted((logged | literal) - said)
    assert not missing, ADD.format(file=file.relative_to(ROOT), names=", ".join(missing))
    # nothing is described that no code names
    sources = file.read_text().partition("Metrics:")[2] + (ROOT / "hclm_rl" / "equations" / "ledger.py").read_text()
    unknown = {each for each in said - logged if not re.search(rf'["`]{each.removesuffix("/q*")}["`]', sources)}
    assert not unknown, f"{file.relative_to(ROOT)} describes {', '.join(sorted(unknown))} and logs no such metric"


def test_names_that_stand_in_the_source_alone_are_found():
    source = 'metrics = {"a": 1}\nmetrics |= {"b": 2}\nmetrics["c"] = 3\nEffect(metrics={"d": 4})\nother = {"e": 5}\n'
    assert written_in(source) == {"a", "b", "c", "d"}


@pytest.mark.parametrize("module", [grpo_trainer, rloo_trainer])
def test_what_trl_logs_is_said_in_words(module):
    names = re.findall(r'_metrics\[mode\]\[f?"([^"]+)"\]', inspect.getsource(module))
    assert len(names) > 20
    unknown = {name for name in names if not metrics.meanings(re.sub(r"\{\w+\}", "name", name))}
    assert not unknown, f"add {', '.join(sorted(unknown))} to hclm_rl/watch/trl_metrics.py, then docs/pages.py"


def test_every_number_of_a_run_has_its_words(policy: str, tmp_path: Path):
    trainer = make(
        policy,
        tmp_path,
        terms=["entropy_bonus", {"clip_cov": {"name": "mine"}}],
        beta=0.1,
        eval_strategy="steps",
        eval_steps=2,
        eval_pass_at_k=True,
        trainer={"callbacks": [CollapseCallback()], "eval_dataset": prompts(4)},
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry} - {"step"}
    assert {"mine/candidates", "collapse/state", "rewards/low_words/not_scored", "eval_pass@4/lower", "kl"} <= logged
    assert not {name for name in logged if not metrics.meanings(name)}


def test_a_quantity_of_one_term_is_not_taken_for_anothers():
    [(who, found)] = metrics.meanings("right_anchor/lost")
    assert (who, found.unit, found.healthy) == ("right_anchor", "share", "does not rise for long")
    # a link with a name of its own may be of any term
    assert {who for who, _ in metrics.meanings("mine/value")} >= {"log_det", "variance"}
    assert [who for who, _ in metrics.meanings("information_force/force/q05")] == ["information_force"]
    assert not metrics.meanings("right_anchor/losses")
    assert [found.name for _, found in metrics.meanings("eval_entropy")] == ["entropy"]


def described(line: str) -> list[metrics.Metric]:
    source = f'class A:\n    """Does.\n\n    Args:\n        lost: a field\n\n    Metrics:\n        {line}\n    """\n'
    return metrics.metrics_of(metrics.read_docstring(ast.parse(source).body[0]))  # type: ignore[arg-type]


def test_a_line_is_read_part_by_part():
    [found] = described("lost (share): of the replays. Healthy: near 0. Else: raise `coef`")
    assert found == metrics.Metric(
        name="lost", unit="share", meaning="of the replays", healthy="near 0", otherwise="raise `coef`"
    )
    assert found.told == "of the replays. Healthy: near 0. Else: raise `coef`."
    [found] = described("lost (share): of the replays")
    assert (found.healthy, found.otherwise, found.told) == ("-", "-", "of the replays.")


@pytest.mark.parametrize("line", ["lost: of the replays", "lost (share):", "lost (share): replays. Else: run"])
def test_a_line_without_a_part_is_refused(line: str):
    with pytest.raises(ValueError, match=r"'lost' must stand as `name \(unit\): meaning. Healthy: range"):
        described(line)


def test_the_command_line_shows_them(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["metrics", "right_anchor/lost"]) == 0
    assert "of the replays that lie below their floor. Healthy: does not rise for long." in capsys.readouterr().out
    assert cli.main(["metrics"]) == 0
    assert "information_force/critical_coef" in capsys.readouterr().out
    assert cli.main(["methods", "right_anchor"]) == 0
    assert "What it logs, as right_anchor/NAME" in capsys.readouterr().out
    assert cli.main(["metrics", "right_anchr/losst"]) == 2
    assert "no metric 'right_anchr/losst' is known; the nearest are right_anchor/lost" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("right_ancor/lost", "right_anchor/lost"),
        ("entropy_bonis/coef", "entropy_bonus/coef"),  # which every link has
        ("right_anchor/lost", None),
        ("right_anchor_2/lost", None),  # as a second link of the term is named
        ("mine/lost", None),
        ("my_log_det/value", None),
        ("collapse/state", None),
        ("entropy", None),
    ],
)
def test_a_misspelt_link_is_told_what_was_probably_meant(
    name: str, meant: str | None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["metrics", name]) == 0
    said = capsys.readouterr()
    link = name.partition("/")[0]
    assert said.err == (f"'{link}' is no known name; '{meant}' was probably meant\n" if meant else "")
    if name == "right_ancor/lost":
        assert "logged by right_anchor" in said.out.splitlines()[0]
