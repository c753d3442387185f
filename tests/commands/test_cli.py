"""`hclm-rl`: the list of methods, and how training is started."""

import dataclasses
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import hclm_rl.commands.launch
from hclm_rl import __version__, known_terms
from hclm_rl.commands import cli, helps
from hclm_rl.commands.helps import HELPS
from hclm_rl.recipe.config import find_term
from hclm_rl.watch import meanings

ROOT = Path(__file__).parents[2]

# what each method shapes, by its paper: Clip-Cov and forking tokens drop tokens' advantages, QAE changes the baseline,
# MaxRL the scale; the bonus, KL-Cov's penalty and the log-det surrogate are added losses; the force is only measured
KINDS = {
    "clip_cov": ["advantage"],
    "entropy_bonus": ["loss"],
    "forking_tokens": ["advantage"],
    "information_force": ["diagnostic"],
    "kl_cov": ["loss"],
    "log_det": ["loss"],
    "max_rl": ["advantage"],
    "qae": ["advantage"],
}

OWN_TERM = '''"""Own: Somebody, 2026, example.org"""

from dataclasses import dataclass
from typing import ClassVar
from hclm_rl import Effect, Term


@dataclass(frozen=True, kw_only=True)
class Mine(Term):
    """Does
    something.

    Args:
        share: of
            tokens

    Attributes:
        default_coef: as in: our runs
    """

    default_coef: ClassVar[float] = 0.1

    share: float = 0.5

    def __call__(self, batch, memory):
        return Effect(loss=-batch.entropy)
'''


def test_all_methods_are_listed_with_paper_and_needs(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "240")
    assert cli.main(["methods"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [row.split("│")[1].strip() for row in rows] == known_terms()
    shown = {row.split("│")[1].strip(): [cell.strip() for cell in row.split("│")[2:5]] for row in rows}
    assert shown["kl_cov"] == [
        "Cui et al., 2025, arXiv:2505.22617",
        "loss",
        "scoring pass (some forms), several updates per rollout",
    ]
    assert shown["log_det"] == ["HCLM, Tran, 2026, arXiv:2605.22940", "loss", "scoring pass, hidden states"]


@pytest.mark.parametrize(
    ("version", "line"),
    [
        ("1.17.0", "from hclm_rl.commands import cli; sys.exit(cli.main(['grpo']))"),
        ("1.15.0", "from hclm_rl import GRPOConfig"),
        ("1.9.0", "from hclm_rl import SFTConfig"),
    ],
)
def test_another_trl_is_refused_in_one_sentence(version: str, line: str):
    code = f"import sys, trl; trl.__version__ = '{version}'; {line}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    sentence = f"hclm_rl works with trl>=1.16,<1.17, and trl {version} is installed: pip install 'trl>=1.16,<1.17'"
    if "cli" in line:
        assert (done.returncode, done.stderr.strip()) == (2, f"hclm-rl: {sentence}")
    else:
        assert done.stderr.strip().endswith(f"ImportError: {sentence}")


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_is_read_from_what_the_term_asks_for(name: str):
    assert cli.find_method(name).kinds == KINDS[name]


def test_one_method_is_shown_with_defaults_and_units(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert cli.main(["methods", "clip_cov"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if "│" in line}
    assert "Drops the gradient of a few random tokens" in out
    assert "│ 0.0002 " in rows["ratio"] and "of all response tokens, in (0, 1]; the paper's value" in rows["ratio"]
    assert "in units of log-prob x advantage" in rows["lower"]
    assert "│ 1.0 " in rows["coef"]


def test_a_method_of_the_users_own_is_shown_by_dotted_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "own_terms.py").write_text(OWN_TERM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert cli.main(["methods", "own_terms.Mine"]) == 0
    out = capsys.readouterr().out
    assert "Somebody, 2026, example.org" in out and "Does something." in out and "of tokens" in out
    method = cli.find_method("own_terms.Mine")
    assert (method.name, method.kinds, method.docstring) == ("own_terms.Mine", ["loss"], "Does something.")
    assert method.parameters == [
        ("share", "float", "0.5", "of tokens"),
        ("coef", "float | schedule", "0.1", "strength: a number or a schedule; as in: our runs"),
    ]
    (tmp_path / "own_terms.py").write_text(OWN_TERM.replace("share: of", "share of"))
    with pytest.raises(ValueError, match=r"^Mine: a line below `Args:` must be `name: meaning`, got .*share of"):
        cli.find_method("own_terms.Mine")


def test_the_docstring_says_what_each_field_means_and_of_no_other():
    for name in known_terms():
        term = find_term(name)
        fields = {field.name for field in dataclasses.fields(term)}
        said = {
            each.arg_name
            for each in meanings.SECTIONS.parse(term.__doc__).params
            if each.description and each.args[0] != meanings.METRIC
        }
        silent, strange = sorted(fields - said), sorted(said - fields - {"default_coef"})
        where = f"the docstring of {term.__name__} in hclm_rl/terms/{name}.py"
        assert not silent, f"add `{silent[0]}: unit, range, where the default comes from` below `Args:` in {where}"
        assert not strange, f"`{strange[0]}` below `Args:` is no field: take it out of {where}"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["methods", "clipcov"], "hclm-rl: unknown method 'clipcov'; the nearest are clip_cov, "),
        (["methods", "nowhere.Term"], "hclm-rl: no module 'nowhere' for the method 'nowhere.Term'"),
        (
            ["grpo", "--accelerate_config", "cpus"],
            "hclm-rl: no accelerate configuration 'cpus': give a file or one of ",
        ),
        (["grpo", "--num_processes", "2"], "hclm-rl: --num_processes needs --accelerate_config"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(line: list[str], sentence: str, capsys: pytest.CaptureFixture):
    assert cli.main(line) == 2
    err = capsys.readouterr().err
    assert err.startswith(sentence) and err.count("\n") == 1


def test_the_recipe_goes_to_the_training_job_as_it_is(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(hclm_rl.commands.launch, "main", lambda algorithm, line: seen.append((algorithm, line)) or 7)
    assert cli.main(["rloo", "--config", "r.yaml", "--help"]) == 7  # even --help is the job's, which knows TRL's flags
    assert seen == [("rloo", ["--config", "r.yaml", "--help"])]


@pytest.mark.parametrize("name", ["cpu", str(ROOT / "recipes" / "accelerate" / "cpu.yaml"), "zero1"])
def test_an_accelerate_configuration_starts_the_job_through_accelerate(name: str, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(
        subprocess, "run", lambda command: seen.append(command) or subprocess.CompletedProcess(command, 3)
    )
    line = ["grpo", "--config", "r.yaml", "--accelerate_config", name, "--num_processes", "4", "--seed", "5"]
    assert cli.main(line) == 3
    [command] = seen
    file = Path(command[command.index("--config_file") + 1])
    assert file.name == ("zero1.yaml" if name == "zero1" else "cpu.yaml") and file.is_file()
    assert command[command.index("--num_processes") + 1] == "4"
    assert command[command.index("--module") :] == ["--module", "hclm_rl", "grpo", "--config", "r.yaml", "--seed", "5"]


def test_python_dash_m_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "hclm_rl", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["hclm-rl", __version__])


def test_an_unknown_command_names_three(capsys: pytest.CaptureFixture):
    assert cli.main(["repot", "runs/a"]) == 2
    assert capsys.readouterr().err == (
        "hclm-rl: unknown command 'repot'; the nearest are report, grpo, recipes; `hclm-rl --help` lists all\n"
    )
    assert cli.main(["grpo", "--accelerate_config", "cpus"]) == 2
    err = capsys.readouterr().err
    assert err.count(",") == 3 and "cpu, " in err and err.endswith(", ...\n")


@pytest.mark.parametrize("verb", [*cli.ALGORITHMS, *cli.COMMANDS, "methods"])
def test_the_help_of_a_verb_fits_a_screen(verb: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    try:
        assert cli.main([verb, "--help"]) == 0
    except SystemExit as end:  # as argparse ends
        assert end.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: hclm-rl {verb}") and said.count("\n") <= 48
    if verb in HELPS:
        assert "--config" in said


def test_the_short_help_names_flags_that_are_there():
    from hclm_rl.commands import generate
    from hclm_rl.commands.ablation import SCORES
    from hclm_rl.recipe.arguments import make_parser

    assert tuple(SCORES) == helps.SCORES
    there = {each for action in make_parser("grpo")._actions for each in action.option_strings}
    there |= {"--quiet", "--help_all", "--accelerate_config", "--num_processes", "--config", "-h"}
    for verb in ("grpo", "rloo"):
        assert {each for action in HELPS[verb]()._actions for each in action.option_strings} <= there
    own = {f"--{each.name}" for each in dataclasses.fields(generate.GenerateArguments)} | {"--config", "--help", *there}
    assert {each for action in HELPS["generate"]()._actions for each in action.option_strings} <= own


def test_plain_words_need_no_torch():
    """Each of them must answer in a second: they may not import torch, TRL or transformers."""
    code = (
        "import sys; from hclm_rl.commands import cli\n"
        "for line in ([], ['grpo', '--help'], ['doctor', '--help'], ['methods', 'qae'], ['recipes'], ['nothing']):\n"
        "    cli.main(line)\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & sys.modules.keys(), sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr  # no colours where no terminal is


def test_quiet_leaves_the_answer_and_the_mistakes(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    def noisy(algorithm: str, line: list[str]) -> int:
        print("{'loss': 1}")
        logging.getLogger("hclm_rl").warning("a warning")
        warnings.warn("another", stacklevel=1)
        print("hclm-rl grpo: a mistake", file=sys.stderr)
        assert os.environ["TQDM_DISABLE"] == "1" and line == ["--seed", "1"]
        return 2

    monkeypatch.setattr(hclm_rl.commands.launch, "main", noisy)
    assert cli.main(["grpo", "--quiet", "--seed", "1"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == "hclm-rl grpo: a mistake\n"
    assert "TQDM_DISABLE" not in os.environ and logging.root.manager.disable == 0
    assert cli.main(["recipes", "--quiet"]) == 0
    assert "quickstart" in capsys.readouterr().out  # it was asked for
