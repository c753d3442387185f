"""`hclm-rl eval --counts BASE TRAINED`: pass@k, support and verdict from counts of right responses alone."""

from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float

from hclm_rl.responses.outcomes import pass_at_k

from .compare import budgets
from .counts import Counts
from .statistics import Estimate, Support, simultaneous_band, support, without_nan
from .verdict import Verdict, judge_curves


@dataclass(frozen=True, kw_only=True)
class CountedResult:
    """What the table, the page and the JSON show of two files of counts, paired by problem."""

    base: Counts
    trained: Counts
    most: int  # the largest k: the fewest responses that a problem has
    curves: dict[str, list[Estimate]]  # "base", "trained", "change" -> pass@k for k in budgets(most), with its band
    support: Support | str  # or why there is none
    verdict: Verdict
    notes: list[str]

    @property
    def moved(self) -> dict[str, list[str]]:
        """The problems that only one of the two ever answers right."""
        if isinstance(self.support, str):
            return {}
        before, after = self.base.c > 0, self.trained.c > 0
        names = np.array(self.base.problems, dtype=object)
        return {"lost": names[before & ~after].tolist(), "gained": names[after & ~before].tolist()}

    def as_json(self) -> dict:
        """Plain numbers, lists and text; what is not defined is null."""
        ratios = ("retention", "discovery", "dynamic", "net_change", "mcnemar", "detectable")
        found = {
            "model": self.trained.name,
            "base": self.base.name,
            "problems": len(self.base.problems),
            "most": self.most,
            "notes": self.notes,
            "estimates": {
                "model" if role == "trained" else role: {
                    f"pass@{k}": asdict(value) for k, value in zip(budgets(self.most), curve, strict=True)
                }
                for role, curve in self.curves.items()
            },
            "verdict": {"of": "answers", **asdict(self.verdict)},
        }
        if isinstance(self.support, Support):
            found["support"] = asdict(self.support) | {name: getattr(self.support, name) for name in ratios}
            found["support"] |= self.moved
        return {key: without_nan(value) for key, value in found.items()}


def curve_of(counts: Counts, most: int) -> Float[np.ndarray, "K P"]:
    """pass@k of each problem, unbiased from all its responses."""
    rows = zip(counts.n.tolist(), counts.c.tolist(), strict=True)
    return np.array([[pass_at_k(n, c, k) for k in budgets(most)] for n, c in rows]).T


def banded(values: Float[np.ndarray, "K P"], floor: float, seed: int) -> list[Estimate]:
    """Means with their simultaneous band, cut to what is possible."""
    bounds = (np.clip(each, floor, 1.0) for each in simultaneous_band(values, seed=seed))
    means = values.mean(axis=1)
    return [Estimate(mean=float(m), lower=float(a), upper=float(b)) for m, a, b in zip(means, *bounds, strict=True)]


def compare_counts(base: Counts, trained: Counts, *, seed: int = 0) -> CountedResult:
    """Of the problems that both files have. Refuses files that have none in common."""
    known = set(trained.problems)
    common, notes = tuple(problem for problem in base.problems if problem in known), []
    if not common:
        raise ValueError(
            f"'{base.name}' and '{trained.name}' have no problem in common: their first ones are "
            f"'{base.problems[0][:60]}' and '{trained.problems[0][:60]}'"
        )
    for each in (base, trained):
        if extra := len(each.problems) - len(common):
            notes.append(
                f"{extra} of {len(each.problems)} problems of '{each.name}' are left out: the other file lacks them."
            )
    base, trained = base.of(common), trained.of(common)
    most = int(min(base.n.min(), trained.n.min()))
    drawn = np.unique(np.concatenate([base.n, trained.n]))
    if len(drawn) > 1:
        found: Support | str = f"the numbers of responses differ, from {drawn[0]} to {drawn[-1]}"
        notes.append(
            f"Problems have {drawn[0]} to {drawn[-1]} responses: pass@k ends at {most}, support is not judged."
        )
    else:
        found = support(base.c > 0, trained.c > 0, samples=most)
    before, after = curve_of(base, most), curve_of(trained, most)
    return CountedResult(
        base=base,
        trained=trained,
        most=most,
        curves={
            "base": banded(before, 0.0, seed),
            "trained": banded(after, 0.0, seed),
            "change": banded(after - before, -1.0, seed),
        },
        support=found,
        verdict=judge_curves(before, after, most=most, support=found, seed=seed),
        notes=notes,
    )
