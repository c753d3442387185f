"""Every command, recipe and script that the README and the pages show: run as it stands, or marked as needing a GPU."""

import ast
import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hclm_rl.commands import cli
from hclm_rl.evaluation.command import counts_parser
from hclm_rl.recipe.arguments import make_parser, parse
from hclm_rl.testbed.policy import policy_path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("start", "data", "troubleshooting", "report"))]
PAGES += sorted((ROOT / "docs" / "howto").glob("*.md"))
# of these the flags alone: they speak of logs and models of the reader's
MORE = [ROOT / "docs" / f"{name}.md" for name in ("evaluation", "extending", "forces", "forecast", "command_line")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
NEEDS_GPU = "Needs a GPU"
OUTSIDE = ("pip", "make", "uv", "python3", ".venv/bin/python", ".venv/bin/accelerate", "accelerate", "trl")
RECIPE = """\
task: coins
task_kwargs: {prompts: 8, eval_prompts: 2}
model_name_or_path: testbed
output_dir: runs/mine
entropy_terms: [entropy_bonus]
max_steps: 2
num_generations: 4
per_device_train_batch_size: 8
learning_rate: 1.0e-4
bf16: false
gradient_checkpointing: false
use_cpu: true
logging_steps: 1
save_steps: 1
disable_tqdm: true
"""
# what keeps a line of the pages short in a test, behind the line as it stands
SHORTER = {
    "grpo": ["--max_completion_length", "4"],
    "eval": ["--samples", "2", "--max_new_tokens", "2"],
    "doctor": ["--prompts", "1", "--steps", "1"],
}


def blocks(page: Path, *languages: str) -> Iterator[tuple[str, bool]]:
    """(code, whether the lines before it say that it needs a GPU)"""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if match[1] in languages:
            yield match[2], NEEDS_GPU in text[: match.start()].rstrip().rpartition("\n\n")[2]


def lines(page: Path) -> Iterator[tuple[list[str], bool]]:
    """The words of each command, without comments and what the shell does with its status."""
    for code, needs_gpu in blocks(page, "", "shell", "bash"):
        for line in code.splitlines():
            words = shlex.split(line.partition("||")[0], comments=True)
            if words := words[sum(word.startswith("CUDA_VISIBLE_DEVICES=") for word in words[:1]) :]:
                yield words, needs_gpu


def written_as(words: list[str]) -> str:
    return shlex.join(words)


EVERY = [(page, words, needs_gpu) for page in PAGES for words, needs_gpu in lines(page)]
OURS = [(page, words, needs_gpu) for page, words, needs_gpu in EVERY if words[0] == "hclm-rl"]


def test_there_are_commands_and_none_is_of_an_unknown_kind():
    assert len(OURS) >= 14
    assert not [words for _, words, _ in EVERY if words[0] not in ("hclm-rl", *OUTSIDE)]


def shown(page: Path) -> Iterator[list[str]]:
    """Its lines of ours, whatever block they stand in."""
    for line in re.findall(
        r"^(?: {4}|CUDA_VISIBLE_DEVICES=\S+ )?(hclm-rl .*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE
    ):
        yield shlex.split(line.partition("||")[0], comments=True)


FLAGS = {written_as(words): words for page in (*PAGES, *MORE) for words in shown(page)}


@pytest.mark.parametrize("words", FLAGS.values(), ids=FLAGS.keys())
def test_every_flag_is_one_of_the_command(words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from pages import parser_of  # pyright: ignore[reportMissingImports]

    verb, flags = words[1], {word for word in words[2:] if word.startswith("--")}
    of_runs = {*make_parser("grpo")._option_string_actions, "--config", "--accelerate_config", "--num_processes"}
    if verb in cli.ALGORITHMS:
        known = of_runs
    elif verb in cli.COMMANDS:
        own = parser_of(importlib.import_module(cli.COMMANDS[verb][0]).main)
        known = {*own._option_string_actions, *(of_runs if verb == "doctor" else ())}
        if "--counts" in flags:  # which has a command line of its own
            known = {*counts_parser()._option_string_actions}
    else:
        assert verb in ("methods", "recipes")
        known = set()
    assert not flags - known


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: a recipe, a file of problems, a run, a reward of one's own."""
    made = tmp_path_factory.mktemp("stranger")
    (made / "recipe.yaml").write_text(RECIPE)
    problems = [{"prompt": "3 5 : ", "answer": 8}, {"prompt": "4 4 : ", "answer": "8"}]
    (made / "problems.jsonl").write_text("".join(json.dumps(each) + "\n" for each in problems))
    [(source, _)] = blocks(ROOT / "docs" / "data.md", "python")
    (made / "my_rewards.py").write_text(source)
    return made


@pytest.fixture
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In that folder, with the runs that a line may read."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    for run in ("mine", "plain", "a", "b"):
        if not (folder / "runs" / run / "summary.json").exists():
            assert cli.main(["grpo", "--config", "recipe.yaml", "--output_dir", f"runs/{run}", *SHORTER["grpo"]]) == 0
    return folder


RUN = {written_as(words): words for _, words, needs_gpu in OURS if not needs_gpu}


@pytest.mark.parametrize("words", RUN.values(), ids=RUN.keys())
def test_every_command_runs_as_it_stands(words: list[str], there: Path, capsys: pytest.CaptureFixture):
    named = {"MODEL": policy_path(), "NAME": "right_anchor/lost" if words[1] == "metrics" else "right_anchor"}
    line = [named.get(word, word) for word in words[1:]]
    if words[1] == "grpo" and "--config" not in line:  # what a user's own recipe says of the machine
        line += [
            "--num_generations",
            "4",
            "--per_device_train_batch_size",
            "8",
            "--max_steps",
            "1",
            "--use_cpu",
            "true",
        ]
        line += ["--bf16", "false", "--gradient_checkpointing", "false", "--steps_per_generation", "1"]
    line += SHORTER.get(words[1], [])
    status = cli.main(line)
    said = capsys.readouterr()
    # 1: an alarm of watch, a regime of doctor that is not healthy
    assert status == 0 or (status == 1 and words[1] in ("watch", "doctor", "eval")), said.err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_recipe_is_one(page: Path, tmp_path: Path):
    for code, _ in blocks(page, "yaml"):
        given = yaml.safe_load(code)
        parse_it = tmp_path / "recipe.yaml"
        parse_it.write_text(code)
        own = {key for key in given if not key.startswith(("use_vllm", "vllm_"))}  # vLLM is not installed here
        parse_it.write_text(yaml.safe_dump({key: given[key] for key in own}))
        arguments, config, *_ = parse(
            "grpo", ["--config", str(parse_it), "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
        )
        assert arguments and config.checked()
        assert not {key for key in given if key not in vars(make_parser("grpo").parse_known_args([])[0])}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_script_is_python_whose_names_exist(page: Path):
    for code, _ in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, each.name) for each in node.names)
