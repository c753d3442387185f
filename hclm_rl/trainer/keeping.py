"""What the doctor looks at of a trainer: the rollouts that it makes, and the policy's states on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..types import Transcript
from .head import language_model
from .run import mask_of, transcript_of
from .scoring import aside


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A generation batch: texts, and the response tokens that count."""

    transcript: Transcript
    mask: Tensor  # (N, T)

    def pieces(self, size: int) -> Iterator["Kept"]:
        """In so many rows at once."""
        of = self.transcript
        for rows in torch.arange(len(self.mask), device=self.mask.device).split(size):
            parts = {name: getattr(of, name)[rows] for name in ("prompt_ids", "prompt_mask", "ids", "present")}
            yield Kept(transcript=replace(of, **parts), mask=self.mask[rows])


@contextmanager
def keeping_rollouts(trainer: Any, kept: list[Kept]) -> Iterator[None]:
    """Generation batches that are made inside are added to `kept`."""
    made = trainer._generate_and_score_completions

    def made_and_kept(inputs: Any) -> dict[str, Any]:
        output = made(inputs)
        kept.append(Kept(transcript=transcript_of(output), mask=mask_of(output)))
        return output

    trainer._generate_and_score_completions = made_and_kept
    try:
        yield
    finally:
        del trainer._generate_and_score_completions


def other_rollouts(trainer: Any, count: int, prompts: int, seed: int) -> list[Kept]:
    """`count` generation batches of prompts drawn from the data, which train nothing and are not logged."""
    kept: list[Kept] = []
    rows, group = trainer.train_dataset, trainer.num_generations
    was_training, group_in_evaluation = trainer.model.training, trainer.num_generations_eval
    generator = torch.Generator().manual_seed(seed)
    stream = None if isinstance(rows, Dataset) else iter(rows)
    trainer.model.eval()
    trainer.num_generations_eval = group
    try:
        with keeping_rollouts(trainer, kept), aside(trainer):
            torch.manual_seed(seed)
            for _ in range(count):
                if stream is None:
                    drawn = [rows[i] for i in torch.randperm(len(rows), generator=generator)[:prompts].tolist()]
                else:
                    drawn = [row for row, _ in zip(stream, range(prompts), strict=False)]
                trainer._generate_and_score_completions([dict(row) for row in drawn for _ in range(group)])
    finally:
        trainer.model.train(was_training)
        trainer.num_generations_eval = group_in_evaluation
        trainer._metrics["eval"].clear()
    return kept


def states(trainer: Any, of: Kept, has_gradient: bool = False, rows_at_once: int | None = None) -> Iterator[Tensor]:
    """The last hidden states that predicted the response tokens, (rows, D), piece by piece, without dropout.

    With gradient, each piece's graph is the caller's to go back through before the next. `rows_at_once`: None, as the
    trainer's.
    """
    model, backbone = trainer.model, language_model(trainer).base_model
    was_training = model.training
    model.eval()
    try:
        for piece in of.pieces(rows_at_once or trainer.args.per_device_train_batch_size):
            text = piece.transcript
            ids = torch.cat([text.prompt_ids, text.ids], dim=1)
            attention = torch.cat([text.prompt_mask, text.present], dim=1).long()
            place: slice | Tensor = slice(None)
            if rows_at_once is not None:  # a group of short responses holds some of them several times
                each, place = torch.cat([ids, attention], dim=1).unique(dim=0, return_inverse=True)
                ids, attention = each.chunk(2, dim=1)
            with torch.set_grad_enabled(has_gradient), trainer.accelerator.autocast():
                whole = backbone(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
            yield whole[place, -text.ids.size(1) - 1 : -1][piece.mask]
    finally:
        model.train(was_training)


def whole_states(trainer: Any, of: Kept, rows_at_once: int | None = None) -> Tensor:
    """All of them at once, (rows, D), without gradient."""
    return torch.cat(list(states(trainer, of, rows_at_once=rows_at_once)))
