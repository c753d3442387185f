"""The documentation's examples run as they stand."""

import math
import re
import sys
from pathlib import Path

import pytest
import yaml

from hclm_rl.commands.cli import find_method, known_methods
from hclm_rl.recipe.config import build_chain

from .term_batches import card_step, first_stage, second_stage
from .tiny import make

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example files of docs/extending.md, in the folder that the run is started from."""
    for source in blocks("extending.md", "python"):
        (tmp_path / source.splitlines()[0].removeprefix("# ").split(",")[0]).write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # find_term adds the folder, as TRL does for rewards
    for module in ("floor", "rare", "surest", "surest_half"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


def test_the_readme_counts_the_terms():
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"(\d+) terms", readme) == [str(len(known_methods()))]


def test_the_smallest_term_is_under_twenty_lines(written: Path):
    assert len((written / "floor.py").read_text().splitlines()) < 20


def test_a_selection_and_an_action_is_a_class_of_fifteen_lines(written: Path):
    lines = (written / "surest.py").read_text().partition("@dataclass")[2].splitlines()
    assert sum(bool(line) for line in lines) <= 15
    [link] = build_chain([{"surest.DropSurest": {"share": 0.5}}]).links
    # entropies 0.3, 0.1, 0.2 and 0.1, 0.4: half of five is two, and both of the least are dropped
    logps = [[-1.0, -1.0, -1.0], [-1.0, -1.0, math.nan]]
    view, batch = card_step(
        mask=[[1, 1, 1], [1, 1, 0]],
        logps=logps,
        old_logps=logps,
        entropy=[[0.3, 0.1, 0.2], [0.1, 0.4, math.nan]],
        advantages=[[1.5, 1.5, 1.5], [-0.5, -0.5, math.nan]],
    )
    advantages = second_stage(link.term, batch, first_stage(link.term, view, {}), {}).advantages
    assert advantages is not None and advantages[batch.mask].tolist() == [1.5, 0.0, 1.5, 0.0, -0.5]


def test_the_recipe_of_the_smallest_term(written: Path, policy: str):
    [recipe] = blocks("extending.md", "yaml")
    terms = yaml.safe_load(recipe)["entropy_terms"]
    trainer = make(policy, written, terms=[*terms, "rare.RareTokens", "surest.DropSurest"])
    trainer.train()
    assert float(trainer.state.log_history[0]["EntropyFloor/coef"]) == 0.01
    assert 0 < float(trainer.state.log_history[0]["RareTokens/affected"]) < 1
    assert 0 < float(trainer.state.log_history[0]["DropSurest/affected"]) < 1


def test_the_rollout_of_a_user(written: Path, policy: str):
    assert len((written / "surest_half.py").read_text().partition("@dataclass")[2].splitlines()) <= 30
    inline = re.search(r"`rollout: (\{.*?\}\})`", (DOCS / "extending.md").read_text())
    assert inline is not None
    for rollout in ("surest_half.SurestHalf", yaml.safe_load(inline[1])):
        trainer = make(policy, written, rollout=rollout)
        trainer.train()
        entry = trainer.state.log_history[0]
        assert 1 <= entry["SurestHalf/prefix"] <= 3  # half of at most six tokens
        # four of eight took over half of another, which was not drawn again
        assert entry["rollout/tokens_returned"] - entry["rollout/tokens_drawn"] == 4 * entry["SurestHalf/prefix"]
        assert (entry["rollout/share_trained"] == 1) == (rollout == "surest_half.SurestHalf")


def test_the_command_line_shows_what_the_hyper_parameter_of_the_full_term_means(written: Path):
    method = find_method("rare.RareTokens")
    assert method.parameters[0] == ("decay", "float", "0.9", "of the running mean, in [0, 1)")
    assert method.docstring.endswith("surprisal -log p of the response tokens.")


@pytest.mark.parametrize("inline", re.findall(r"`(- \w+: \{.*\})`", (DOCS / "extending.md").read_text()))
def test_inline_entries(inline: str):
    assert build_chain(yaml.safe_load(inline)).links
