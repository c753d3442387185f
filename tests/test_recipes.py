"""Every method has a recipe that parses and names it, a header that says what to expect, and a row in the docs."""

import re
from pathlib import Path

import pytest
import yaml

from hclm_rl import known_terms
from hclm_rl.commands.launch import main
from hclm_rl.recipe.arguments import parse
from hclm_rl.recipe.config import build_chain, find_term

from .tiny import WITH_TOOLS

ROOT = Path(__file__).parents[1]
RECIPES = {file.stem: file for file in sorted((ROOT / "recipes/methods").glob("*.yaml"))}
# what a method's recipe may have of its own; all else is the quickstart's (with tools, multi_turn.yaml's), or the runs
# would not compare
OWN = {"entropy_terms", "output_dir"}
STEPS_OF_ITS_OWN = {"em_rl"}  # whose paper stops early
SHORTER = {"entropy_sgd": ["--entropy_sgd", '{"inner_steps": 3}']}  # so that three steps hold an outer one


def test_every_term_has_a_recipe():
    assert [name for name in known_terms() if name not in RECIPES] == []


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_parses_and_says_what_it_is(name: str):
    text = RECIPES[name].read_text()
    header = text.split("\ntask:")[0]
    assert f"#   accelerate launch recipes/grpo.py --config recipes/methods/{name}.yaml" in header
    assert re.search(r"^# .*minutes? on ", header, flags=re.MULTILINE) and "\n# Numbers" in header
    parse("grpo", ["--config", str(RECIPES[name])])
    assert yaml.safe_load(text)["output_dir"] == f"runs/methods/{name}"


@pytest.mark.parametrize("name", known_terms())
def test_a_terms_recipe_is_the_common_one_with_that_term(name: str):
    common = "recipes/multi_turn.yaml" if name in WITH_TOOLS else "recipes/quickstart.yaml"
    recipe, base = (yaml.safe_load(file.read_text()) for file in (RECIPES[name], ROOT / common))
    assert find_term(name) in [type(link.term) for link in build_chain(recipe["entropy_terms"]).links]
    shared = base.keys() - OWN - ({"max_steps"} if name in STEPS_OF_ITS_OWN else set())
    assert {key: recipe.get(key) for key in shared} == {key: base[key] for key in shared}


@pytest.mark.parametrize("name", known_terms())
def test_a_term_has_its_row_and_the_row_its_recipe(name: str):
    start = f"| [`{name}`](../recipes/methods/{name}.yaml) | "
    assert sum(line.startswith(start) for line in (ROOT / "docs/methods.md").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_three_steps(name: str, tmp_path: Path):
    model = ROOT / str(yaml.safe_load(RECIPES[name].read_text())["model_name_or_path"])
    if model.parent.name == "models" and not model.is_dir():
        pytest.skip(f"{model} is made by `python -m hclm_rl.testbed.hidden_number_policy --out models/hidden_number`")
    short = ["--output_dir", str(tmp_path), "--max_steps", "3", "--eval_samples", "0", "--logging_steps", "1"]
    line = ["--config", str(RECIPES[name]), *short, *SHORTER.get(name, []), "--no_save_final", "--use_cpu", "true"]
    assert main("grpo", line) == 0
    assert (tmp_path / "log.jsonl").read_text().count("\n") >= 3
