import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from pathlib import Path

import pytest
import torch

from .tiny import save_tiny_policy

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a saved policy that trains in milliseconds."""
    return save_tiny_policy(Path(tmp_path_factory.mktemp("policy")))
