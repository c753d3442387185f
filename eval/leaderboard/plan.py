"""Which runs a leaderboard has: entries from recipes and eval/leaderboard.yaml, their grids, folders and settings."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml

from hclm_rl.recipe.config import build_chain, find_term, known_terms
from hclm_rl.recipe.written_out import as_recipe
from hclm_rl.responses.names import nearest_first
from hclm_rl.watch.report.runs import SUMMARY_NAME

from .statistics import area_over_log_k, pass_curve

BEFORE = "before training"  # the entry that is only measured
DEFAULT = "default"  # the point at the recipe's values
POINT = ", "  # between an entry and its point in the name of a row
KEYS = {
    *("recipes", "seeds", "grid_seeds", "splits", "samples", "pass_ks", "reference", "base", "tasks", "settings"),
    *("entries", "stops_early", "coef_factors", "share_factors", "grids", "also"),
}
# TRL's settings of the ratio to the policy that sampled, which is 1 with one update a rollout
CLIPPING = {"epsilon", "epsilon_high", "delta"}
# of a method's own recipe; how a run is measured and where it is written is the board's
POWER = "power"  # of an entry that is not trained: moves and blocks of power sampling
NOT_THE_METHODS = {"task", "task_kwargs", "model_name_or_path", "output_dir", "seed", "eval_samples", "eval_batch"}
NOT_THE_METHODS |= {POWER}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, or a measurement of the policy before any."""

    folder: Path
    entry: str
    settings: dict  # all that decides the result, the terms with all their hyper-parameters; as JSON gives it back
    recipe: dict  # the same as a recipe, and where it writes
    temperatures: tuple[float, ...] = ()  # at which it is measured beside its own

    @property
    def power(self) -> dict | None:
        """How the start's texts are sharpened, of an entry that trains nothing."""
        return self.settings.get(POWER)

    @property
    def is_trained(self) -> bool:
        return self.entry != BEFORE and self.power is None


def resolved(settings: dict) -> dict:
    """The terms with all their hyper-parameters, all as JSON gives it back."""
    links = build_chain(settings.get("entropy_terms")).links
    return json.loads(json.dumps({**settings, "entropy_terms": as_recipe(list(links))}))


def summary_of(run: Run) -> dict | None:
    """Its summary, None where it is not finished; a sentence if that is of other settings."""
    path = run.folder / SUMMARY_NAME
    if not path.is_file():
        return None
    summary = json.loads(path.read_text())
    was = summary["settings"]
    if was != run.settings:
        with contextlib.suppress(ValueError):  # of a hyper-parameter that is no more
            was = resolved(was)  # one that is new has the default, which changes nothing
    if was != run.settings:
        keys = sorted(key for key in was.keys() | run.settings.keys() if was.get(key) != run.settings.get(key))
        changes = ", ".join(f"{key} {was.get(key)!r} -> {run.settings.get(key)!r}" for key in keys)
        raise ValueError(
            f"{run.folder} was made with other settings ({changes}): move it away, or choose another --out"
        )
    return summary


def is_finished(run: Run) -> bool:
    return summary_of(run) is not None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An entry at one point of its grid."""

    board: "Board"
    entry: str
    point: str
    own: dict  # what it sets beside the board's layers
    changes: dict  # against the recipe's values

    @property
    def name(self) -> str:
        return self.entry if self.point == DEFAULT else f"{self.entry}{POINT}{self.point}"

    @property
    def folder(self) -> Path:
        return self.board.folder / re.sub(r"[^\w.=,-]+", "_", self.entry) / self.point

    def run(self, seed: int, split: str) -> Run:
        board = self.board
        kwargs = {**board.layers.get("task_kwargs", {}), **board.splits[split]}
        recipe = {
            **{key: value for key, value in self.own.items() if key not in NOT_THE_METHODS},
            **board.layers,
            "task_kwargs": kwargs,
            "eval_samples": board.samples,
            "seed": seed,
        }
        if self.entry in (early := board.written.get("stops_early") or {}):
            recipe["max_steps"] = min(recipe["max_steps"], early[self.entry])
        folder = self.folder / f"seed-{seed}"
        quiet = {"output_dir": str(folder), "save_final": False, "save_strategy": "no", "disable_tqdm": True}
        return Run(
            folder=folder,
            entry=self.entry,
            settings=resolved({**recipe, **{key: self.own[key] for key in {POWER} & self.own.keys()}}),
            recipe={**recipe, **quiet},
            temperatures=board.temperatures if split == "report" else (),
        )

    def summaries(self, seeds: Sequence[int], split: str) -> dict[int, dict]:
        """Seed -> summary of its finished runs."""
        found = {seed: summary_of(self.run(seed, split)) for seed in seeds}
        return {seed: summary for seed, summary in found.items() if summary is not None}

    def brings(self) -> dict:
        """The settings besides terms that its recipe has and the board does not."""
        board = self.board.layers.keys() | NOT_THE_METHODS | {"entropy_terms", "save_strategy", "disable_tqdm"}
        return {key: value for key, value in self.own.items() if key not in board}

    def needs_several_updates(self) -> bool:
        """Whether with one update a rollout it is plain GRPO, though it sets something."""
        links, brought = build_chain(self.own.get("entropy_terms")).links, self.brings().keys()
        return bool(links or brought) and brought <= CLIPPING and all(link.term.inert_on_policy for link in links)


@dataclass(frozen=True, kw_only=True)
class Entry:
    name: str
    default: Candidate
    grid: tuple[Candidate, ...] = ()  # empty: none
    also: tuple[Candidate, ...] = ()  # trained and shown beside the default, chosen or not

    @property
    def shown(self) -> tuple[Candidate, ...]:
        return (self.default, *self.also)


@dataclass(frozen=True, kw_only=True)
class Board:
    """One task in one setting."""

    task: str
    setting: str
    folder: Path
    layers: dict  # base, task and setting, the later over the earlier
    without: tuple[str, ...]  # entries that cannot run on the task
    entries_of_task: dict[str, dict]  # in place of the file's and the recipes'
    seeds: tuple[int, ...]
    grid_seeds: tuple[int, ...]
    splits: dict[str, dict]
    samples: int
    pass_ks: tuple[int, ...]
    reference: str
    written: dict  # the file
    only: tuple[str, ...] | None
    temperatures: tuple[float, ...] = ()  # at which new runs are measured beside the training temperature

    @classmethod
    def read(
        cls,
        written: Mapping,
        task: str | None = None,
        setting: str | None = None,
        *,
        out: Path,
        only: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        temperatures: Sequence[float] = (),
    ) -> "Board":
        """The board of a file's task and setting, the first of each unless named."""
        if unknown := written.keys() - KEYS:
            raise ValueError(f"unknown key '{min(unknown)}'; known are {', '.join(sorted(KEYS))}")
        task, setting = task or next(iter(written["tasks"])), setting or next(iter(written["settings"]))
        for name, kind in ((task, "tasks"), (setting, "settings")):
            if name not in written[kind]:
                raise ValueError(f"no '{name}' among {kind}: {', '.join(nearest_first(name, written[kind]))}")
        layers = {**written["base"], **written["tasks"][task], **written["settings"][setting]}
        without, entries_of_task = tuple(layers.pop("without", ())), layers.pop("entries", {})
        seeds = tuple(seeds or written["seeds"])
        if both := set(seeds) & set(written["grid_seeds"]):
            raise ValueError(f"seeds and grid_seeds must differ, both have {sorted(both)}")
        if temperatures and min(temperatures) <= 0:
            raise ValueError(f"temperatures must be above 0, got {min(temperatures)}")
        return cls(
            task=task,
            setting=setting,
            folder=out / task / setting,
            layers=layers if steps is None else {**layers, "max_steps": steps},
            without=without,
            entries_of_task=entries_of_task,
            seeds=seeds,
            grid_seeds=tuple(written["grid_seeds"]),
            splits=written["splits"],
            samples=written["samples"],
            pass_ks=tuple(written["pass_ks"]),
            reference=written["reference"],
            written=dict(written),
            only=tuple(only) if only else None,
            temperatures=tuple(temperatures),
        )

    @property
    def trained_at(self) -> float:
        """The sampling temperature of training; TRL's default where the board does not name one."""
        return self.layers.get("temperature", 1.0)

    @property
    def is_on_policy(self) -> bool:
        # one optimiser step a rollout; per-step accumulation does not make it off-policy
        accumulated = self.layers.get("gradient_accumulation_steps", 1)
        updates = self.layers.get("steps_per_generation", accumulated) / accumulated
        return updates <= 1 and self.layers.get("num_iterations", 1) == 1

    @cached_property
    def known(self) -> dict[str, dict]:
        """Entry -> what it sets: reference, entries of file and task, recipes, remaining terms, in this order."""
        found = {self.reference: {}, **(self.written.get("entries") or {}), **self.entries_of_task}
        for recipe in sorted(Path(self.written["recipes"]).glob("*.yaml")):
            found.setdefault(recipe.stem, yaml.safe_load(recipe.read_text()))
        for name in known_terms():
            if not find_term(name).is_diagnostic:
                found.setdefault(name, {"entropy_terms": [name]})
        return {name: own for name, own in found.items() if not _only_observes(name, own)}

    def left_out(self) -> list[str]:
        """The entries that do nothing in this setting: methods of several updates a rollout, on-policy."""
        if not self.is_on_policy:
            return []
        found = [
            Candidate(board=self, entry=name, point=DEFAULT, own=own, changes={}) for name, own in self.known.items()
        ]
        return [each.entry for each in found if each.needs_several_updates()]

    def entries(self) -> list[Entry]:
        """The policy before training and the reference first."""
        named = [name.partition(POINT)[0] for name in self.only or ()]
        for name in (*named, *(self.written.get("also") or {})):
            if name not in self.known:
                raise ValueError(f"no entry '{name}': {', '.join(nearest_first(name, self.known))}")
        wanted = {self.reference, *(named or self.known)}
        entries = [self._entry(name, own) for name, own in self.known.items() if name in wanted]
        points = [each.name for entry in entries for each in entry.also]
        for name in self.only or ():
            if POINT in name and name not in points:
                there = ", ".join(map(repr, nearest_first(name, points))) or "it has none"
                raise ValueError(f"no point '{name}' under also: {there}")
        without = {*self.left_out(), *self.without}
        before = Candidate(board=self, entry=BEFORE, point=DEFAULT, own={}, changes={})
        return [Entry(name=BEFORE, default=before), *(entry for entry in entries if entry.name not in without)]

    def is_wanted(self, candidate: Candidate) -> bool:
        """Whether it is trained: `only` names entries, with all their points, or single points as on the page."""
        always = candidate.entry in (BEFORE, self.reference)
        return always or self.only is None or bool({candidate.entry, candidate.name} & {*self.only})

    def _entry(self, name: str, own: dict) -> Entry:
        default = Candidate(board=self, entry=name, point=DEFAULT, own=own, changes={})
        if name == self.reference:
            return Entry(name=name, default=default)

        def at(change: dict) -> Candidate:
            point = Candidate(board=self, entry=name, point=slug(change), own=changed(own, change), changes=change)
            return default if point.run(0, "choose").settings == default.run(0, "choose").settings else point

        also = (self.written.get("also") or {}).get(name, ())
        return Entry(
            name=name, default=default, grid=tuple(map(at, self._changes(name, own))), also=tuple(map(at, also))
        )

    def _changes(self, name: str, own: dict) -> list[dict]:
        """The points of an entry's grid; none for a coefficient that is a schedule and has no grid in the file."""
        factors = self.written["coef_factors"]
        changes = (self.written.get("grids") or {}).get(name)
        if changes is not None:
            if len(changes) != len(factors):
                raise ValueError(f"the grid of {name} must have as many points as coef_factors, got {len(changes)}")
            return changes
        links = build_chain(own.get("entropy_terms")).links
        coef = as_recipe(links[0].coef) if links else None
        if not isinstance(coef, float | int):
            return []
        if links[0].term.default_coef == coef == 1:
            factors = self.written["share_factors"]
        return [{"coef": float(f"{factor * coef:.3g}")} for factor in factors]

    def has_runs(self) -> bool:
        """Whether there is anything to report: a finished run of these seeds at a recipe's values."""
        return any(entry.default.summaries(self.seeds, "report") for entry in self.entries())


def _only_observes(name: str, own: dict) -> bool:
    try:
        links = build_chain(own.get("entropy_terms")).links
    except ValueError as error:
        raise ValueError(f"entry {name}: {error}") from error
    return bool(links) and all(link.term.is_diagnostic for link in links)


def changed(own: dict, change: dict) -> dict:
    """The entry with a point's values: hyper-parameters of its first term, or settings where it has no terms."""
    if not own.get("entropy_terms"):
        return {**own, **change}
    first, *others = own["entropy_terms"]
    [(term, given)] = ({first: {}} if isinstance(first, str) else first).items()
    return {**own, "entropy_terms": [{term: {**(given or {}), **change}}, *others]}


def slug(change: dict) -> str:
    """A folder's name: "ratio=0.02,lower=0.5"; of a schedule its parts."""

    def parts(values: Mapping, prefix: str = "") -> Iterator[str]:
        for key, value in values.items():
            if isinstance(value, Mapping):
                yield from parts(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}={value}"

    return re.sub(r"[^\w.=,-]+", "_", ",".join(parts(change))) or DEFAULT


def point_scores(entry: Entry, board: Board) -> dict[str, float | None]:
    """Point -> area under pass@k on the validation split, mean over seeds and prompts; None where a run is missing."""
    scores: dict[str, float | None] = {}
    for each in entry.grid:
        summaries = each.summaries(board.grid_seeds, "choose")
        scores[each.point] = None
        if len(summaries) == len(board.grid_seeds):
            correct = np.array([summary["per_prompt"]["correct"] for summary in summaries.values()])
            curve = pass_curve(correct, board.samples, board.pass_ks)
            scores[each.point] = float(area_over_log_k(curve, board.pass_ks).mean())
    return scores


def chosen(entry: Entry, board: Board) -> Candidate | None:
    """The point with the highest score, the earlier of a tie; None unless all runs of the grid are there."""
    scores = point_scores(entry, board)
    known = [score for score in scores.values() if score is not None]
    if not known or len(known) < len(scores):
        return None
    return next(each for each in entry.grid if scores[each.point] == max(known))
