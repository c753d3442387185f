"""TRL's GRPOTrainer and RLOOTrainer with entropy terms: the only file that leans on TRL's private names.

Nothing of TRL's loss is copied. Its `_compute_loss` asks `_get_per_token_logps_and_entropies` first and reads
`inputs["advantages"]` after; in between, the chain of terms reads that one forward pass and writes the advantages of a
copy of `inputs`. tests/test_seam.py pins what this relies on. Terms act in training only: evaluation is TRL's own.
It is longer than other modules because every private name of TRL is to be found in this one file.
"""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false, reportOptionalMemberAccess=false
# pyright: reportArgumentType=false, reportCallIssue=false
# (a mixin's attributes are those of the trainers it is mixed into; TRL exports lazily and declares ints as int | None)

import functools
import inspect
import logging
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import trl
from accelerate.utils import gather_object, is_peft_model
from packaging.version import Version
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, has_length

from ..chain.chain import Chain, Outcome
from ..chain.metrics import StepMetrics, token_values
from ..chain.state import JSON_NAME, ChainState
from ..equations.functional import per_token, split_token_weights
from ..equations.vocab import Head, over_vocab, slope_along
from ..recipe.config import build_chain, refuse_two_controls
from ..recipe.conflicts import conflicts
from ..recipe.refusals import (
    NOTHING,
    acts_between,
    is_on_policy,
    refuse_ratios_out_of_reach,
    refuse_rewards_out_of_sight,
    refuse_what_the_run_lacks,
)
from ..responses.rewards import checked
from ..types import Attention, Metric, Rollout, TokenBatch, Transcript, last_layer
from ..watch.trace import Trace

if not Version("1.16") <= Version(trl.__version__) < Version("1.17"):
    raise ImportError(
        f"hclm_rl works with trl>=1.16,<1.17, and trl {trl.__version__} is installed: pip install 'trl>=1.16,<1.17'"
    )

from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head, is_async_callable, maybe_gather_lm_head_ctx, nanstd, use_adapter

logger = logging.getLogger(__name__)

IDLE_STEPS_BEFORE_WARNING = 50  # optimiser steps in which a link affected no token
# keys in the batch dict, which TRL shuffles and splits with it
AFFECTED, COLUMN, TRACED = "hclm/affected/", "hclm/column/", "hclm/traced/"
ROW = "hclm/row"  # a response's place before the shuffle


@dataclass(frozen=True, kw_only=True)
class Responses:
    """What the policy answered, a value a response."""

    completions: list  # text; of a conversation its messages, those of tools included
    entropy_sums: list[float]  # nats, over the response's own tokens, at the sampling temperature
    lengths: list[int]  # tokens, without those that tools wrote


@dataclass
class _Scores:
    """What one pass over the whole generation batch at the sampling policy gives."""

    logps: Tensor
    entropy: Tensor
    hidden: Tensor | None


@dataclass
class _Generation:
    """What was seen while TRL made a generation batch."""

    scores: list[_Scores] = field(default_factory=list)
    reward_parts: Tensor | None = None  # of all processes
    prompts: list = field(default_factory=list)
    texts: list = field(default_factory=list)
    rows: list = field(default_factory=list)


@dataclass
class _Strengths:
    """Every link's coefficient in one optimiser step, and the sampled entropy that made them."""

    step: int
    coefs: dict[str, float]  # by link
    sampled_entropy: float | None


@dataclass
class _Run:
    """All of a trainer's own state, behind one attribute, so that no name collides with TRL's."""

    chain: Chain
    state: ChainState
    trace: Trace
    metrics: StepMetrics = field(default_factory=StepMetrics)
    shared: dict[str, Tensor] = field(default_factory=dict)
    strengths: _Strengths | None = None
    sampled_entropy: float | None = None  # nats, mean of the last scoring pass over all processes; NaN of no token
    generation: _Generation | None = None  # set while TRL makes a generation batch
    deferred: tuple[dict[str, Any], _Generation] | None = None  # a batch whose first stage waits for the loss's pass
    inputs: dict[str, Any] | None = None  # set while TRL computes a training loss: the copy whose advantages we shape
    outcome: Outcome | None = None
    micro_batches: int = 0
    # set during evaluation, a pair a batch: reward parts of all processes, this one's completions as text or messages
    evaluated: list[tuple[Tensor, list]] | None = None
    reference_gives_entropy: bool = False
    generated: dict[int, int] = field(default_factory=dict)  # optimiser step: generation batches that began in it

    @property
    def is_on(self) -> bool:
        """Whether there is anything to do beside TRL."""
        return bool(self.chain.links) or self.trace.is_on


def _transcript(batch: Mapping[str, Any]) -> Transcript:
    return Transcript(
        prompt_ids=batch["prompt_ids"],
        prompt_mask=batch["prompt_mask"].bool(),
        ids=batch["completion_ids"],
        present=batch["completion_mask"].bool(),
    )


class EntropyTermsMixin:
    """What both trainers share; see the module's docstring for how it sits in TRL's loss."""

    def __init__(self, *args: Any, entropy_terms: list | None = None, **kwargs: Any) -> None:
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        config = given.get("args")
        from_config = getattr(config, "entropy_terms", None)
        if entropy_terms and from_config:
            raise ValueError(
                "entropy_terms came twice, as an argument of the trainer and in its config: use one of them"
            )
        chain = build_chain(entropy_terms or from_config)
        if chain.links and isinstance(config, trl.GRPOConfig):
            refuse_two_controls(config, chain)
        refuse_what_the_run_lacks(chain, given.get("model"), config)
        steps, every = getattr(config, "trace_steps", None), getattr(config, "trace_every", None)
        trace = Trace(folder=Path(getattr(config, "output_dir", None) or ""), steps=tuple(steps or ()), every=every)
        self._hclm = _Run(chain=chain, state=ChainState.fresh(chain), trace=trace)
        super().__init__(*args, **kwargs)
        self._hclm_refuse_other_attention()
        if config is None:
            refuse_rewards_out_of_sight(chain, self.args)
            refuse_ratios_out_of_reach(chain, self.args)
        if self.accelerator.is_main_process:
            self._hclm_warn_of_inert_links()
            for sentence in conflicts(self._hclm.chain):
                logger.warning("%s", sentence)

    # ---- stage 1: the generation batch

    def _calculate_rewards(self, inputs: Any, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        # the user's own list and objects: what stands in for them is there for this call alone
        given = self.reward_funcs
        self.reward_funcs = [
            func if isinstance(func, torch.nn.Module) else checked(func, name, is_async_callable(func))
            for func, name in zip(given, self.reward_func_names, strict=True)
        ]
        try:
            reward_parts = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = given
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
        generation = self._hclm.generation = _Generation()
        try:
            output = super()._generate_and_score_completions(inputs)
            scores = self._hclm_trls_scores(output, generation)
            if scores is None and self._hclm.chain.needs_scores:
                # the loss's own pass sees it all at once; within it no other pass may run
                is_whole = self.args.steps_per_generation == self.num_iterations == 1
                if is_whole and not self._hclm.chain.needs_rescoring:
                    self._hclm.deferred = dict(output), generation
                    return output | {ROW: torch.arange(len(output["prompt_ids"]), device=self.accelerator.device)}
                scores = self._hclm_own_scores(output, generation)
        finally:
            self._hclm.generation = None
        with torch.no_grad():
            return output | self._hclm_stage_one(output, generation, scores)

    def _hclm_trls_scores(self, output: dict[str, Any], generation: _Generation) -> _Scores | None:
        """What TRL's own pass for old log-probs saw, if it made one."""
        for scores in generation.scores:  # TRL scores with the reference adapter through the same method
            if self._hclm_is_old(scores.logps, output):
                return scores
        generation.scores.clear()
        return None

    def _hclm_own_scores(self, output: dict[str, Any], generation: _Generation) -> _Scores:
        """A pass of our own over the generation batch, where TRL made none and a term asks."""
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        with self._hclm_aside():
            self._get_per_token_logps_and_entropies(
                self.model, ids, attention, output["completion_ids"].size(1), self.args.per_device_train_batch_size
            )
        return generation.scores[0]

    @contextmanager
    def _hclm_aside(self, has_gradient: bool = False) -> Iterator[None]:
        """For a pass of our own: a model with dropout draws the same numbers afterwards as without it."""
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        checkpointing = self.args.gradient_checkpointing_kwargs
        quietly = nullcontext() if has_gradient else disable_gradient_checkpointing(self.model, checkpointing)
        with torch.random.fork_rng(devices), quietly, torch.set_grad_enabled(has_gradient):
            yield

    def _hclm_score(
        self, model: Any, transcript: Transcript, scorer: Literal["policy", "reference"] = "policy"
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of any completions, by a pass of its own; in chunks where there is no gradient."""
        adapter = nullcontext()
        if scorer == "reference" and not self.beta:
            raise ValueError("a term asks for the reference model, which this run does not load: set beta > 0")
        if scorer == "reference" and self.ref_model is not None:
            model = self.ref_model
            if not self._hclm.reference_gives_entropy:  # TRL asks it for log-probs alone
                add_fused_lm_head(
                    self.accelerator.unwrap_model(model),
                    temperature=self.temperature,
                    cast_lm_head_to_fp32=getattr(self.args, "cast_lm_head_to_fp32", False),
                    outputs=("log_probs", "entropy"),
                )
                self._hclm.reference_gives_entropy = True
        elif scorer == "reference":
            peft_model = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(peft_model, adapter_name="ref" if "ref" in peft_model.peft_config else None)
        ids = torch.cat([transcript.prompt_ids, transcript.ids], dim=1)
        attention = torch.cat([transcript.prompt_mask, transcript.present], dim=1).long()
        has_gradient = torch.is_grad_enabled() and scorer == "policy"
        size = None if has_gradient else self.args.per_device_train_batch_size
        with self._hclm_aside(has_gradient), adapter:
            logps, entropy, _ = super()._get_per_token_logps_and_entropies(
                model, ids, attention, transcript.ids.size(1), size, compute_entropy=True
            )
        return logps, entropy

    def _hclm_stage_one(self, output: dict, generation: _Generation, scores: _Scores | None) -> dict[str, Tensor]:
        """Runs the chain's first stage; gives the new keys of the batch dict."""
        run, rank, n = self._hclm, self.accelerator.process_index, len(output["prompt_ids"])
        own = slice(rank * n, (rank + 1) * n)
        parts = generation.reward_parts
        assert parts is not None
        rewards = (parts * self.reward_weights.to(parts.device)).nansum(dim=1)
        rewards = rewards.masked_fill(parts.isnan().all(dim=1), torch.nan)
        group = torch.arange(own.start, own.stop, device=parts.device) // self.num_generations
        mask = self._hclm_mask(output)
        reads: dict[str, Callable] = {}
        if scores is not None and scores.hidden is not None:
            states = scores.hidden
            reads["hidden"] = last_layer(states)
            if run.chain.needs_vocab:
                reads["over_vocab"] = lambda functional: self._hclm_over_vocab(functional, states, mask)
                reads["slope"] = lambda direction: self._hclm_slope(direction, states, output["completion_ids"])
        if run.chain.needs_rescoring:
            reads["score"] = functools.partial(self._hclm_score, self.model)
            reads["transcript"] = _transcript(output)
        rollout = Rollout(
            ids=output["completion_ids"],
            mask=mask,
            advantages=output["advantages"],
            rewards=rewards[own],
            reward_parts=parts[own],
            group_rewards=rewards.view(-1, self.num_generations)[group],
            group=group,
            reward_scale=self._hclm_reward_scale(rewards)[own],
            logps=None if scores is None else scores.logps,
            entropy=None if scores is None else scores.entropy,
            ref_logps=output.get("ref_per_token_logps"),
            rows=generation.rows,
            prompts=generation.prompts,
            texts=generation.texts,
            tokenizer=self._tokenizer,
            progress=self._hclm_progress(),
            step=self.state.global_step,
            everywhere=self._hclm_everywhere,
            here=lambda x: x[own, : mask.size(1)] if x.dim() > 1 else x[own],
            total=lambda x: self.accelerator.reduce(x, reduction="sum"),
            **reads,
        )
        if scores is not None:
            sums = torch.stack([torch.where(mask, scores.entropy, 0).sum(), mask.sum()])
            entropy, count = self.accelerator.reduce(sums, reduction="sum").tolist()
            run.sampled_entropy = entropy / count if count else math.nan
        outcome = run.chain.on_rollout(
            rollout,
            run.state.memory,
            self._hclm_strengths().coefs,
            functools.partial(self._hclm_generator, "rollout"),
            self._hclm_renormalise,
        )
        run.shared = outcome.shared
        stage_metrics = StepMetrics()
        for name, metric in outcome.metrics.items():
            stage_metrics.add(name, metric, mask)
        for name, value in stage_metrics.flush(self.accelerator).items():
            self._metrics["train"][name].append(value)
        items = self.accelerator.reduce(mask.sum(), reduction="sum")
        keys = {"hclm/rewards": outcome.rewards, "hclm/group_rewards": outcome.group_rewards, "hclm/items": items}
        if "old_logps" in output:  # RLOO keeps the sum over a response only
            keys["hclm/old_logps"] = generation.scores[0].logps
        if outcome.advantages is not None:
            keys["advantages"] = outcome.advantages
        keys |= {AFFECTED + link: affected for link, affected in outcome.affected.items()}
        if run.trace.is_on:
            traced = self._hclm_traced(group, rewards[own], output["advantages"], outcome.metrics)
            keys |= {TRACED + name: values for name, values in traced.items()}
        return keys | {COLUMN + name: column for name, column in outcome.columns.items()}

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
                loss = loss + self._hclm_strengths().coefs[link] * self._hclm_share_of_step(added, run.inputs)
        finally:
            run.inputs, run.outcome = None, None
        run.micro_batches += 1
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Any]:
        run = self._hclm
        is_training_pass = run.inputs is not None
        is_scoring_pass = run.generation is not None and args[0] is self.model
        if not (is_training_pass or is_scoring_pass):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        seen: list[Tensor] = []
        through_head: list[Tensor] = []
        attention: list[tuple[Tensor, int | None]] = []
        with self._hclm_watch_hidden(seen, through_head), self._hclm_watch_attention(attention, is_training_pass):
            logps, entropy, aux_loss = super()._get_per_token_logps_and_entropies(
                *args, **{**kwargs, "compute_entropy": True}
            )
        width = logps.size(1)  # the state at position i predicts token i + 1
        hidden = torch.cat([states[:, -width - 1 : -1] for states in seen]) if seen else None
        if is_training_pass:
            reads: dict[str, Callable] = {}
            if attention:
                visible = args[2].long().cumsum(dim=1)  # causal: the keys up to the query, but for the padding
                own = [heads[:, :, -width - 1 : -1] for heads, _ in attention]
                up_to = visible[:, None, -width - 1 : -1]
                in_window = [up_to.clamp(max=window or visible.size(1)) for _, window in attention]
                spread = Attention(
                    entropy=torch.cat(own, dim=1),
                    visible=torch.cat([n.expand_as(heads) for n, heads in zip(in_window, own, strict=True)], dim=1),
                    width=visible.size(1),
                )
                reads["attention"] = lambda: spread
            logps = self._hclm_stage_two(args[0], logps, entropy, hidden, through_head, reads)
        elif run.generation is not None:
            run.generation.scores.append(_Scores(logps, entropy, hidden))
        return logps, entropy, aux_loss

    def _hclm_stage_two(
        self,
        model: Any,
        logps: Tensor,
        entropy: Tensor,
        hidden: Tensor | None,
        through_head: list[Tensor],
        reads: dict[str, Callable],
    ) -> Tensor:
        """Runs the chain on a micro-batch; shapes the advantages of the armed inputs, gives TRL its log-probs."""
        run, inputs = self._hclm, self._hclm.inputs
        assert inputs is not None
        if run.deferred is not None:
            self._hclm_catch_up(inputs, _Scores(logps.detach(), entropy.detach(), hidden))
        mask = self._hclm_mask(inputs)
        old_logps = inputs.get("old_per_token_logps", inputs.get("hclm/old_logps"))
        columns = {key.removeprefix(COLUMN): value for key, value in inputs.items() if key.startswith(COLUMN)}
        affected = {key.removeprefix(AFFECTED): value for key, value in inputs.items() if key.startswith(AFFECTED)}
        if hidden is not None:
            reads["hidden"] = last_layer(hidden)
        if run.chain.needs_vocab_gradient and hidden is not None:
            reads["over_vocab"] = lambda functional: self._hclm_over_vocab(functional, hidden, mask)
        if run.chain.needs_rescoring:
            reads["score"] = functools.partial(self._hclm_score, model)
        batch = TokenBatch(
            ids=inputs["completion_ids"],
            mask=mask,
            logps=logps,
            # RLOO scores them in a pass of its own, whose dropout and rounding differ, also where the policy does not
            old_logps=logps.detach() if old_logps is None or is_on_policy(self.args) else old_logps,
            ref_logps=inputs.get("ref_per_token_logps"),
            entropy=entropy,
            advantages=per_token(inputs["advantages"], mask),
            rewards=inputs["hclm/rewards"],
            group_rewards=inputs["hclm/group_rewards"],
            columns=columns,
            shared=run.shared,
            clip_range=(self.epsilon_low, self.epsilon_high),
            progress=self._hclm_progress(),
            step=self.state.global_step,
            share=self.current_gradient_accumulation_steps / self.args.steps_per_generation,
            **reads,
        )
        with torch.autocast(logps.device.type, enabled=False):
            generators = functools.partial(self._hclm_generator, f"micro-batch {run.micro_batches}")
            outcome = run.chain(batch, run.state.memory, self._hclm_strengths().coefs, generators, affected)
        run.outcome = outcome
        shaped = inputs["advantages"] if outcome.advantages is None else outcome.advantages
        if run.trace.wants(self.state.global_step + 1):
            self._hclm_trace(inputs, batch, shaped)
        run.metrics.add("hclm_entropy", entropy, mask)
        for name, metric in outcome.metrics.items():
            self._hclm_record(name, metric, mask)
        if outcome.on_hidden_gradient:
            self._hclm_watch_gradient(outcome, through_head[0], mask)
        if shaped.dim() == 1:
            return logps
        if self._hclm_is_sequence_level():
            shaped, weights = split_token_weights(shaped, mask)
            if (weights != 1).any():
                self._hclm_refuse_weighted_kl()
                logps = logps.detach() + weights * (logps - logps.detach())
        inputs["advantages"] = shaped
        return logps

    def _hclm_catch_up(self, inputs: dict[str, Any], shuffled: _Scores) -> None:
        """The deferred first stage, in the order in which the batch was generated."""
        assert self._hclm.deferred is not None
        (output, generation), self._hclm.deferred = self._hclm.deferred, None
        row, order = inputs[ROW], inputs[ROW].argsort()
        hidden = None if shuffled.hidden is None else shuffled.hidden.detach()[order]
        with torch.no_grad():
            scores = _Scores(shuffled.logps[order], shuffled.entropy[order], hidden)
            new = self._hclm_stage_one(output, generation, scores)
        inputs |= {key: value[row] if value.dim() else value for key, value in new.items()}

    def _hclm_share_of_step(self, loss: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """A token loss as its share of the mean over all tokens of the optimiser step, a scalar one of its mean."""
        accumulation = self.current_gradient_accumulation_steps
        undo = 1.0 if self.loss_is_scaled_for_ga else accumulation  # RLOO's loss is divided once more afterwards
        if loss.dim() == 0:
            return loss / accumulation * undo
        items = inputs["hclm/items"].clamp(min=1.0) / self.accelerator.num_processes
        normaliser = items * accumulation / self.args.steps_per_generation
        return torch.where(self._hclm_mask(inputs), loss, 0).sum() / normaliser * undo

    @contextmanager
    def _hclm_watch_hidden(self, seen: list[Tensor], through_head: list[Tensor]) -> Iterator[None]:
        """Keeps the backbone's last hidden states; the head reads an alias, whose gradient is the head's alone."""
        if not (self._hclm.chain.needs_hidden or self._hclm.chain.needs_vocab):
            yield
            return

        def keep(module: torch.nn.Module, args: Any, output: Any) -> Any:
            seen.append(output.last_hidden_state)
            output.last_hidden_state = output.last_hidden_state.view_as(output.last_hidden_state)
            through_head.append(output.last_hidden_state)
            return output

        hook = self._hclm_language_model().base_model.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _hclm_watch_attention(self, seen: list[tuple[Tensor, int | None]], is_training_pass: bool) -> Iterator[None]:
        """Keeps the attention entropies of every layer, (B, heads, queries), and the width of its sliding window.

        Without gradient where it checkpoints.
        """
        if not (self._hclm.chain.needs_attention and is_training_pass):
            yield
            return
        model = self._hclm_language_model()
        config = model.config.get_text_config()
        window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)

        def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
            weights = (output[1].detach() if model.is_gradient_checkpointing else output[1]).float()
            weights = torch.where(weights > 0, weights, 1.0)  # 0 log 0 is 0, and so is its gradient
            is_sliding = not layers or layers[module.layer_idx] == "sliding_attention"  # all layers, as Mistral's
            seen.append((-(weights * weights.log()).sum(dim=-1), window if is_sliding else None))

        modules = [each for each in model.modules() if type(each).__name__.endswith("Attention")]
        hooks = [each.register_forward_hook(keep) for each in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hclm_refuse_other_attention(self) -> None:
        links = [link for link in self._hclm.chain.links if link.term.needs_attention]
        if not links:
            return
        names, given = ", ".join(link.name for link in links), self._hclm_language_model().config._attn_implementation
        if given != "eager":
            raise ValueError(
                f"{names}: reads attention probabilities, which attn_implementation '{given}' does not keep: set "
                "attn_implementation: eager (in Python model_init_kwargs={'attn_implementation': 'eager'})"
            )
        layers = getattr(self._hclm_language_model().config.get_text_config(), "layer_types", None) or ()
        if "chunked_attention" in layers:
            raise ValueError(
                f"{names}: reads attention probabilities, and how many keys a query sees in this model's chunked "
                "attention is not known here; use a model with full or sliding attention"
            )
        if self.args.gradient_checkpointing and any(link.coef != NOTHING for link in links):
            raise ValueError(
                f"{names}: regularises attention probabilities, which gradient checkpointing throws away: set "
                "gradient_checkpointing: false, or coef: 0 to log them only"
            )

    def _hclm_watch_gradient(self, outcome: Outcome, through_head: Tensor, mask: Tensor) -> None:
        width = mask.size(1)

        def receive(gradient: Tensor) -> None:
            # processes are averaged afterwards, and what float16 scales the loss by is taken out again
            scaler = self.accelerator.scaler
            scale = self.accelerator.num_processes * (1.0 if scaler is None else scaler.get_scale())
            own = gradient[:, -width - 1 : -1].float() / scale
            for link, callback in outcome.on_hidden_gradient.items():
                for name, metric in callback(own.detach()).items():
                    self._hclm_record(f"{link}/{name}", metric, mask)
            hook.remove()  # a callback may hold the batch, whose graph holds this hook: without this, a leak

        hook = through_head.register_hook(receive)

    def _hclm_record(self, name: str, metric: Metric, mask: Tensor) -> None:
        """A metric of the micro-batch at hand goes to the log, and token by token to the trace."""
        self._hclm.metrics.add(name, metric, mask)
        values = token_values(metric)
        if values is not None and self._hclm.trace.wants(self.state.global_step + 1):
            self._hclm.trace.add(name, values)

    def _hclm_traced(self, group: Tensor, rewards: Tensor, advantages: Tensor, metrics: Mapping[str, Metric]) -> dict:
        """What the trace takes from the first stage: (N,) or (N, T), to travel with its rows."""
        run, step, n = self._hclm, self.state.global_step, len(rewards)
        earlier = run.generated.get(step, 0)  # generation batches of the same step, whose numbers are taken
        run.generated = {step: earlier + 1}
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        response = torch.arange(n, device=rewards.device) + (earlier * world + rank) * n
        prompt = group + earlier * world * n // self.num_generations
        told = {name: token_values(metric) for name, metric in metrics.items()}
        return {
            "prompt": prompt,
            "response": response,
            "reward": rewards,
            "advantage_before": advantages,
            **{name: values for name, values in told.items() if values is not None},
        }

    def _hclm_trace(self, inputs: Mapping[str, Any], batch: TokenBatch, advantages: Tensor) -> None:
        """Opens the micro-batch's part of the trace."""
        given = {key.removeprefix(TRACED): value for key, value in inputs.items() if key.startswith(TRACED)}
        rows = zip(inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True)
        prompts = [ids[is_text].tolist() for ids, is_text in rows]
        position = torch.arange(batch.ids.size(1), device=batch.ids.device).expand(batch.ids.shape)
        columns = {"position": position, "id": batch.ids, "logp": batch.logps, "old_logp": batch.old_logps}
        columns |= {"entropy": batch.entropy, "advantage": advantages}
        self._hclm.trace.start(batch.mask, given | columns, zip(given["prompt"].tolist(), prompts, strict=True))

    # ---- once per optimiser step

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self._hclm.is_on and self.accelerator.sync_gradients:
            self._hclm_end_step()
        return loss

    def _hclm_end_step(self) -> None:
        run, strengths = self._hclm, self._hclm_strengths()
        metrics = run.metrics.flush(self.accelerator)
        entropy = metrics.pop("hclm_entropy")
        for link in run.chain.links:
            coef, sampled = strengths.coefs[link.name], strengths.sampled_entropy
            metrics[f"{link.name}/coef"] = coef
            # a controller that gates by the entropy at sampling moves by the same one
            measured = sampled if link.coef.needs_entropy and sampled is not None else entropy
            if not math.isnan(measured):
                run.state.controller[link.name] = link.coef.update(measured, run.state.controller[link.name])
            is_idle = metrics[f"{link.name}/affected"] == 0 and coef != 0 and not link.term.is_diagnostic
            run.state.idle_steps[link.name] = run.state.idle_steps[link.name] + 1 if is_idle else 0
            if run.state.idle_steps[link.name] == IDLE_STEPS_BEFORE_WARNING and self.accelerator.is_main_process:
                logger.warning(
                    "the entropy term '%s' has affected no token for %d optimiser steps",
                    link.name,
                    IDLE_STEPS_BEFORE_WARNING,
                )
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        run.micro_batches = 0
        step = self.state.global_step + 1
        if run.trace.wants(step):
            run.trace.write(step, self._tokenizer, self._hclm_to_main)

    def _hclm_to_main(self, objects: list) -> list:
        """The objects of all processes on the main one, and none on the others."""
        everything = gather_object(objects) if self.accelerator.num_processes > 1 else objects
        return everything if self.accelerator.is_main_process else []

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._hclm.chain.links and self.args.should_save:
            self._hclm.state.save(Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._hclm.chain.links and self.args.should_save:  # before it goes to the Hub
            self._hclm.state.save(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if not (self._hclm.chain.links and checkpoint):
            return
        if (Path(checkpoint) / JSON_NAME).exists():
            self._hclm.state = ChainState.load(Path(checkpoint), self._hclm.chain, self.accelerator.device)
        else:
            logger.warning("%s has no %s: the entropy terms start afresh", checkpoint, JSON_NAME)

    # ---- evaluation

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        def stock() -> EvalLoopOutput:
            return super(EntropyTermsMixin, self).evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )

        if not getattr(self.args, "eval_pass_at_k", False):
            return stock()
        self._hclm.evaluated = []
        try:
            output = stock()
            rewards = torch.cat([parts for parts, _ in self._hclm.evaluated])[:, 0]
        finally:
            self._hclm.evaluated = None
        if has_length(dataloader.dataset):  # several processes fill up the last batch with prompts of the first
            rewards = rewards[: len(dataloader.dataset) * self.num_generations_eval]
        from ..evaluation.training import pass_metrics  # scipy comes with an extra

        grouped = rewards.view(-1, self.num_generations_eval).cpu().numpy()
        output.metrics.update(pass_metrics(grouped, self.args.eval_pass_threshold, metric_key_prefix))
        return output

    def sample_responses(self, rows: Sequence[dict], *, batch: int, seed: int) -> Responses:
        """A response of the policy to each row of a data set, with its tools, as TRL samples in evaluation.

        `batch` rows at once. Every process must call it with the same rows; each samples them all. The weights, the
        global random generators and what is logged are left as they were.
        """
        entropy_sums: list[float] = []
        lengths: list[int] = []
        was_training, group_size = self.model.training, self.num_generations_eval
        self.model.eval()
        self.num_generations_eval, self._hclm.evaluated = 1, []
        try:
            with self._hclm_aside():
                torch.manual_seed(seed)
                for start in range(0, len(rows), batch):
                    output = self._generate_and_score_completions([dict(row) for row in rows[start : start + batch]])
                    mask = self._hclm_mask(output)
                    entropy = self._hclm_score(self.model, _transcript(output))[1]
                    entropy_sums += torch.where(mask, entropy, 0).sum(dim=1).tolist()
                    lengths += mask.sum(dim=1).tolist()
            completions = [each for _, of_batch in self._hclm.evaluated for each in of_batch]
        finally:
            self.model.train(was_training)
            self.num_generations_eval, self._hclm.evaluated = group_size, None
            self._metrics["eval"].clear()
        return Responses(completions=completions, entropy_sums=entropy_sums, lengths=lengths)

    # ---- small questions

    def _hclm_progress(self) -> float:
        return self.state.global_step / max(self.state.max_steps, 1)

    def _hclm_strengths(self) -> _Strengths:
        """Made once an optimiser step."""
        run, step = self._hclm, self.state.global_step
        if run.strengths is None or run.strengths.step != step:
            entropy, progress = run.sampled_entropy, self._hclm_progress()
            coefs = {
                link.name: link.coef.value(progress, run.state.controller[link.name], entropy=entropy)
                for link in run.chain.links
            }
            run.strengths = _Strengths(step=step, coefs=coefs, sampled_entropy=entropy)
        return run.strengths

    def _hclm_generator(self, stage: str, link: str) -> torch.Generator:
        """A generator that depends on seed, step, stage and link alone: no state to save, the same everywhere."""
        key = f"{self.args.seed}/{self.state.global_step}/{stage}/{link}"
        return torch.Generator().manual_seed(zlib.crc32(key.encode()))

    def _hclm_mask(self, batch: Mapping[str, Any]) -> Tensor:
        mask = batch["completion_mask"].bool()
        return mask & batch["tool_mask"].bool() if batch.get("tool_mask") is not None else mask

    def _hclm_everywhere(self, x: Tensor) -> Tensor:
        """The rows of all processes, in the order of the processes; padded to the widest with zeros."""
        if self.accelerator.num_processes == 1:
            return x
        sent = x.to(torch.uint8) if x.dtype == torch.bool else x
        if x.dim() > 1:
            sent = self.accelerator.pad_across_processes(sent, dim=1)
        return self.accelerator.gather(sent.contiguous()).to(x.dtype)

    def _hclm_renormalise(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """This process's rewards (N,) -> its advantages as the base algorithm would have made them, and their scale."""
        if sentence := acts_between(self.args):
            raise ValueError(f"a term shapes the rewards, {sentence}")
        everywhere = self._hclm_everywhere(rewards)
        scale = self._hclm_reward_scale(everywhere)
        advantages = torch.nan_to_num(self._hclm_centre(everywhere) / scale, nan=0.0)
        first = self.accelerator.process_index * len(rewards)
        own = slice(first, first + len(rewards))
        return advantages[own], scale[own]

    def _hclm_language_model(self) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    def _hclm_over_vocab(self, functional: Callable[[Tensor], Tensor], states: Tensor, mask: Tensor) -> Tensor:
        with self._hclm_head() as head:
            return over_vocab(functional, states, head, mask=mask)

    def _hclm_slope(self, direction: Tensor, states: Tensor, ids: Tensor) -> Tensor:
        with self._hclm_head() as head:
            return slope_along(direction, states, ids, head)

    @contextmanager
    def _hclm_head(self) -> Iterator[Head]:
        """The output head with the factors that TRL's fused forward applies; whole inside, also where it is sharded.

        All processes must enter it alike: ZeRO-3 gathers the head here. FSDP2 leaves it whole after a forward pass;
        where it did not, it is gathered without gradient alone.
        """
        model = self._hclm_language_model()
        head = model.get_output_embeddings()
        weight, bias = head.weight, head.bias
        with maybe_gather_lm_head_ctx(weight, bias):
            if isinstance(weight, DTensor):
                if torch.is_grad_enabled():
                    raise ValueError(
                        f"{', '.join(self._hclm.chain.needs_vocab_gradient)}: reads the whole next-token distribution "
                        "with gradient, and FSDP shards the output head again after the forward pass: leave it out of "
                        "the wrapped classes, or use DDP"
                    )
                weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
            yield Head(weight=weight, bias=bias, temperature=self.temperature, **_factors(model.config))

    def _hclm_warn_of_inert_links(self) -> None:
        if is_on_policy(self.args):
            for link in self._hclm.chain.links:
                if link.term.inert_on_policy:
                    logger.warning(
                        "the entropy term '%s' does nothing in this run, which uses each rollout for one update: set "
                        "num_iterations > 1 or steps_per_generation > gradient_accumulation_steps",
                        link.name,
                    )


def _factors(model_config: PretrainedConfig) -> dict[str, Any]:
    """What stands between the head's projection and the logits, as TRL's fused forward reads it: `Head`'s fields."""
    config = model_config.get_text_config()
    multipliers = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # of Cohere, Muse, Falcon-H1
    given = [getattr(config, name, None) for name in multipliers]
    divisor = getattr(config, "logits_scaling", None)  # of Granite; HyperCLOVA X multiplies by it
    if divisor is not None:
        given.append(divisor if config.model_type == "hyperclovax" else 1 / divisor)
    scale = next((float(value) for value in given if value is not None), 1.0)
    return {"scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}


class GRPOTrainer(EntropyTermsMixin, trl.GRPOTrainer):
    """TRL's GRPOTrainer with `entropy_terms` (an argument here, or a field of GRPOConfig): see docs/extending.md."""

    def _hclm_is_sequence_level(self) -> bool:
        return self.importance_sampling_level == "sequence"

    def _hclm_refuse_weighted_kl(self) -> None:
        if self.beta:
            raise ValueError(
                "token weights with importance_sampling_level='sequence' act on the log-probs, so with beta > 0 they "
                "would weight the KL penalty too: set beta=0, or importance_sampling_level='token'"
            )

    def _hclm_is_old(self, logps: Tensor, output: Mapping[str, Any]) -> bool:
        return logps is output.get("old_per_token_logps")

    def _hclm_centre(self, rewards: Tensor) -> Tensor:
        mean = torch.nanmean(rewards.view(-1, self.num_generations), dim=1)
        return rewards - mean.repeat_interleave(self.num_generations, dim=0)

    def _hclm_reward_scale(self, rewards: Tensor) -> Tensor:
        if self.scale_rewards == "none" or self.multi_objective_aggregation != "sum_then_normalize":
            return torch.ones_like(rewards)
        if self.scale_rewards == "batch":
            return nanstd(rewards).expand_as(rewards) + 1e-4
        std = nanstd(rewards.view(-1, self.num_generations), dim=1)
        return std.repeat_interleave(self.num_generations, dim=0) + 1e-4


class RLOOTrainer(EntropyTermsMixin, trl.RLOOTrainer):
    """TRL's RLOOTrainer with `entropy_terms` (an argument here, or a field of RLOOConfig): see docs/extending.md.

    RLOO's ratio is that of a whole response, so a token weight acts on the gradient of the token's log-prob.
    """

    def _hclm_is_sequence_level(self) -> bool:
        return True

    def _hclm_refuse_weighted_kl(self) -> None:
        """RLOO's KL is in the reward, where token weights do not reach it."""

    def _hclm_is_old(self, logps: Tensor, output: Mapping[str, Any]) -> bool:
        return torch.equal((logps * output["completion_mask"]).sum(1), output["old_logps"])

    def _hclm_centre(self, rewards: Tensor) -> Tensor:
        grouped = rewards.view(-1, self.num_generations)
        others = (~grouped.isnan()).sum(dim=1, keepdim=True) - 1
        return rewards - ((grouped.nansum(dim=1, keepdim=True) - grouped) / others).view(-1)

    def _hclm_reward_scale(self, rewards: Tensor) -> Tensor:
        return torch.ones_like(rewards)
