"""What an installed hclm_rl brings: recipes, accelerate configurations, metadata that holds outside the clone."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from hclm_rl.commands import cli
from hclm_rl.recipe import shipped
from hclm_rl.recipe.arguments import recipe_of

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def included() -> dict[str, str]:
    """{path in the clone: path in the wheel} of what is put in from outside the package."""
    return PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]


def test_every_recipe_is_put_into_the_wheel_at_its_place():
    listed = {file for source in included() for file in (ROOT / source).rglob("*.yaml")}
    listed |= {ROOT / source for source in included() if source.endswith(".yaml")}
    assert listed == set((ROOT / "recipes").rglob("*.yaml"))
    assert all(target == f"hclm_rl/{source}" for source, target in included().items())


def test_every_extra_that_a_sentence_names_is_there():
    named = {
        name
        for folder in ("hclm_rl", "docs", "recipes", "eval")
        for file in (ROOT / folder).rglob("*.*")
        if file.suffix in (".py", ".md", ".yaml")
        for extras in re.findall(r"hclm-rl\[([\w,-]+)\]", file.read_text(encoding="utf-8"))
        for name in extras.split(",")
    }
    assert {"forecast", "eval", "lm-eval"} <= named <= PROJECT["project"]["optional-dependencies"].keys()


def test_recipes_are_listed_with_a_line_each(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert "Right-answer anchor on the testbed: what was once sampled and right may not become less likely" in out
    assert "accelerate: One process on one GPU" in out
    known = shipped.shipped_recipes()
    assert len(known) == len(list((ROOT / "recipes").rglob("*.yaml"))), "two recipes have the same name"
    assert all(shipped.about(file) for file in known.values())


def test_a_recipe_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "copy", "qae"]) == 0
    assert capsys.readouterr().out == "qae.yaml\nhclm-rl grpo --config qae.yaml\n"
    assert cli.main(["recipes", "copy", "mix_ce"]) == 0
    assert capsys.readouterr().out == "mix_ce.yaml\nhclm-rl sft --config mix_ce.yaml\n"
    assert (tmp_path / "qae.yaml").read_bytes() == (ROOT / "recipes" / "methods" / "qae.yaml").read_bytes()
    for line, sentence in (
        (["qae"], "'qae.yaml' is there already: give another file with --to"),
        (["qe"], "no recipe 'qe'; the nearest are qae, "),
        ([], "hclm-rl recipes copy needs a NAME"),
        (["qae", "--to", "none/qae.yaml"], "no folder 'none' to put the recipe into"),
    ):
        assert cli.main(["recipes", "copy", *line]) == 2
        assert sentence in capsys.readouterr().err


def test_the_path_of_a_recipe_holds_outside_the_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = recipe_of(["--config", "recipes/methods/qae.yaml"])
    assert found is not None and found.samefile(ROOT / "recipes" / "methods" / "qae.yaml")
    assert recipe_of(["--config", "mine.yaml"]) == Path("mine.yaml")
    (tmp_path / "recipes" / "methods").mkdir(parents=True)
    (tmp_path / "recipes" / "methods" / "qae.yaml").touch()  # a file of the user's own comes first
    assert recipe_of(["--config", "recipes/methods/qae.yaml"]) == Path("recipes/methods/qae.yaml")
    assert cli.accelerate_file("cpu").is_file()


@pytest.mark.slow
def test_a_built_wheel_works_outside_the_clone(tmp_path: Path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)  # fetches hatchling, as every build does
    [wheel] = tmp_path.glob("*.whl")
    there = tmp_path / "there"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(there)
        names = file.namelist()
    assert not [name for name in names if name.startswith(("tests/", "eval/", "docs/"))]
    assert (there / "hclm_rl" / "py.typed").is_file() and (there / "hclm_rl" / "recipes" / "quickstart.yaml").is_file()
    [metadata] = there.glob("*.dist-info/METADATA")
    assert not re.findall(r"\]\((?!https?:|#)[^)]*\)", metadata.read_text())

    def run(*line: str) -> str:
        environment = {"PYTHONPATH": str(there), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        environment["HF_HUB_OFFLINE"] = "1"
        command = [sys.executable, "-W", "ignore", "-m", "hclm_rl", *line]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "right_anchor" in run("recipes")
    run("recipes", "copy", "max_rl")
    small = ["--task_kwargs", '{"prompts": 16}', "--eval_samples", "0", "--max_steps", "1", "--use_cpu", "true"]
    small += ["--per_device_train_batch_size", "16", "--output_dir", "out"]
    run("grpo", "--config", "max_rl.yaml", *small)
    assert (tmp_path / "out" / "summary.json").is_file()
    run("grpo", "--config", "recipes/methods/max_rl.yaml", "--accelerate_config", "single_cpu", *small)
