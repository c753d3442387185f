import gc
import importlib.metadata
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from functools import cache
from pathlib import Path

import pytest
import torch

from .tiny import save_tiny_policy

# The files that take longest, first: a worker that got one of them last would be alone with it for half a minute.
LONGEST = [
    "trainer/test_invariance.py",
    "trainer/test_identity.py",
    "commands/test_launch.py",
    "eval/test_leaderboard.py",
    "commands/test_doctor.py",
    "trainer/test_run.py",
    "test_contract.py",
    "test_gradient_flow.py",
    "watch/test_report.py",
]

torch.set_num_threads(1)
# accelerate asks a dozen times a run whether peft is installed, and parses its long description each time
importlib.metadata.metadata = cache(importlib.metadata.metadata)


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_walk() -> None:
    """Takes what the libraries made at their import out of the collector's sight.

    Every training starts with a collection (accelerate's `free_memory`). Over the half million objects of torch and TRL
    it takes twice as long as the two steps of a tiny policy; what is collected is the same, since modules live on.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a saved policy that trains in milliseconds."""
    return save_tiny_policy(Path(tmp_path_factory.mktemp("policy")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))
