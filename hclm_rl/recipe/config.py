"""From names to objects: TRL's configs plus `entropy_terms`, and the recipe's words for terms and coefficients."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import trl

from ..chain.chain import Chain
from ..watch.trace import Trace
from .links import (  # noqa: F401 (whoever has TRL finds all of them here)
    build_chain,
    build_link,
    build_term,
    checked_term,
    find_term,
    known_terms,
)
from .refusals import refuse_two_controls
from .rollout import ROLLOUT_HELP, as_words, build_rollout, refuse_settings, with_its_term
from .trl_range import other_trl
from .written_out import as_recipe

if sentence := other_trl():
    raise ImportError(sentence)

ENTROPY_TERMS_HELP = (
    "Entropy-control terms, from left to right: a list of names, each alone or with its hyper-parameters, "
    '`[{"clip_cov": {"ratio": 0.002}}, {"entropy_bonus": {"coef": 0.01}}]`; in YAML a list, on the command line the '
    "same as JSON. `coef` is the strength (a number or a schedule), `name` the name in logs. A dotted path names a "
    "class of your own. `hclm-rl methods` lists what there is."
)

TRACE_STEPS_HELP = (
    "Optimiser steps, counted from 1, whose tokens go one by one into <output_dir>/trace (see hclm_rl/watch/trace.py)."
)
TRACE_EVERY_HELP = "Every how many optimiser steps the tokens go into <output_dir>/trace; beside trace_steps."
EVAL_PASS_HELP = (
    "Whether evaluation also gives pass@k for k = 1, 2, 4, ... up to num_generations_eval, with 95-percent intervals "
    "over the prompts (`eval_pass@4`, `eval_pass@4/lower`, `eval_pass@4/upper`). Needs the extra `eval`."
)
CHANGED_TERMS_HELP = (
    "Whether to resume from a checkpoint that was written with other entropy terms or other values of theirs; what has "
    "no counterpart there starts afresh."
)
RUN_LOG_HELP = "Whether training writes log.jsonl and run.json into output_dir, from which reports are made."
WATCH_HELP = (
    "Log collapse/state and warn when the entropy goes astray; stop: end training once it has collapsed or explodes."
)
EVAL_THRESHOLD_HELP = "The first reward function's value from which on a response is right, for eval_pass_at_k."


@dataclass
class EntropyFields:
    """What both configs add to TRL's. All are checked when the config is made, before any model is loaded.

    Args:
        entropy_terms (`list` or `str`, *optional*):
            Entropy-control terms, from left to right: each sees the advantages that those before it left. An entry is
            a name (`"clip_cov"`); a name with hyper-parameters (`{"clip_cov": {"ratio": 0.002}}`), among which `coef`
            is the strength (a number, or a schedule such as `{"kind": "linear", "start": 0.01, "end": 0.0}`) and
            `name` the name in logs; or, in Python, a term or a `Link`. A dotted path (`"my_lab.floor.Floor"`) names a
            class of your own. Text is read as JSON, as on the command line:
            `--entropy_terms '[{"clip_cov": {}}, "information_force"]'`. Without any, the run is TRL's bit for bit.
            `hclm-rl methods` lists the names; docs/extending.md has all forms.
        rollout (`str` or `dict`, *optional*):
            Where responses come from in training: a name (`"cure"`), a name with hyper-parameters
            (`{"entropy_fork": {"forks": 3}}`), the same as JSON text, or, in Python, an object. A dotted path
            (`"twice.Twice"`) names a class of your own. Evaluation samples as TRL does; without it, so does training,
            bit for bit. See docs/rollouts.md.
        trace_steps (`list[int]`, *optional*):
            Optimiser steps, counted from 1 as in the log, in which every response token is written down with its
            log-prob, entropy, advantages and what the terms say of it: `[1, 10]` writes
            `<output_dir>/trace/step-00001.parquet` and `step-00010.parquet`. Works without terms and does not change
            training; see docs/report.md.
        trace_every (`int`, *optional*):
            The same for every so many steps: 100 writes steps 100, 200, 300. Both together write either's steps.
        eval_pass_at_k (`bool`, *optional*, defaults to `False`):
            Whether `evaluate()` also gives pass@k: with `num_generations_eval=16` the metrics `eval_pass@1`, `@2`,
            `@4`, `@8` and `@16`, each with `/lower` and `/upper`, the ends of its 95-percent interval over the prompts.
            `metric_for_best_model="eval_pass@16"` keeps the checkpoint of the widest coverage. Needs the extra `eval`
            (`pip install 'hclm-rl[eval]'`); see docs/evaluation.md.
        eval_pass_threshold (`float`, *optional*, defaults to `1.0`):
            Value of the first reward function from which on a response is right: 1.0 for a reward of 0 or 1, 0.5 where
            half the marks will do. Read with `eval_pass_at_k` alone.
        allow_changed_terms (`bool`, *optional*, defaults to `False`):
            Whether to resume from a checkpoint that was written with other entropy terms, or with other values of
            their hyper-parameters or `coef`; without it such a resume is refused and the sentence names what differs.
            What has no counterpart in the checkpoint starts afresh. See docs/reliability.md.
        watch_collapse (`str`, *optional*, defaults to `"warn"`):
            What the detector of entropy collapse does: `"warn"` logs `collapse/state` (docs/words.md) and warns when
            the entropy goes astray, `"stop"` also ends training once it has collapsed or explodes, `"off"` does
            nothing. A `CollapseCallback` of your own takes its place.
        run_log (`bool`, *optional*, defaults to `True`):
            Whether training writes `log.jsonl`, a line a logged step, and `run.json`, what was run, into `output_dir`:
            what `hclm-rl report` and `hclm-rl watch` read. A run that stood there moves into `earlier-1`.
    """

    entropy_terms: list | str | None = field(default=None, metadata={"help": ENTROPY_TERMS_HELP})
    rollout: dict | str | None = field(default=None, metadata={"help": ROLLOUT_HELP})
    trace_steps: list[int] | None = field(default=None, metadata={"help": TRACE_STEPS_HELP})
    trace_every: int | None = field(default=None, metadata={"help": TRACE_EVERY_HELP})
    eval_pass_at_k: bool = field(default=False, metadata={"help": EVAL_PASS_HELP})
    eval_pass_threshold: float = field(default=1.0, metadata={"help": EVAL_THRESHOLD_HELP})
    allow_changed_terms: bool = field(default=False, metadata={"help": CHANGED_TERMS_HELP})
    watch_collapse: Literal["off", "warn", "stop"] = field(default="warn", metadata={"help": WATCH_HELP})
    run_log: bool = field(default=True, metadata={"help": RUN_LOG_HELP})

    def __post_init__(self) -> None:
        self.checked()
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue]  (of the TRL config it is mixed into)

    def checked(self) -> Chain:
        """The chain that the terms make; a ValueError says what is wrong with the fields above."""
        rollout = build_rollout(self.rollout)
        refuse_settings(rollout, self)
        chain = with_its_term(build_chain(self.entropy_terms), rollout)
        Trace(folder=Path(), steps=tuple(self.trace_steps or ()), every=self.trace_every)  # refuses what is no step
        if self.eval_pass_at_k and importlib.util.find_spec("scipy") is None:
            raise ValueError("eval_pass_at_k needs scipy: pip install 'hclm-rl[eval]'")
        return chain

    def to_dict(self) -> dict[str, Any]:
        """As transformers writes it, the terms as a recipe names them."""
        inherited = super().to_dict()  # pyright: ignore[reportAttributeAccessIssue]
        return {**inherited, "entropy_terms": as_recipe(self.entropy_terms), "rollout": as_words(self.rollout)}


@dataclass
class GRPOConfig(EntropyFields, trl.GRPOConfig):
    """TRL's GRPOConfig plus `entropy_terms`, the trace, and pass@k in evaluation.

    The fields of TRL's are as they were: https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig. Those that
    are new (`entropy_terms`, `rollout`, `trace_steps`, `trace_every`, `eval_pass_at_k`, `eval_pass_threshold`,
    `allow_changed_terms`, `watch_collapse`, `run_log`) are described in `EntropyFields`.

    ```python
    >>> GRPOConfig(output_dir="out", entropy_terms=[{"entropy_bonus": {"coef": 0.01}}], trace_every=100)
    ```
    """

    def checked(self) -> Chain:
        chain = super().checked()
        if chain.links:
            refuse_two_controls(self, chain)
        return chain


@dataclass
class RLOOConfig(EntropyFields, trl.RLOOConfig):
    """TRL's RLOOConfig plus `entropy_terms`, the trace, and pass@k in evaluation.

    The fields of TRL's are as they were: https://huggingface.co/docs/trl/rloo_trainer#trl.RLOOConfig. Those that
    are new (`entropy_terms`, `rollout`, `trace_steps`, `trace_every`, `eval_pass_at_k`, `eval_pass_threshold`,
    `allow_changed_terms`, `watch_collapse`, `run_log`) are described in `EntropyFields`.

    ```python
    >>> RLOOConfig(output_dir="out", entropy_terms=[{"entropy_bonus": {"coef": 0.01}}], trace_every=100)
    ```
    """
