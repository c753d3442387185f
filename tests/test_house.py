"""The house: what each room may import, how long a module may be, and where TRL's private names may stand."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "hclm_rl"
# what our trainers override or read of TRL's and transformers' trainers that is not public
PRIVATE = re.compile(
    r"\b(_compute_loss|_get_per_token_logps_and_entropies|_generate_and_score_completions|_calculate_rewards|"
    r"_save_checkpoint|_push_from_checkpoint|_load_optimizer_and_scheduler|_get_output_dir|_metrics|"
    r"_get_train_sampler|_buffered_inputs|_current_train_step_time|_internal_call)\b"
)

REASON = re.compile(r"# *(?!noqa|type:|pyright:|fmt:)\w+.* \w+")  # words, no word to a tool
LONGEST = 300  # lines of a module


def test_no_module_is_longer_than_can_be_read_at_once():
    lines = {path.relative_to(HOUSE).as_posix(): len(path.read_text().splitlines()) for path in HOUSE.rglob("*.py")}
    assert not {name: count for name, count in lines.items() if count > LONGEST}


def test_imports_go_down_and_in_no_circle():
    """The contracts stand in pyproject.toml."""
    linter = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    run = subprocess.run(linter, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 kept, 0 broken" in run.stdout


def test_trls_private_names_stand_in_the_seam_alone():
    found = {path.relative_to(HOUSE).parts[0] for path in HOUSE.rglob("*.py") if PRIVATE.search(path.read_text())}
    # verl has a _save_checkpoint too; that integrations/ needs no TRL is tested in tests/integrations/test_units.py
    assert found - {"integrations"} == {"trainer"}


def long_functions_without_a_reason(source: str) -> list[str]:
    """Names of those over 40 lines that have no comment on the line of their `def` or above it."""
    lines = source.splitlines()
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= 40
        and not any(REASON.search(line) for line in lines[max(node.lineno - 2, 0) : node.lineno])
    ]


def test_a_function_over_40_lines_says_why():
    forty, one_more = "    x = 1\n" * 39, "    x = 1\n" * 40
    assert not long_functions_without_a_reason(f"def f():\n{forty}")
    assert long_functions_without_a_reason(f"def f():\n{one_more}") == ["f"]
    assert long_functions_without_a_reason(f"def f():  # noqa: C901\n{one_more}") == ["f"]
    assert not long_functions_without_a_reason(f"def f():  # long: one table\n{one_more}")
    found = {
        str(path.relative_to(HOUSE)): long_functions_without_a_reason(path.read_text()) for path in HOUSE.rglob("*.py")
    }
    assert not {name: of for name, of in found.items() if of}
