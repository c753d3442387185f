"""TRL's own vLLM of a run, as a rollout draws from it: in the training process, a request for each branch.

TRL asks it for whole responses, by one set of settings. A rollout asks with a length and a seed for each, so it goes to
TRL's `VLLMGeneration.llm` itself; the weights are synchronised as TRL does it, and its sleep is kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import trl.generation.vllm_generation as trls
from trl.extras.profiling import profiling_context

from ..rollouts.vllm_sampler import Continuation, Request


@dataclass(frozen=True, kw_only=True)
class VllmEngine:
    """An engine of the rollouts."""

    llm: Any
    context: int
    ends: Sequence[int]
    settings: Mapping[str, float]  # of a draw, but for temperature, length and seed

    def draw(self, requests: Sequence[Request], temperature: float) -> list[Continuation]:
        """One for each request, in their order."""
        params = [
            trls.SamplingParams(  # pyright: ignore[reportAttributeAccessIssue, reportPossiblyUnboundVariable]
                n=1,
                temperature=temperature,
                max_tokens=each.most,
                seed=each.seed,
                stop_token_ids=list(self.ends),
                logprobs=0,
                **self.settings,
            )
            for each in requests
        ]
        texts = [{"prompt_token_ids": each.ids} for each in requests]
        outputs = self.llm.generate(texts, sampling_params=params, use_tqdm=False)
        logps, _ = trls.extract_logprobs(outputs)
        assert logps is not None  # they were asked for
        return [
            Continuation(
                ids=list(output.outputs[0].token_ids),
                logps=[of_token[0] for of_token in row],
                is_ended=output.outputs[0].finish_reason == "stop",
                reused=max(0, output.num_cached_tokens or 0),
            )
            for output, row in zip(outputs, logps, strict=True)
        ]


@contextmanager
def engine_of(trainer: Any) -> Iterator[VllmEngine | None]:
    """The run's vLLM with the weights of this step, awake inside; None in a run without it.

    Every process must enter it: the weights of a sharded model are gathered.
    """
    if not trainer.use_vllm:
        yield None
        return
    vllm, args, step = trainer.vllm_generation, trainer.args, trainer.state.global_step
    sleeps = vllm.enable_sleep_mode
    if step != trainer._last_loaded_step or (sleeps and vllm._llm_weights_sleeping):
        with profiling_context(trainer, "sync_weights"):
            vllm.sync_weights()
        trainer._last_loaded_step = step
    if sleeps:
        vllm.llm.wake_up(tags=["kv_cache"])
    try:
        yield VllmEngine(
            llm=vllm.llm,
            context=vllm.llm.llm_engine.model_config.max_model_len,
            ends=trainer.eos_token_ids,
            settings={
                "top_p": args.top_p,
                "top_k": args.top_k,
                "min_p": args.min_p or 0.0,
                "repetition_penalty": args.repetition_penalty,
            },
        )
    finally:
        if sleeps:
            vllm.llm.sleep(level=2)
            vllm._llm_weights_sleeping = True
