import subprocess
import sys

import pytest

import hclm_rl


def test_all_public_names_are_there_and_no_others():
    assert sorted(hclm_rl.__all__) == sorted(name for names in hclm_rl._HOMES.values() for name in names)
    for name in hclm_rl.__all__:
        assert getattr(hclm_rl, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'GRPOTrainr'"):
        _ = hclm_rl.GRPOTrainr  # type: ignore[attr-defined]


def test_the_command_line_starts_without_torch():
    look = "import sys; import hclm_rl.cli; sys.exit('torch' in sys.modules or 'trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look]).returncode == 0
