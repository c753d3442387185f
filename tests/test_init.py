import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hclm_rl
from hclm_rl import known_terms, terms
from hclm_rl.recipe.config import find_term
from hclm_rl.types import last_layer


def test_all_public_names_are_there_and_no_others():
    assert len(hclm_rl.__all__) == 30
    assert dir(hclm_rl) == sorted(hclm_rl.__all__)
    for name in hclm_rl.__all__:
        assert getattr(hclm_rl, name).__name__ == name
    with pytest.raises(AttributeError, match="GRPOTrainr"):
        _ = hclm_rl.GRPOTrainr  # type: ignore[attr-defined]


def test_every_term_has_its_line_in_the_stub():
    lines = (Path(terms.__path__[0]) / "__init__.pyi").read_text().splitlines()
    wanted = [f"from .{name} import {find_term(name).__name__} as {find_term(name).__name__}" for name in known_terms()]
    for line in wanted:
        assert line in lines, f"add this line to hclm_rl/terms/__init__.pyi: {line}"
    assert lines == wanted, (
        f"hclm_rl/terms/__init__.pyi has one line a term, sorted; take out {set(lines) - set(wanted)}"
    )


def test_terms_are_imported_by_name():
    from hclm_rl.terms import ClipCov, clip_cov  # the class, and the module as before

    assert ClipCov is clip_cov.ClipCov is find_term("clip_cov")
    assert dir(terms) == sorted(find_term(name).__name__ for name in known_terms())
    with pytest.raises(AttributeError, match="ClipCvo"):
        _ = terms.ClipCvo  # type: ignore[attr-defined]


def test_the_command_line_starts_without_torch():
    look = "import sys; import hclm_rl.commands.cli, hclm_rl.terms; sys.exit(bool({'torch', 'trl'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", look]).returncode == 0


def test_the_last_layer_is_kept_and_no_other():
    states = torch.arange(6.0).view(1, 2, 3)
    hidden = last_layer(lambda: states)
    assert hidden() is states and hidden(-1) is states
    with pytest.raises(ValueError, match=r"only layer -1, .* got layer 3"):
        hidden(3)
