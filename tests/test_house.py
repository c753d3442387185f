"""The house: what each room may import, how long a module may be, and where TRL's private names may stand."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "hclm_rl"
# what our trainers override or read of TRL's and transformers' trainers that is not public
PRIVATE = re.compile(
    r"\b(_compute_loss|_get_per_token_logps_and_entropies|_generate_and_score_completions|_calculate_rewards|"
    r"_save_checkpoint|_push_from_checkpoint|_load_optimizer_and_scheduler|_get_output_dir|_metrics)\b"
)


def test_imports_go_down_and_in_no_circle():
    """The contracts stand in pyproject.toml."""
    linter = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    run = subprocess.run(linter, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 kept, 0 broken" in run.stdout


def test_trls_private_names_stand_in_the_seam_alone():
    found = {path.relative_to(HOUSE).parts[0] for path in HOUSE.rglob("*.py") if PRIVATE.search(path.read_text())}
    assert found == {"trainer"}
