"""A reward function that may not lie: an infinity, or what is no number, stops the run with its name."""

import math
from collections.abc import Iterable
from typing import Any


def checked(reward_func: Any, name: str, is_async: bool) -> Any:
    """The reward function, which stops the run where it returns what is no number; None and NaN mean 'not scored'."""

    async def checked_async(*args: Any, **kwargs: Any) -> list:
        return numbers(await reward_func(*args, **kwargs), name)

    def checked_sync(*args: Any, **kwargs: Any) -> list:
        return numbers(reward_func(*args, **kwargs), name)

    return checked_async if is_async else checked_sync


def numbers(given: object, name: str) -> list[float | None]:
    """What a reward function returned, a finite number or None a response.

    Refuses what is no list with one of them a response.
    """
    if not isinstance(given, Iterable):
        raise ValueError(f"the reward function '{name}' returned {given!r}; return a list of numbers, one a response")
    rewards = list(given)  # it may be a generator
    return [number(reward, name, f"response {i} of {len(rewards)}") for i, reward in enumerate(rewards)]


def number(reward: Any, name: str, which: str) -> float | None:
    """The reward as a float; None where it is NaN, as TRL has it. Refuses what is no number, and infinity."""
    if reward is None:
        return None
    try:
        value = math.inf if isinstance(reward, str | bytes) else float(reward)
    except (TypeError, ValueError, RuntimeError):  # the last from a tensor of several values
        value = math.inf
    if math.isinf(value):
        raise ValueError(
            f"the reward function '{name}' returned {reward!r:.60} for {which}; return a finite number, or None for a "
            "response that it does not score"
        )
    return None if math.isnan(value) else value
