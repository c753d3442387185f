"""A reward function that may not lie: NaN and infinity stop the run with its name."""

import functools
import inspect
import math
from typing import Any


def checked(reward_func: Any, name: str) -> Any:
    """The reward function, which stops the run where it returns NaN or an infinity; None still means 'not scored'."""

    def check(rewards: Any) -> Any:
        bad = [i for i, reward in enumerate(rewards) if reward is not None and not math.isfinite(reward)]
        if bad:
            raise ValueError(
                f"the reward function '{name}' returned {rewards[bad[0]]} for response {bad[0]} of {len(rewards)}; "
                "return a finite number, or None for a response that it does not score"
            )
        return rewards

    is_async = inspect.iscoroutinefunction(reward_func) or inspect.iscoroutinefunction(type(reward_func).__call__)
    if is_async:

        @functools.wraps(reward_func)
        async def checked_async(*args: Any, **kwargs: Any) -> Any:
            return check(await reward_func(*args, **kwargs))

        return checked_async

    @functools.wraps(reward_func)
    def checked_sync(*args: Any, **kwargs: Any) -> Any:
        return check(reward_func(*args, **kwargs))

    return checked_sync
