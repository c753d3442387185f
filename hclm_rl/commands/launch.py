"""The training job behind `hclm-rl grpo`, `hclm-rl rloo` and the scripts in recipes/: from a recipe to a run folder."""

import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..equations.sigma_reparam import sigma_reparam
from ..recipe.arguments import Algorithm, RunArguments, Settings, make_parser, parse, recipe_of, with_recipe_apart
from ..recipe.config import GRPOConfig, RLOOConfig
from ..recipe.refusals import refuse_unwritable
from ..recipe.rollout import as_words, build_rollout
from ..responses.answers import final_text, own_last_words
from ..responses.names import custom_code
from ..testbed import Evaluation, Task, evaluate
from ..testbed.sampling import measured
from ..trainer import GRPOTrainer, RLOOTrainer
from ..trainer.checkpoints import find_checkpoint, refuse_other_rollout, terms_state
from ..trainer.folder import note, write_whole
from ..trainer.reset import refuse_reset
from ..watch.report.runs import SUMMARY_NAME
from ..watch.secrets import hide, hide_in_line, secrets_in, secrets_in_yaml, without
from ..watch.trackers import TellTrackers, tell_trackers
from ..watch.versions import versions
from .callbacks import FolderOpener, MeasureAtStart, UntrainedTeller, reset_of
from .loading import TESTBED, build_trainer
from .lock import RunLock

__all__ = ["RunArguments", "main", "make_parser", "prepare", "run"]

# gloo's thread drops the last collective's tensors under the GIL; if the interpreter ends before, both wait for ever
SECONDS_TO_LET_GO = 0.2


def is_sharded(trainer: GRPOTrainer | RLOOTrainer) -> bool:
    """Whether training leaves no process the whole model."""
    return trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()


def all_sample(trainer: GRPOTrainer | RLOOTrainer, task: Task) -> bool:
    """Whether the processes must sample together: for TRL's loop of tool calls, and each with its part of the model."""
    return task.environment is not None or is_sharded(trainer)


def on_held_out(
    trainer: GRPOTrainer | RLOOTrainer, task: Task, arguments: RunArguments, config: GRPOConfig | RLOOConfig
) -> Evaluation:
    """The policy as it is on the task's held-out prompts; on this process alone, unless `all_sample`."""
    if all_sample(trainer, task):
        rows = [dict(row) for row in task.eval_dataset]
        repeated = [row for row in rows for _ in range(arguments.eval_samples)]
        said = trainer.sample_responses(repeated, batch=arguments.eval_batch, seed=config.seed)
        text_of = final_text if task.environment is None else own_last_words
        texts = [text_of(each) for each in said.completions]
        return measured(rows, task, arguments.eval_samples, texts, said.entropy_sums, said.lengths)
    assert isinstance(trainer.processing_class, PreTrainedTokenizerBase)
    return evaluate(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        task.eval_dataset,
        task,
        samples=arguments.eval_samples,
        temperature=config.temperature,
        seed=config.seed,
        batch=arguments.eval_batch,
    )


def written(result: Evaluation) -> dict:
    """As summary.json holds it."""
    return {
        "prompts": result.prompts,
        "samples": result.samples,
        "means": result.means(),
        "standard_errors": result.standard_errors,
    }


def measure(
    trainer: GRPOTrainer | RLOOTrainer, task: Task | None, arguments: RunArguments, config: GRPOConfig | RLOOConfig
) -> dict | None:
    """Means and standard errors on the task's held-out prompts.

    Taken on the main process while the others wait, unless `all_sample`.
    """
    if not (task and arguments.eval_samples):
        return None
    found = None
    if trainer.accelerator.is_main_process or all_sample(trainer, task):
        found = written(on_held_out(trainer, task, arguments, config))
    trainer.accelerator.wait_for_everyone()
    return found


def checkpoint_of(config: GRPOConfig | RLOOConfig) -> str | None:
    """The folder to resume from, whose terms are those of the run; a ValueError says why there is none."""
    chain = config.checked()
    checkpoint = find_checkpoint(config.resume_from_checkpoint, config, bool(chain.links))
    terms_state(checkpoint, chain, torch.device("cpu"), config)
    refuse_other_rollout(checkpoint, build_rollout(config.rollout), config)
    return checkpoint


def train(trainer: GRPOTrainer | RLOOTrainer, arguments: RunArguments, checkpoint: str | None = None) -> None:
    """With the weights as the recipe wants them in training; plain again after it."""
    assert trainer.model is not None
    with sigma_reparam(trainer.model) if arguments.sigma_reparam else nullcontext():
        trainer.train(resume_from_checkpoint=checkpoint)


def train_between_measures(
    trainer: GRPOTrainer | RLOOTrainer,
    task: Task | None,
    arguments: RunArguments,
    config: GRPOConfig | RLOOConfig,
    checkpoint: str | None,
) -> tuple[dict | None, dict | None, float]:
    """(what was found before training, after it, seconds of training)"""
    start = time.perf_counter()
    before = MeasureAtStart(functools.partial(measure, trainer, task, arguments, config))
    if is_sharded(trainer):
        trainer.add_callback(before)  # until then the model is not sharded
    else:
        before()
    train(trainer, arguments, checkpoint)
    seconds = time.perf_counter() - start - before.seconds
    return before.found, measure(trainer, task, arguments, config), seconds


def described(
    algorithm: Algorithm, settings: Settings, overrides: str, trainer: GRPOTrainer | RLOOTrainer
) -> dict[str, object]:
    """What was run, as summary.json says it."""
    arguments, config, model, _ = settings
    terms = config.entropy_terms
    return {
        "algorithm": algorithm,
        "model": model.model_name_or_path or TESTBED,
        "task": arguments.task,
        "terms": json.loads(terms) if isinstance(terms, str) else terms,
        **({"rollout": as_words(config.rollout)} if config.rollout else {}),
        "overrides": overrides,
        "seed": config.seed,
        "steps": trainer.state.global_step,
        "processes": trainer.accelerator.num_processes,
    }


def secrets_of(settings: Settings, recipe: Path | None) -> list[str]:
    """Tokens and keys, wherever they were given."""
    in_recipe = secrets_in_yaml(recipe.read_text(encoding="utf-8")) if recipe else []
    return [*secrets_in([vars(each) for each in settings]), *in_recipe]


def write_summary(folder: Path, summary: dict, secrets: Sequence[str]) -> None:
    said = json.dumps(hide(summary), indent=1, default=repr)
    write_whole(folder / SUMMARY_NAME, without(said, secrets) + "\n")


def let_go(trainer: GRPOTrainer | RLOOTrainer) -> None:
    """Of trackers and of the other processes."""
    trainer.end()
    if trainer.accelerator.num_processes > 1:
        time.sleep(SECONDS_TO_LET_GO)


def leave_behind(
    trainer: GRPOTrainer | RLOOTrainer, settings: Settings, folder: Path, summary: dict, secrets: Sequence[str]
) -> None:
    """The trained model and, last, the summary: a run that has one has ended."""
    arguments, config, *_ = settings
    if arguments.save_final:
        trainer.save_model(str(folder))
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    if trainer.accelerator.is_main_process:
        write_summary(folder, summary, secrets)


def callbacks_of(
    folder: Path, recipe: Path | None, arguments: RunArguments, config: GRPOConfig | RLOOConfig
) -> list[TrainerCallback]:
    """What opens the run's folder, what tells of a run that trains nothing, and what resets its reference."""
    return [FolderOpener(folder, recipe), UntrainedTeller(), TellTrackers(), *resets_of(arguments, config)]


def resets_of(arguments: RunArguments, config: GRPOConfig | RLOOConfig) -> list[TrainerCallback]:
    """What resets its reference, where the recipe says so."""
    if not isinstance(arguments.reset_reference, dict):
        return []
    reset = reset_of(arguments.reset_reference)
    refuse_reset(config)
    return [reset]


def prepare(
    algorithm: Algorithm, settings: Settings, recipe: Path | None = None, overrides: str = ""
) -> Callable[[], dict]:
    """Checks everything and loads the model; gives the rest of the run, from measuring before to the last file.

    `recipe` is copied into the run folder, `overrides` (what the command line adds to it) noted in the summary.
    """
    start = time.perf_counter()
    arguments, config, *_ = settings
    folder = Path(config.output_dir or "trainer_output")
    checkpoint = checkpoint_of(config)
    refuse_unwritable(folder)
    lock = RunLock(folder, is_held=config.process_index == 0)
    with lock.until_error():
        trainer, task = build_trainer(algorithm, settings, callbacks_of(folder, recipe, arguments, config))
    secrets = secrets_of(settings, recipe)
    note(trainer, secrets, overrides=overrides, seed=config.seed, algorithm=algorithm)

    def rest() -> dict:
        try:
            before, after, seconds = train_between_measures(trainer, task, arguments, config, checkpoint)
            summary = {
                **described(algorithm, settings, overrides, trainer),
                "before": before,
                "after": after,
                "seconds": {"all": time.perf_counter() - start, "training": seconds},
                "versions": versions(),
            }
            leave_behind(trainer, settings, folder, summary, secrets)
            if trainer.accelerator.is_main_process:
                tell_trackers(trainer.callback_handler.callbacks, folder, before, after, trainer.state.global_step)
        finally:
            lock.release()
        let_go(trainer)
        return summary

    return rest


def run(algorithm: Algorithm, settings: Settings) -> dict:
    """The whole job; returns what summary.json holds."""
    return prepare(algorithm, settings)()


def main(algorithm: Algorithm, arguments: Sequence[str] | None = None) -> int:
    """The command line: a mistake in the recipe is one sentence on stderr and exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    line = with_recipe_apart(given)
    device = torch.accelerator.current_accelerator()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (device is None or device.type == "mps"):
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # else each process would train alone
    try:
        recipe = recipe_of(line)
        at = line.index("--config") if recipe else len(line)
        settings = parse(algorithm, line)
        rest = prepare(algorithm, settings, recipe, shlex.join(hide_in_line(line[:at] + line[at + 2 :])))
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"hclm-rl {algorithm}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    with custom_code(settings[0].allow_custom_code):
        rest()
    return 0
