"""Samples a causal language model on the prompts of a task and measures accuracy, coverage and diversity."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hclm_rl.responses.outcomes import answer_entropy, distinct_correct, maj_at_k, pass_at_k
from hclm_rl.testbed.task import Row, Task

PASS_KS, MAJ_KS = (1, 8, 32), (8, 32)  # those above the number of samples are left out


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over the prompts, standard errors over the prompts, and the values of each prompt for paired comparisons.

    Keys of `standard_errors` and `per_prompt` are those of `means()`. Counting quantities depend on the number of
    samples: compare at equal `samples` only.
    """

    prompts: int
    samples: int  # per prompt
    token_entropy: float  # nats, of the full next-token distribution at the sampling temperature, mean over all tokens
    pass_at: dict[int, float]  # k -> chance that k samples hold a right one
    maj_at: dict[int, float]  # k -> expected correctness of the commonest answer of k samples
    distinct_correct: float  # different right answers among the samples of a prompt
    answer_entropy: float  # nats; completions without an answer are one answer
    unanswered: float  # share of completions without an answer
    length: float  # tokens, end of text included
    standard_errors: dict[str, float]
    per_prompt: dict[str, list[float]]

    def means(self) -> dict[str, float]:
        """The measured quantities by name: token_entropy, pass@1, ..., maj@8, ..., distinct_correct, ..."""
        return {
            "token_entropy": self.token_entropy,
            **{f"pass@{k}": value for k, value in self.pass_at.items()},
            **{f"maj@{k}": value for k, value in self.maj_at.items()},
            "distinct_correct": self.distinct_correct,
            "answer_entropy": self.answer_entropy,
            "unanswered": self.unanswered,
            "length": self.length,
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row] | Dataset,
    task: Task,
    *,
    samples: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 1024,
) -> Evaluation:
    """`samples` completions for the prompt of each row, from the whole distribution at `temperature`.

    `batch` is the number of completions generated at once: lower it for a large model; other batches give other draws.
    The global random generators and the model's training mode are left as they were.

    Refuses no rows, fewer than one sample or batch, and a temperature that is not positive.
    """
    rows = [dict(row) for row in rows]
    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    if samples < 1 or batch < 1:
        raise ValueError(f"samples and batch must be at least 1, got {samples} and {batch}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    texts: list[str] = []
    entropy_sums: list[float] = []
    lengths: list[int] = []
    prompts = [row["prompt"] for row in rows for _ in range(samples)]
    with own_draws(model, seed), plain_generation(model):
        for start in range(0, len(prompts), batch):
            completions, entropies, mask = sample_completions(
                model, tokenizer, prompts[start : start + batch], task.max_completion_length, temperature
            )
            entropy_sums += torch.where(mask, entropies, 0).sum(dim=1).tolist()
            tokens = mask.sum(dim=1).tolist()
            lengths += tokens
            kept = [ids[:length] for ids, length in zip(completions.tolist(), tokens, strict=True)]
            texts += tokenizer.batch_decode(kept, skip_special_tokens=True)
    return measured(rows, task, samples, texts, entropy_sums, lengths)


@contextmanager
def own_draws(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """The global generators of the CPU and of the model's device begin at `seed`; after it they are as before."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and none of the model's own sampling settings (top-k, penalties, ...) but its ends of text."""
    was_training, settings = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig(eos_token_id=settings.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = settings
        model.train(was_training)


class _TemperatureAndEntropy(LogitsProcessor):
    """Divides by the temperature and keeps the entropy of what comes out.

    transformers applies its own temperature after all custom processors, so that one must stay 1.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.entropies: list[Tensor] = []  # a tensor (N,) a step, nats

    def __call__(self, input_ids: Int[Tensor, "N L"], scores: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        logps = (scores / self.temperature).log_softmax(dim=-1)
        # 0 log 0 = 0 for words that the model rules out
        self.entropies.append(-torch.where(logps > -math.inf, logps.exp() * logps, 0).sum(dim=-1))
        return logps


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a text: the tokenizer's, and those of the model's own settings."""
    eos = model.generation_config.eos_token_id
    ends = (tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos]))
    return [end for end in ends if isinstance(end, int)]


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_completion_length: int,
    temperature: float,
) -> tuple[Int[Tensor, "N T"], Float[Tensor, "N T"], Tensor]:
    """Ids, entropies and mask (N, T bool: up to and with the first end of text) of one completion per prompt."""
    eos_ids = ends_of(model, tokenizer)
    encoded = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    processor = _TemperatureAndEntropy(temperature)
    sequences = model.generate(  # pyright: ignore[reportCallIssue]  (it comes with the concrete classes)
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        logits_processor=LogitsProcessorList([processor]),
        max_new_tokens=max_completion_length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        eos_token_id=eos_ids,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    completions = sequences[:, encoded["input_ids"].shape[1] :]
    is_end = torch.isin(completions, torch.tensor(eos_ids, device=completions.device))
    mask = is_end.cumsum(dim=1) - is_end.long() == 0
    return completions, torch.stack(processor.entropies, dim=1), mask


def _of_answers(row: Row, task: Task, texts: list[str]) -> dict[str, float]:
    """What the answers in the responses to one prompt show."""
    samples = len(texts)
    answers = [task.answer(row, text) for text in texts]
    is_right = [task.is_correct(row, text) for text in texts]
    correct = {answer for answer, right in zip(answers, is_right, strict=True) if right and answer is not None}
    return {
        **{f"pass@{k}": pass_at_k(samples, sum(is_right), k) for k in PASS_KS if k <= samples},
        **{f"maj@{k}": maj_at_k(answers, correct, k) for k in MAJ_KS if k <= samples},
        "distinct_correct": float(distinct_correct(answers, correct)),
        "answer_entropy": answer_entropy(answers),
        "unanswered": sum(answer is None for answer in answers) / samples,
    }


def measured(
    rows: list[Row], task: Task, samples: int, texts: list[str], entropy_sums: list[float], lengths: list[int]
) -> Evaluation:
    """What responses, `samples` in a row for each prompt, show; of each its text, sum of entropies (nats), tokens."""
    per_prompt: dict[str, list[float]] = {"token_entropy": []}
    prompt_tokens = []
    for index, row in enumerate(rows):
        of_prompt = slice(index * samples, (index + 1) * samples)
        prompt_tokens.append(sum(lengths[of_prompt]))
        values = {
            "token_entropy": sum(entropy_sums[of_prompt]) / prompt_tokens[-1],
            **_of_answers(row, task, texts[of_prompt]),
            "length": prompt_tokens[-1] / samples,
        }
        for name, value in values.items():
            per_prompt.setdefault(name, []).append(value)
    means = {name: sum(values) / len(rows) for name, values in per_prompt.items()}
    errors = {name: _standard_error(values, means[name]) for name, values in per_prompt.items()}
    # the mean over all tokens is a ratio of sums; its error is that of the linearised ratio
    means["token_entropy"] = sum(entropy_sums) / sum(lengths)
    mean_tokens = sum(lengths) / len(rows)
    residuals = [
        (entropy - means["token_entropy"]) * tokens / mean_tokens
        for entropy, tokens in zip(per_prompt["token_entropy"], prompt_tokens, strict=True)
    ]
    errors["token_entropy"] = _standard_error(residuals, 0.0)
    return Evaluation(
        prompts=len(rows),
        samples=samples,
        token_entropy=means["token_entropy"],
        pass_at={k: means[f"pass@{k}"] for k in PASS_KS if k <= samples},
        maj_at={k: means[f"maj@{k}"] for k in MAJ_KS if k <= samples},
        distinct_correct=means["distinct_correct"],
        answer_entropy=means["answer_entropy"],
        unanswered=means["unanswered"],
        length=means["length"],
        standard_errors=errors,
        per_prompt=per_prompt,
    )


def _standard_error(values: list[float], mean: float) -> float:
    """Of the mean over prompts; NaN for one prompt."""
    n = len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else math.nan
