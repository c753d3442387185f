"""What our trainers override of TRL's: where the stages of this folder sit in its loss.

Nothing of TRL's loss is copied. Its `_compute_loss` asks `_get_per_token_logps_and_entropies` first and reads
`inputs["advantages"]` after; in between, the chain of terms reads that one forward pass and writes the advantages of a
copy of `inputs`. tests/trainer/test_seam.py pins what this relies on. Terms act in training only: evaluation is TRL's
own.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# (a mixin's attributes are those of the trainers it is mixed into; TRL's config stands for ours)

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..chain.state import ChainState
from ..recipe.config import build_chain
from ..recipe.conflicts import conflicts
from ..recipe.refusals import (
    is_on_policy,
    refuse_frozen,
    refuse_two_controls,
    refuse_what_the_run_lacks,
    refuse_what_the_settings_lack,
)
from ..recipe.rollout import build_rollout, with_its_term
from ..watch.trace import Trace
from .checkpoints import epochs_done, find_checkpoint
from .evaluation import Responses, sample_responses, with_pass_at_k
from .folder import put_watch_first, take_its_place, writing_a_run
from .hooks import refuse_other_attention, watching
from .judging import before_deepspeed_steps
from .resume import begin_run, is_checkpoint, save_checkpoint
from .rollouts import loss_mask, refuse_rollout, rolling, take_columns, without_the_rest
from .run import Generation, Run, Scores, strengths
from .stage_one import can_wait, checked_rewards, count_unscored, deferred, own_scores, stage_one, trls_scores
from .stage_two import share_of_step, stage_two
from .states import is_reference
from .step import end_step

logger = logging.getLogger(__name__)


class EntropyTermsMixin:
    """What both trainers share; see the module's docstring for how it sits in TRL's loss."""

    def __init__(self, *, entropy_terms: Sequence | None = None, **given: Any) -> None:
        config = given.get("args")
        from_config = getattr(config, "entropy_terms", None)
        if entropy_terms and from_config:
            raise ValueError(
                "entropy_terms came twice, as an argument of the trainer and in its config: use one of them"
            )
        rollout = build_rollout(getattr(config, "rollout", None))
        named = build_chain(entropy_terms or from_config)
        chain = with_its_term(named, rollout)
        if chain.links and isinstance(config, trl.GRPOConfig):
            refuse_two_controls(config, chain)
        refuse_what_the_run_lacks(chain, given.get("model"), config)
        steps, every = getattr(config, "trace_steps", None), getattr(config, "trace_every", None)
        trace = Trace(folder=Path(getattr(config, "output_dir", None) or ""), steps=tuple(steps or ()), every=every)
        self._hclm = Run(chain=chain, state=ChainState.fresh(chain), trace=trace, rollout=rollout)
        with writing_a_run(self, named, given):
            super().__init__(**given)
        refuse_other_attention(self)
        refuse_frozen(self.model)
        if rollout is not None:
            refuse_rollout(self, rollout)
        if config is None:
            refuse_what_the_settings_lack(chain, self.args)
        if self.accelerator.is_main_process:
            warn_of_inert_links(self)
            for sentence in conflicts(self._hclm.chain):
                logger.warning("%s", sentence)

    def add_callback(self, callback: Any) -> None:
        """As in any trainer of transformers; a `CollapseCallback` takes the place of the one that the run has."""
        take_its_place(self, callback)
        super().add_callback(callback)
        put_watch_first(self)

    # ---- stage 1: the generation batch

    def _calculate_rewards(self, inputs: Any, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        take_columns(self, inputs)
        with checked_rewards(self):
            reward_parts = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._hclm.chain.links:
            count_unscored(self, reward_parts)
        if self._hclm.generation is not None:
            self._hclm.generation.reward_parts = reward_parts
            self._hclm.generation.prompts, self._hclm.generation.texts = prompts, completions
            self._hclm.generation.rows = inputs
        if self._hclm.evaluated is not None:
            self._hclm.evaluated.append((reward_parts, completions))
        return reward_parts

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if not (self._hclm.is_on and self.model.training):
            return super()._generate_and_score_completions(inputs)
        generation = self._hclm.generation = Generation()
        try:
            with rolling(self):
                output = super()._generate_and_score_completions(inputs)
                output |= loss_mask(self, output["completion_ids"])
            scores = trls_scores(self, output, generation)
            if scores is None and self._hclm.chain.needs_scores:
                if can_wait(self):
                    return deferred(self, output, generation)
                scores = own_scores(self, output, generation)
        finally:
            self._hclm.generation = None
        with torch.no_grad():
            return output | stage_one(self, output, generation, scores)

    # ---- stage 2: the micro-batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        run = self._hclm
        if not (run.is_on and self.model.training):
            return super()._compute_loss(model, inputs)
        run.inputs = dict(inputs)  # TRL hands out the same dict in every iteration over a generation batch
        try:
            loss = super()._compute_loss(model, run.inputs)
            assert run.outcome is not None
            for link, added in run.outcome.losses.items():
                coef = strengths(self).coefs[link]
                share = coef * share_of_step(self, added, run.inputs)
                run.watch.note(link, "loss", share, coef=coef)
                loss = loss + share
        finally:
            run.inputs, run.outcome = None, None
        run.micro_batches += 1
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Any]:
        run = self._hclm
        is_training_pass = run.inputs is not None
        is_scoring_pass = run.generation is not None and args[0] is self.model and not is_reference(self)
        if not (is_training_pass or is_scoring_pass):
            return self._hclm_trls_pass(*args, **kwargs)
        present = None if is_training_pass else args[2][:, -args[3] :].bool()
        with watching(self, present) as seen:
            logps, entropy, aux_loss = self._hclm_trls_pass(*args, **{**kwargs, "compute_entropy": True})
        width = logps.size(1)
        if is_training_pass:
            scores = Scores(logps, entropy, seen.hidden(width))
            logps = stage_two(self, args[0], scores, seen, seen.spread(width, args[2]))
            logps = without_the_rest(run.inputs, logps)
        elif run.generation is not None:
            run.generation.scores.append(Scores(logps, entropy, **seen.sampled()))
        return logps, entropy, aux_loss

    def _hclm_trls_pass(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any, Any]:
        """TRL's forward pass, without what stands above."""
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    # ---- once per optimiser step, and its checkpoints

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's loss of a micro-batch, (); at the end of an optimiser step also the terms' controllers, log, trace."""
        with before_deepspeed_steps(self):
            loss = super().training_step(*args, **kwargs)
        if self._hclm.is_on and self.accelerator.sync_gradients:
            end_step(self)
        return loss

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As the trainers of transformers do; see docs/reliability.md for what a checkpoint keeps.

        `resume_from_checkpoint`: True for the newest complete checkpoint in `output_dir`, a checkpoint, or the folder
        of a run. Every call is a run of its own for the terms, whose memories and controllers start afresh or as the
        checkpoint has them; the policy goes on from where it is.
        """
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args, bool(self._hclm.chain.links))
        begin_run(self, checkpoint)
        self._hclm.epochs_done = epochs_done(checkpoint)
        return super().train(checkpoint, trial, ignore_keys_for_eval)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        for _ in range(self._hclm.epochs_done):
            # it draws an epoch's order when it is iterated, and a run that is resumed would begin with the first again
            next(iter(sampler), None)
        return sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers asks whether the run is done after a step: one resumed from its last step would make another
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """TRL's; into a checkpoint also the state of the terms."""
        if _internal_call and output_dir is not None and is_checkpoint(output_dir):
            save_checkpoint(self, Path(output_dir))
        super().save_model(output_dir, _internal_call)

    # ---- evaluation

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """TRL's, with pass@k and diversity of what it sampled."""

        def stock() -> EvalLoopOutput:
            return super(EntropyTermsMixin, self).evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )

        if not getattr(self.args, "eval_pass_at_k", False):
            return stock()
        return with_pass_at_k(self, stock, dataloader, metric_key_prefix)

    def sample_responses(self, rows: Sequence[dict], *, batch: int, seed: int) -> Responses:
        """A response of the policy to each row of a data set, with its tools, as TRL samples in evaluation.

        `batch` rows at once. Every process must call it with the same rows; each samples them all. The weights, the
        global random generators and what is logged are left as they were.
        """
        return sample_responses(self, rows, batch, seed)


def warn_of_inert_links(trainer: Any) -> None:
    """Terms that need several updates per rollout, in a run that makes one."""
    if is_on_policy(trainer.args):
        for link in trainer._hclm.chain.links:
            if link.term.inert_on_policy:
                logger.warning(
                    "the entropy term '%s' does nothing in this run, which uses each rollout for one update: set "
                    "num_iterations > 1 or steps_per_generation > gradient_accumulation_steps",
                    link.name,
                )
