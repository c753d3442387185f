"""What else a run logs that belongs to a collapse: causes beside the verdict, which they never change."""

from collections.abc import Mapping
from dataclasses import dataclass

from .history import State

SMOOTHED = ("distinct", "distinct_right", "live", "predicted_change")  # <link>/<sign>
TRUNCATED = ("completions/clipped_ratio", "response_length/clip_ratio")  # TRL's and verl's
KL = ("kl", "actor/kl_loss", "actor/ppo_kl")
CLIPPED = ("clip_ratio/region_mean", "actor/pg_clipfrac")

ONE_VALUE = frozenset((*KL, *CLIPPED, *TRUNCATED))


def number(value: object) -> float | None:
    """A finite number, also one that was logged as text; None for anything else."""
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return found if abs(found) < float("inf") else None


@dataclass(frozen=True, kw_only=True)
class Signs:
    """The bounds from which on a sign is told."""

    least_distinct: float = 0.5  # share of its start
    least_live: float = 0.5  # share of its start
    most_clipped: float = 0.3  # of the tokens
    most_truncated: float = 0.5  # of the responses
    most_kl: float = 1.0  # shares of the entropy that the KL to the reference model may have
    least_pass: float = 0.05  # fall of pass@k from its first value, absolute
    soon: int = 120  # optimiser steps within which a predicted flow is told
    memory: int = 10  # optimiser steps over which a sign is smoothed

    def update(self, logs: Mapping[str, object], steps: int, spare: float, state: State) -> tuple[str, ...]:
        """Sentences; keeps in `state` what it needs.

        `spare`: nats between the entropy and collapse; infinite before there is a start, from which shares are taken.
        """
        told = []
        keep = (1 - 1 / self.memory) ** steps
        entropy, widest = number(logs.get("entropy")) or 0.0, widest_pass(logs)
        for name in logs:
            is_smoothed = "/" in name and name.rpartition("/")[2] in SMOOTHED
            if not (is_smoothed or name == widest or name in ONE_VALUE) or (value := number(logs[name])) is None:
                continue
            if is_smoothed:
                mean = state[f"mean {name}"] = keep * state.get(f"mean {name}", value) + (1 - keep) * value
                if spare < float("inf"):
                    told += self.smoothed(name, mean, state.setdefault(f"first {name}", mean), spare)
            elif name in CLIPPED and value > self.most_clipped:
                told.append(f"{100 * value:.0f} % of the tokens are clipped")
            elif name in TRUNCATED and value > self.most_truncated:
                told.append(f"{100 * value:.0f} % of the responses are cut off")
            elif name in KL and entropy and value > self.most_kl * entropy:
                told.append(f"{name}: {value:.2g} nats, {value / entropy:.1f} times the entropy")
            elif name == widest and value < state.setdefault(f"first {name}", value) - self.least_pass:
                told.append(f"{name}: {value:.2g}, {state[f'first {name}']:.2g} at first")
        return tuple(told)

    def smoothed(self, name: str, mean: float, first: float, spare: float) -> list[str]:
        """What a running mean says of the metric, beside its first value; [] where that is nothing."""
        noun = name.rpartition("/")[2]
        if noun == "live" and mean < self.least_live * first:
            return [
                f"{name}: {100 * mean:.0f} % of the directions have a variance to speak of, {100 * first:.0f} at first"
            ]
        if noun == "predicted_change":
            left = spare / -mean if mean < 0 else float("inf")
            return [f"{name}: {mean:.1e} nats a step, which is a collapse in {left:.0f} steps"] * (left < self.soon)
        if noun.startswith("distinct") and mean < self.least_distinct * first:
            what = (
                "right answers differ in a group" if noun == "distinct_right" else "of the responses in a group differ"
            )
            return [f"{name}: {mean:.2g} {what}, {first:.2g} at the start"]
        return []


def widest_pass(logs: Mapping[str, object]) -> str | None:
    """The name of the pass@k of the largest k, as evaluation logs it; None where there is none."""
    found = {int(name.rpartition("@")[2]): name for name in logs if "pass@" in name and name[-1].isdecimal()}
    return found[max(found)] if found else None
