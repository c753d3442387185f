"""A reward function that may not lie: NaN and infinity stop the run with its name."""

import math
from collections.abc import Iterable
from typing import Any


def checked(reward_func: Any, name: str, is_async: bool) -> Any:
    """The reward function, which stops the run where it returns NaN or an infinity; None still means 'not scored'."""

    def check(given: Iterable[Any]) -> list:
        rewards = list(given)  # it may be a generator
        bad = [i for i, reward in enumerate(rewards) if reward is not None and not math.isfinite(reward)]
        if bad:
            raise ValueError(
                f"the reward function '{name}' returned {rewards[bad[0]]} for response {bad[0]} of {len(rewards)}; "
                "return a finite number, or None for a response that it does not score"
            )
        return rewards

    async def checked_async(*args: Any, **kwargs: Any) -> list:
        return check(await reward_func(*args, **kwargs))

    def checked_sync(*args: Any, **kwargs: Any) -> list:
        return check(reward_func(*args, **kwargs))

    return checked_async if is_async else checked_sync
