"""Rollouts of a user's own, each with one fault or one habit."""

from dataclasses import dataclass, replace
from typing import Literal

from hclm_rl.rollouts import Asked, Response, RolloutStrategy

SEEN: list[dict] = []


@dataclass(frozen=True, kw_only=True)
class Plain(RolloutStrategy):
    """Plain sampling; keeps what it was asked and what it gave."""

    fault: Literal["", "few", "long", "no log-probs", "nan", "interrupt", "second"] = ""
    at: int = 0  # optimiser step of the fault

    def check(self, responses: int) -> None:
        if responses == 3:
            raise ValueError("Plain: three is too few")

    def __call__(self, asked: Asked) -> list[Response]:
        roots = asked.sampler.begin(asked.prompts)
        rows = [root.fork(0, asked.stream(p, i)) for p, root in enumerate(roots) for i in range(asked.responses)]
        asked.sampler.extend(rows)
        made = [each.response(marked=i % 2) for i, each in enumerate(rows)]
        SEEN.append({"prompts": asked.prompts, "ids": [list(each.ids) for each in made], "step": asked.step})
        if asked.step < self.at or not self.fault:
            return made
        if self.fault == "interrupt":
            raise KeyboardInterrupt
        if self.fault == "few":
            return made[:-1]
        last = made[-1]
        wrong = {
            "long": replace(last, ids=[2] * 50, logps=[-1.0] * 50),
            "no log-probs": replace(last, logps=None),  # type: ignore[arg-type]
            "nan": replace(last, logps=[float("nan")] * len(last.ids)),
            "second": replace(last, is_trained=[t > 0 for t in range(len(last.ids))]),
        }
        return [*made[:-1], wrong[self.fault]]
