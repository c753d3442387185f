"""Right responses kept from earlier steps, without padding, as tensors that fit a term's memory."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..equations.functional import in_double
from ..equations.gram import gram_factor
from ..types import Rollout, Transcript
from .answers import Extract, answer_of, final_text

logger = logging.getLogger(__name__)

PREFIX = "right_"  # of the keys in a memory
Keep = Literal["first", "log_det", "count"]
ROUNDED = 1e-6  # of a reward
OF_PROMPT = ("prompt_ids",)
OF_TEXT = ("ids", "mask", "logps")


@dataclass(frozen=True, kw_only=True)
class RightAnswers:
    """K right responses, the texts of all one after the other, on the CPU; the same on all processes.

    A response takes 28 bytes, 4 for each token of its prompt, 9 for each of its own, 4 for each of its D states, and 8
    where answers are counted.
    """

    prompt: Int[Tensor, "K"]  # a number that stands for the prompt
    answer: Int[Tensor, "K"]  # a number that stands for prompt and answer
    step: Int[Tensor, "K"]  # the optimiser step at which it was first sampled
    prompt_length: Int[Tensor, "K"]
    length: Int[Tensor, "K"]
    prompt_ids: Int[Tensor, "prompts"]
    ids: Int[Tensor, "tokens"]
    mask: Bool[Tensor, "tokens"]  # False on what tools wrote
    logps: Float[Tensor, "tokens"]  # of the policy that first sampled it; 0 off the mask
    states: Float[Tensor, "K D"]  # its pooled hidden state; D is 0 where nobody asks
    counted: Int[Tensor, "K C"]  # what it is counted by: a number for prompt and answer; C is 0 where nobody counts

    def __len__(self) -> int:
        return len(self.prompt)

    def rows(self, which: Bool[Tensor, "K"] | Int[Tensor, "R"]) -> "RightAnswers":
        """Some of them, in that order."""
        order = which.nonzero().squeeze(1) if which.dtype == torch.bool else which
        of_prompt, of_text = (pieces(lengths, order) for lengths in (self.prompt_length, self.length))
        at: dict[str, Tensor] = {**dict.fromkeys(OF_PROMPT, of_prompt), **dict.fromkeys(OF_TEXT, of_text)}
        return RightAnswers(**{x.name: getattr(self, x.name)[at.get(x.name, order)] for x in fields(self)})

    def joined(self, more: "RightAnswers") -> "RightAnswers":
        """Both, these first."""
        names = [each.name for each in fields(self)]
        return RightAnswers(**{name: torch.cat([getattr(self, name), getattr(more, name)]) for name in names})

    def with_new(
        self, new: "RightAnswers", capacity: int, keep: Keep, sampled: Mapping[int, int] | None = None
    ) -> "RightAnswers":
        """These and the first of each new answer, at most `capacity` to a prompt; `sampled`: how often each was.

        Refuses answers without what these are kept by.
        """
        if any(getattr(self, name).size(1) != getattr(new, name).size(1) for name in ("states", "counted")):
            raise ValueError(
                f"the store of right answers was kept with another `keep` than '{keep}', by what this one does not "
                "read: resume with the `keep` that it was written with, or start anew from the checkpoint's weights"
            )
        has = set(self.answer.tolist())
        counts = Counter(self.prompt.tolist())
        takes = []
        for i, (prompt, answer) in enumerate(zip(new.prompt.tolist(), new.answer.tolist(), strict=True)):
            if answer not in has and (keep != "first" or counts[prompt] < capacity):
                takes.append(i)
                has.add(answer)
                counts[prompt] += 1
        if not takes:
            return self
        joined = self.joined(new.rows(torch.tensor(takes)))
        stays = torch.ones(len(joined), dtype=torch.bool)
        for prompt in (of for of, count in counts.items() if count > capacity):
            rows = (joined.prompt == prompt).nonzero().squeeze(1)
            stays[rows] = False
            if keep == "count":
                often = [(sampled or {}).get(number, 0) for number in joined.counted[rows].flatten().tolist()]
                chosen = torch.tensor(often).argsort(stable=True)[:capacity]
            else:
                chosen = widest_apart(joined.states[rows], capacity)
            stays[rows[chosen]] = True
        return joined if stays.all() else joined.rows(stays)

    def save(self, memory: dict) -> None:
        """Into the term's memory, for the checkpoint."""
        memory |= {PREFIX + each.name: getattr(self, each.name) for each in fields(self)}

    def bytes(self) -> int:
        """What they take in memory and in a checkpoint."""
        return sum(getattr(self, each.name).nbytes for each in fields(self))

    def padded(self) -> dict[str, Tensor]:
        """prompt_ids, prompt_mask (K, P), padded on the left; ids, present, mask, logps (K, T), on the right."""
        prompts = list(self.prompt_ids.long().split(self.prompt_length.tolist()))
        lengths = self.length.tolist()
        text = {
            "ids": self.ids.long(),
            "present": torch.ones_like(self.mask),
            "mask": self.mask,
            "logps": self.logps,
        }
        return {
            "prompt_ids": pad_sequence(prompts, True, padding_side="left"),
            "prompt_mask": pad_sequence([torch.ones_like(x).bool() for x in prompts], True, padding_side="left"),
            **{name: pad_sequence(list(x.split(lengths)), True) for name, x in text.items()},
        }


def widest_apart(states: Float[Tensor, "K D"], capacity: int) -> Int[Tensor, "C"]:
    """Which rows stay when, one at a time, the one with the least leverage in their log-determinant leaves.

    eps is the mean eigenvalue of the Gram matrix, so leverages are graded whatever the unit of the states. Of a tie the
    last leaves.
    """
    stays = torch.arange(len(states))
    while len(stays) > capacity:
        z = in_double(states[stays])
        eps = float((z - z.mean(dim=0)).square().sum()) / len(z) ** 2
        leverage = gram_factor(z, eps).leverage() if eps > 0 else z.new_zeros(len(z))
        last = len(stays) - 1 - int(leverage.flip(0).argmin())
        stays = stays[torch.arange(len(stays)) != last]
    return stays


def pieces(lengths: Int[Tensor, "K"], order: Int[Tensor, "R"]) -> Int[Tensor, "tokens"]:
    """Where the tokens of the pieces `order` lie, the pieces of these lengths lying one after the other."""
    starts = lengths.long().cumsum(dim=0) - lengths
    own = lengths[order].long()
    within = torch.arange(int(own.sum())) - (own.cumsum(dim=0) - own).repeat_interleave(own)
    return starts[order].repeat_interleave(own) + within


def unpadded(
    text: Transcript,
    mask: Bool[Tensor, "R T"],
    logps: Float[Tensor, "R T"],
    *,
    prompt: Int[Tensor, "R"],
    answer: Int[Tensor, "R"],
    step: int,
    states: Float[Tensor, "R D"],
    counted: Int[Tensor, "R C"],
) -> RightAnswers:
    """Responses as a rollout has them, wherever their padding is."""
    return RightAnswers(
        prompt=prompt,
        answer=answer,
        step=torch.full_like(prompt, step, dtype=torch.int32),
        prompt_length=text.prompt_mask.sum(dim=1).int(),
        length=text.present.sum(dim=1).int(),
        prompt_ids=text.prompt_ids[text.prompt_mask].int(),
        ids=text.ids[text.present].int(),
        mask=mask[text.present],
        logps=torch.where(mask, logps, 0.0)[text.present].float(),
        states=states.float(),
        counted=counted,
    )


def kept_in(memory: dict) -> RightAnswers | None:
    """What `save` left there."""
    if PREFIX + "ids" not in memory:
        return None
    return RightAnswers(**{each.name: memory[PREFIX + each.name].cpu() for each in fields(RightAnswers)})


def number_of(*said: str | Sequence[int]) -> int:
    """64 bits that stand for a text or a row of token ids: equal for equals, of others once in 10^19."""
    found = hashlib.blake2b(digest_size=8)
    for each in said:
        found.update(each.encode(errors="replace") if isinstance(each, str) else repr(list(each)).encode())
        found.update(b"\0")
    return int.from_bytes(found.digest(), "big", signed=True)


def text_numbers(rollout: Rollout) -> Int[Tensor, "N"]:
    """A number for the prompt's text of each row of all processes: the same in every step of a run."""
    said = [
        [prompt] if isinstance(prompt, str) else [str(each.get("role")) + ":" + final_text([each]) for each in prompt]
        for prompt in rollout.prompts
    ]
    return rollout.everywhere(torch.tensor([number_of(*texts) for texts in said], device=rollout.mask.device))


def prompt_keys(rollout: Rollout) -> list[str]:
    """The same numbers as text, for mappings."""
    return [f"{number:x}" for number in text_numbers(rollout).tolist()]


def said_in(rollout: Rollout, extract: Extract | None) -> list[str | list[int]]:
    """What tells this process's responses apart: the answer; where there is none or nobody asks for it, the tokens."""
    tokens = [row[is_own].tolist() for row, is_own in zip(rollout.ids, rollout.mask, strict=True)]
    if extract is None:
        return list(tokens)
    answers = [answer_of(each, extract) for each in rollout.texts]
    return [ids if answer is None else answer for ids, answer in zip(tokens, answers, strict=True)]


def prompts_of(text: Transcript) -> list[list[int]]:
    """The tokens of each prompt."""
    return [ids[is_own].tolist() for ids, is_own in zip(text.prompt_ids, text.prompt_mask, strict=True)]


def prompt_numbers(rollout: Rollout) -> Int[Tensor, "N"]:
    """A number for the prompt of each row of all processes, on the CPU."""
    assert rollout.transcript is not None
    numbers = [number_of(ids) for ids in prompts_of(rollout.transcript)]
    return rollout.everywhere(torch.tensor(numbers, device=rollout.mask.device)).cpu()


def sampled_before(memory: dict, of: str = "counted", times: str = "sampled") -> dict[int, int]:
    """How often each number under `of` came so far, by default each right answer of `counted`."""
    if of not in memory:
        return {}
    return dict(zip(memory[of].tolist(), memory[times].tolist(), strict=True))


def count_in(memory: dict, new: Int[Tensor, "R"], of: str = "counted", times: str = "sampled") -> dict[int, int]:
    """The same after these; kept in memory, 12 bytes for each number, in ascending order."""
    found = Counter(sampled_before(memory, of, times))
    found.update(new.tolist())
    found = dict(sorted(found.items()))
    memory[of] = torch.tensor(list(found), dtype=torch.long)
    memory[times] = torch.tensor(list(found.values()), dtype=torch.int32)
    return found


def bytes_of(kept: RightAnswers, memory: dict) -> int:
    """What the store and the counts take."""
    return kept.bytes() + sum(memory[name].nbytes for name in ("counted", "sampled") if name in memory)


def is_right(rewards: Float[Tensor, "*S"], right_at: float | None) -> Bool[Tensor, "*S"]:
    """From `right_at` on, 1 where it is None; a response that nothing scored is not.

    A sum of weighted rewards may miss its mark by rounding: .01 + .78 + .21 is .99999994 in float32.
    """
    mark = 1.0 if right_at is None else right_at
    return rewards >= mark - ROUNDED * max(abs(mark), 1.0)


def successes(group_rewards: Float[Tensor, "P G"], right_at: float | None) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"]]:
    """(c right responses, n scored ones) of each group; those that nothing scored are in neither."""
    return is_right(group_rewards, right_at).sum(dim=1), (~group_rewards.isnan()).sum(dim=1)


def tell_once(memory: dict, about: str, sentence: str) -> None:
    """A warning, once a run."""
    if not memory.get(about):
        memory[about] = True
        logger.warning(sentence)


def tell_of_unclear_rewards(term: str, rollout: Rollout, right_at: float | None, memory: dict) -> None:
    """A warning where rewards are not 0 or 1 and nobody said which of them are right."""
    if right_at is not None:
        return
    rewards = rollout.everywhere(rollout.rewards)
    other = rewards[~rewards.isnan() & (rewards.abs() > ROUNDED) & ((rewards - 1).abs() > ROUNDED)]
    if len(other):
        tell_once(
            memory,
            "unclear",
            f"{term}: rewards should be 0 or 1, {len(other)} of {len(rewards)} are neither, such as "
            f"{other[0].item():.4g}; those of 1 or more count as right: set right_at, the reward from which a response "
            "is right",
        )


def trimmed(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the columns of padding that these rows (n, T) do not need."""
    prompt, completion = text["prompt_mask"].any(dim=0), text["present"].any(dim=0)
    return {name: x[:, prompt if name.startswith("prompt") else completion] for name, x in text.items()}
