import subprocess
import sys

import pytest
import torch

import hclm_rl
from hclm_rl.types import last_layer


def test_all_public_names_are_there_and_no_others():
    assert len(hclm_rl.__all__) == 25
    assert dir(hclm_rl) == sorted(hclm_rl.__all__)
    for name in hclm_rl.__all__:
        assert getattr(hclm_rl, name).__name__ == name
    with pytest.raises(AttributeError, match="GRPOTrainr"):
        _ = hclm_rl.GRPOTrainr  # type: ignore[attr-defined]


def test_the_command_line_starts_without_torch():
    look = "import sys; import hclm_rl.commands.cli; sys.exit('torch' in sys.modules or 'trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look]).returncode == 0


def test_the_last_layer_is_kept_and_no_other():
    states = torch.arange(6.0).view(1, 2, 3)
    hidden = last_layer(states)
    assert hidden() is states and hidden(-1) is states
    with pytest.raises(ValueError, match=r"only layer -1, .* got layer 3"):
        hidden(3)
