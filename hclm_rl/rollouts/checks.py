"""What a rollout gave back, before TRL goes on with it: a mistake is one sentence with the rollout and the response."""

import math
from collections.abc import Mapping, Sequence

from .strategy import Asked, Response


def checked(name: str, given: object, asked: Asked, words: int) -> list[Response]:
    """As many responses as are due, each whole; `words`: in the model's vocabulary.

    Refuses another number of them, what is no Response, and unlike columns.
    """
    due = len(asked.prompts) * asked.responses
    if not isinstance(given, Sequence) or not all(isinstance(each, Response) for each in given):
        kinds = {type(each).__name__ for each in given} if isinstance(given, Sequence) else {type(given).__name__}
        raise ValueError(f"the rollout '{name}' must return a list of Response, got {', '.join(sorted(kinds))}")
    responses: list[Response] = list(given)
    if len(responses) != due:
        raise ValueError(
            f"the rollout '{name}' returned {len(responses)} responses; it must return {due}, {asked.responses} to "
            f"each of {len(asked.prompts)} prompts: {_off(len(responses), due)}"
        )
    for number, response in enumerate(responses):
        if fault := _fault(response, asked.longest, words):
            raise ValueError(f"the rollout '{name}', response {number} of {due} (counted from 0): {fault}")
        if response.columns.keys() != responses[0].columns.keys():
            raise ValueError(
                f"the rollout '{name}', response {number} of {due} (counted from 0): has the columns "
                f"{sorted(response.columns)} and response 0 has {sorted(responses[0].columns)}; all need the same"
            )
    return responses


def _off(came: int, due: int) -> str:
    """Where it goes wrong."""
    return f"response {came} is the first that is missing" if came < due else f"response {due} is the first too many"


def _no_list(response: Response) -> str | None:
    """What is no list, such as a tensor."""
    for name in ("ids", "logps", "is_trained", "prompt"):
        value = getattr(response, name)
        if not isinstance(value, Sequence | None) or isinstance(value, str):
            return f"{name} must be a list, got {type(value).__name__}"
    if not isinstance(response.columns, Mapping):
        return f"columns must be a mapping, got {type(response.columns).__name__}"
    return None


def _fault(response: Response, longest: int, words: int) -> str | None:
    """What is wrong with a response."""
    ids, logps = response.ids, response.logps
    if kind := _no_list(response):
        return kind
    if not ids:
        return "has no token; at least one is needed"
    if len(ids) > longest:
        return f"has {len(ids)} tokens; at most max_completion_length, {longest}, are allowed"
    for what, some in (("", ids), ("prompt: ", response.prompt if response.prompt is not None else [0])):
        if not some:
            return f"{what}has no token; at least one is needed"
        wrong = next((each for each in some if type(each) is not int or not 0 <= each < words), None)
        if wrong is not None:
            return f"{what}token {wrong!r:.40} is no id of the vocabulary; ids are ints from 0 to {words - 1}"
    if logps is None or (not logps and ids):
        return f"has no log-probs; one for each of its {len(ids)} tokens is needed"
    if len(logps) != len(ids):
        return f"has {len(logps)} log-probs for {len(ids)} tokens; one for each is needed"
    mask = response.is_trained
    if mask is not None and len(mask) != len(ids):
        return f"is_trained has {len(mask)} values for {len(ids)} tokens; one for each is needed"
    for t, logp in enumerate(logps):
        if not (isinstance(logp, (int, float)) and math.isfinite(logp) and logp <= 1e-4):  # rounding of log 1
            return f"the log-prob of token {t} is {logp!r:.40}; finite numbers of at most 0 are allowed"
    return None
