"""What reasoning-gym's scorers say, in the process of responses/limits.py: some evaluate what the model wrote."""

import functools
import json

import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset


@functools.lru_cache(maxsize=4)
def dataset(name: str, kwargs: str) -> ProceduralDataset:
    return reasoning_gym.create_dataset(name, **json.loads(kwargs))


def is_right(name: str, kwargs: str, row: int, answer: str) -> bool:
    """`kwargs` as JSON, so that the process need not make the data set for each answer."""
    found = dataset(name, kwargs)
    try:
        return found.score_answer(answer, found[row]) >= 1  # scores below 1 are for the form, or for being near
    except (MemoryError, RecursionError):
        raise
    except Exception:  # some scorers raise where the answer is not of their form
        return False
