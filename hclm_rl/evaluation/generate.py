"""Responses of a model, batch by batch, each kept on disk as soon as it is there.

A run that is killed loses at most the batch it was at, and a second run with the same settings generates nothing. Runs
that share a file at the same time each append whole batches, which say what they answer.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from ..decoding.power_sampling import PowerSampling
from ..decoding.rows import streams_of
from . import REPORT_NAME

GeneratorName = Literal["transformers", "vllm"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn; part of what two models must share to be compared."""

    samples: int = 64  # per problem
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0
    batch: int = 64  # responses generated at once; other batches give other draws
    power: PowerSampling | None = None  # whole texts from p^alpha instead, at temperature 1

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch"):
            if (value := vars(self)[name]) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.power and (self.temperature != 1 or self.top_p != 1):  # its proposals must cover the model's own texts
            given = f"{self.temperature} and {self.top_p}"
            raise ValueError(f"power sampling needs temperature 1 and top_p 1, got {given}")

    def key(self) -> dict:
        """What responses depend on; that of older versions where there is no power."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Response:
    """A response with its cost."""

    text: str
    tokens: int  # end of text included
    entropy: float | None  # nats, mean over its tokens, whole distribution at temperature 1; None: not measured
    is_truncated: bool  # no end of text within max_new_tokens
    drawn: int | None = None  # tokens in all, with those of the proposals, of power sampling
    accepted: float | None = None  # share of its moves


class Generator(Protocol):
    """One response to each prompt."""

    def __call__(self, prompts: list[str], sampling: Sampling, seed: int) -> list[Response]: ...


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """A ValueError with the model's name where it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"the tokenizer of '{model}' could not be loaded: {' '.join(str(error).split())}") from error


class _Entropies(LogitsProcessor):
    """Keeps the entropy of the distribution as the model gives it: custom processors run before temperature, top-p."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []  # a tensor (N,) a step, nats

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logps = scores.float().log_softmax(dim=-1)
        # 0 log 0 = 0 for words that the model rules out
        self.seen.append(-torch.where(logps > -torch.inf, logps.exp() * logps, 0).sum(dim=-1))
        return scores


class TransformersGenerator:
    """Samples with transformers, on the GPU where there is one."""

    def __init__(self, model: str, *, adds_special_tokens: bool = True) -> None:
        self.tokenizer = load_tokenizer(model)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.adds_special_tokens = adds_special_tokens
        try:
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        except (OSError, ValueError) as error:
            raise ValueError(f"the model '{model}' could not be loaded: {' '.join(str(error).split())}") from error
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.model.to(device or torch.device("cpu"))  # pyright: ignore[reportArgumentType]  (typed as a call)
        end = self.model.generation_config.eos_token_id
        ends = (self.tokenizer.eos_token_id, *(end if isinstance(end, list) else [end]))
        self.ends = sorted({each for each in ends if isinstance(each, int)})
        # none of the model's own sampling settings (top-k, penalties, ...): both models are sampled alike
        self.model.generation_config = GenerationConfig(
            eos_token_id=self.ends, pad_token_id=self.tokenizer.pad_token_id
        )

    def __call__(self, prompts: list[str], sampling: Sampling, seed: int) -> list[Response]:
        if sampling.power:
            return self.powered(prompts, sampling, sampling.power, seed)
        encoded = self.tokenizer(
            prompts,
            padding=True,
            padding_side="left",
            add_special_tokens=self.adds_special_tokens,
            return_tensors="pt",
        ).to(self.model.device)
        entropies = _Entropies()
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            sequences = self.model.generate(  # pyright: ignore[reportAttributeAccessIssue]  (typed for a protocol)
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                logits_processor=LogitsProcessorList([entropies]),
                max_new_tokens=sampling.max_new_tokens,
                do_sample=True,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=0,
            )
        completions = sequences[:, encoded["input_ids"].shape[1] :]
        is_end = torch.isin(completions, torch.tensor(self.ends, device=completions.device))
        mask = is_end.cumsum(dim=1) - is_end.long() == 0  # up to and with the first end of text
        lengths = mask.sum(dim=1)
        sums = torch.where(mask, torch.stack(entropies.seen, dim=1), 0).sum(dim=1)
        kept = [ids[:length] for ids, length in zip(completions.tolist(), lengths.tolist(), strict=True)]
        texts = self.tokenizer.batch_decode(kept, skip_special_tokens=True)
        rows = zip(texts, lengths.tolist(), (sums / lengths).tolist(), is_end.any(dim=1).tolist(), strict=True)
        return [
            Response(text=text, tokens=tokens, entropy=entropy, is_truncated=not ended)
            for text, tokens, entropy, ended in rows
        ]

    def powered(self, prompts: list[str], sampling: Sampling, power: PowerSampling, seed: int) -> list[Response]:
        """Responses by power sampling, each with what it drew and how many of its moves were accepted."""
        found = power(
            self.model,  # pyright: ignore[reportArgumentType]  (typed for a protocol)
            self.tokenizer(prompts, add_special_tokens=self.adds_special_tokens)["input_ids"],
            streams_of(seed, range(len(prompts))),
            max_new_tokens=sampling.max_new_tokens,
            ends=self.ends,
            pad=self.tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
        )
        texts = self.tokenizer.batch_decode([each.response.ids for each in found], skip_special_tokens=True)
        return [
            Response(
                text=text,
                tokens=len(each.response.ids),
                entropy=sum(each.response.entropies) / len(each.response.ids),
                is_truncated=not each.response.is_ended,
                drawn=each.tokens,
                accepted=each.accepted / each.moves if each.moves else None,
            )
            for text, each in zip(texts, found, strict=True)
        ]


class VllmGenerator:
    """vLLM does not give the whole distribution of a token, so the token entropy is not measured."""

    def __init__(self, model: str, *, adds_special_tokens: bool = True) -> None:
        try:
            from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError("vllm is missing: pip install 'hclm-rl[vllm]', or drop --generator vllm") from None
        self.params = SamplingParams
        self.tokenizer = load_tokenizer(model)
        self.adds_special_tokens = adds_special_tokens
        # "vllm": not the sampling defaults of the model's generation_config.json
        self.llm = LLM(model=model, generation_config="vllm")

    def __call__(self, prompts: list[str], sampling: Sampling, seed: int) -> list[Response]:
        if sampling.power:
            raise ValueError("power sampling runs with transformers: drop --generator vllm, or drop --power")
        ids = self.tokenizer(prompts, add_special_tokens=self.adds_special_tokens)["input_ids"]
        params = [
            self.params(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=seed + i,  # equal prompts with equal seeds would get equal responses
            )
            for i in range(len(prompts))
        ]
        outputs = self.llm.generate([{"prompt_token_ids": each} for each in ids], params, use_tqdm=False)
        first = [each.outputs[0] for each in outputs]
        return [
            Response(text=one.text, tokens=len(one.token_ids), entropy=None, is_truncated=one.finish_reason == "length")
            for one in first
        ]


GENERATORS: dict[GeneratorName, Callable[..., Generator]] = {
    "transformers": TransformersGenerator,
    "vllm": VllmGenerator,
}


SUFFIXES = (".safetensors", ".bin", ".json", ".model")


def fingerprint(model: str) -> str:
    """A folder by its files' sizes and times, so that a retrained model is another one; a hub's model by its name.

    The evaluation's own report may lie there too.
    """
    folder = Path(model)
    files = sorted(file for file in folder.glob("*") if file.suffix in SUFFIXES and file.name != REPORT_NAME)
    states = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return "\n".join([str(folder.resolve()) if files else model, *states])


def cache_file(folder: Path, model: str, prompts: Sequence[str], sampling: Sampling, generator: str) -> Path:
    """Named by all that the responses depend on."""
    key = json.dumps([fingerprint(model), list(prompts), sampling.key(), generator])
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.jsonl"


def hash_of(prompts: Sequence[str]) -> str:
    """SHA-256 of the prompts in their order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def read_batches(path: Path, asked: list[list[str]]) -> dict[int, list[Response]]:
    """Number of the batch -> responses, of the batches that are whole and answer the prompts of that number."""
    found: dict[int, list[Response]] = {}
    if not path.is_file():
        return found
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            number, responses = row["batch"], [Response(**each) for each in row["responses"]]
            is_ours = number >= 0 and row["prompts"] == hash_of(asked[number]) and len(responses) == len(asked[number])
        except (ValueError, TypeError, LookupError):  # cut off, or of another version
            continue
        if is_ours:
            found.setdefault(number, responses)  # the first, as all who read the file at any time
    return found


def append(path: Path, line: str) -> None:
    """Adds the line whole, whoever else writes; cuts off what a killed run left unfinished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")


def sample(
    make_generator: Callable[[], Generator],
    prompts: Sequence[str],
    sampling: Sampling,
    cache: Path,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Response]]:
    """`sampling.samples` responses to each prompt. The model is loaded only if the cache lacks some.

    Each batch has a seed of its own, so a resumed run draws what the uninterrupted one would have drawn.
    """
    repeated: list[str] = [prompt for prompt in prompts for _ in range(sampling.samples)]
    asked: list[list[str]] = [
        repeated[start : start + sampling.batch] for start in range(0, len(repeated), sampling.batch)
    ]
    batches = read_batches(cache, asked)
    on_batch(len(batches), len(asked))
    missing = [number for number in range(len(asked)) if number not in batches]
    if missing:
        generator = make_generator()
        for number in missing:
            seed = int.from_bytes(hashlib.sha256(f"{sampling.seed}/{number}".encode()).digest()[:4], "big")
            batches[number] = generator(asked[number], sampling, seed)
            responses = [asdict(response) for response in batches[number]]
            append(cache, json.dumps({"batch": number, "prompts": hash_of(asked[number]), "responses": responses}))
            on_batch(len(batches), len(asked))
    responses = [response for number in range(len(asked)) for response in batches[number]]
    return [responses[i * sampling.samples : (i + 1) * sampling.samples] for i in range(len(prompts))]
