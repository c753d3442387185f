"""vLLM's `LLM` as TRL and the rollouts use it, drawn with transformers, word by word and without a cache.

TRL's own VLLMGeneration stands on it, so what is tested is its weight sync, too. The real one needs a GPU.
"""

import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.generation.vllm_generation as trls
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hclm_rl.rollouts import Sampler

FROM_TRL = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(kw_only=True)
class Params:
    """vLLM's SamplingParams, those that are asked for here; it refuses others."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 16
    seed: int | None = None
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        assert self.n == 1 and self.max_tokens >= 1 and self.logprobs == 0
        assert self.seed is None or -(2**63) <= self.seed < 2**63


def scores_of(logits: Tensor, text: Tensor, params: Params) -> Tensor:
    """(1, V) log-probs of the distribution that is drawn from, vLLM's `processed_logprobs`."""
    if params.repetition_penalty != 1:
        logits = RepetitionPenaltyLogitsProcessor(penalty=params.repetition_penalty)(text, logits)
    logits = logits / params.temperature
    if params.top_k:
        logits = TopKLogitsWarper(top_k=params.top_k)(text, logits)
    if params.top_p < 1:
        logits = TopPLogitsWarper(top_p=params.top_p)(text, logits)
    if params.min_p:
        logits = MinPLogitsWarper(min_p=params.min_p)(text, logits)
    return logits.log_softmax(dim=-1)


@dataclass
class StandIn:
    """An engine with a copy of the weights, which only `load_weights` changes."""

    model: PreTrainedModel
    end: int | None = 1
    context: int = 64
    apart: float = 0.0  # nats by which its log-probs are below the trainer's
    asked: list[tuple[list[int], Params]] = field(default_factory=list)
    did: list[str] = field(default_factory=list)  # what was asked of it but for tokens, in order
    seen: list[list[int]] = field(default_factory=list)  # texts of its cache

    @property
    def llm_engine(self) -> Any:
        """The way by which TRL reaches the weights and the context."""
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        return SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=runner),
            model_config=SimpleNamespace(max_model_len=self.context),
        )

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        weights = self.model.state_dict()
        for name, value in named:
            weights[name].copy_(value)

    def reset_prefix_cache(self) -> None:
        self.did.append("sync")
        self.seen = []

    def wake_up(self, tags: list[str]) -> None:
        self.did.append(f"wake {' '.join(tags)}")

    def sleep(self, level: int) -> None:
        self.did.append("sleep")

    @torch.no_grad()
    def generate(self, prompts: list[dict], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        """A list of settings, one a prompt, or one for all."""
        if isinstance(sampling_params, Params):
            sampling_params = [sampling_params] * len(prompts)
        texts = [each["prompt_token_ids"] for each in prompts]
        return [self.one(text, params) for text, params in zip(texts, sampling_params, strict=True)]

    def one(self, text: list[int], params: Params) -> Any:
        assert len(text) < self.context
        self.asked.append((list(text), params))
        numbers, ids, logps = random.Random(params.seed), list(text), []
        cached = max((common(text, each) for each in self.seen), default=0)
        most = min(params.max_tokens, self.context - len(text))
        while len(ids) - len(text) < most:
            row = torch.tensor([ids])
            found = scores_of(self.model(input_ids=row).logits[:, -1].float(), row, params)[0]
            sums = found.double().exp().cumsum(dim=0)
            word = int(torch.searchsorted(sums, numbers.random() * sums[-1], right=True).clamp(max=len(sums) - 1))
            ids.append(word)
            logps.append({word: SimpleNamespace(logprob=found[word].item() - self.apart, rank=1)})
            if word == self.end or word in params.stop_token_ids:
                break
        self.seen.append(ids)
        reason = "stop" if ids[-1] == self.end or ids[-1] in params.stop_token_ids else "length"
        drawn = SimpleNamespace(token_ids=ids[len(text) :], logprobs=logps, finish_reason=reason)
        return SimpleNamespace(prompt_token_ids=text, outputs=[drawn], num_cached_tokens=min(cached, len(text) - 1))


class Reseeded(Sampler):
    """Draws by a stream that is sown from the branch's, as an engine with a seed for each request does."""

    def extend(self, branches: Any, **given: Any) -> None:
        for each in branches:
            if self.is_open(each):
                each.stream = random.Random(each.stream.getrandbits(63))
        super().extend(branches, **given)


def common(one: list[int], other: list[int]) -> int:
    """How many first tokens are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def install(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[StandIn]:
    """TRL finds the stand-in where it looks for vLLM; the engines that it makes, as they are made."""
    made: list[StandIn] = []

    def new(model: str, **given: Any) -> StandIn:
        if not torch.distributed.is_initialized():
            for name in FROM_TRL:  # which it sets for vLLM, and the next trainer of the process would read
                os.environ.pop(name, None)
        assert given["logprobs_mode"] == "processed_logprobs" and given["tensor_parallel_size"] == 1
        engine = StandIn(AutoModelForCausalLM.from_pretrained(model).eval(), **changes)
        with torch.no_grad():  # not yet the policy's
            for weight in engine.model.parameters():
                weight.zero_()
        made.append(engine)
        return engine

    monkeypatch.setattr(trls, "is_vllm_available", lambda: True)
    monkeypatch.setattr(trls, "LLM", new, raising=False)
    monkeypatch.setattr(trls, "SamplingParams", Params, raising=False)
    monkeypatch.setattr(trls, "empty_cache", lambda: None)
    return made
