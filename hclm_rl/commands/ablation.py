"""A step of a recipe, taken whole and without some of its tokens, and what scores say of them: for `hclm-rl ablate`."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from accelerate.optimizer import AcceleratedOptimizer
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PrinterCallback

from ..equations.flow import finite_part, head_influence, loss_weights, policy_influence
from ..equations.functional import per_token
from ..recipe.arguments import Algorithm, parse
from ..recipe.refusals import refuse_unwritable
from ..terms.force_reweight import ForceReweight
from ..trainer.scoring import score
from ..types import Rollout, RolloutEffect, Term, Transcript
from .dry_run import Sizes, dry_settings
from .loading import build_trainer

Scores = Callable[[Rollout, Tensor], Tensor]  # a rollout and its advantages (N, T) -> (N, T)


def steer_score(rollout: Rollout, advantages: Tensor) -> Tensor:
    """-A (1 - p) (log p + H), signed; its size is what STEER weighs by at ratio 1."""
    logps, entropy = rollout.scored()
    return -advantages * (1 - logps.exp()) * (logps + entropy)


def log_det_score(rollout: Rollout, advantages: Tensor) -> Tensor:
    """N <F_i, A_i d log p_i / dz_i>; 0 where the states have no spread."""
    found = ForceReweight(by="representation", unit="nats", floor=-1.0).states(rollout, advantages, {})
    return torch.zeros_like(advantages) if found is None else found[1]


# what each says that the token's own update does to the entropy: below 0, it burns
SCORES: Final[dict[str, Scores]] = {
    "logits": lambda rollout, advantages: policy_influence(rollout, advantages)[1],
    "head": lambda rollout, advantages: head_influence(rollout, advantages)[1],
    "steer": steer_score,
    "log_det": log_det_score,
}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A generation batch of the dry run."""

    transcript: Transcript
    prompts: list
    mask: Bool[Tensor, "N T"]
    advantages: Float[Tensor, "N T"]  # times the token's part in the loss's own mean
    scores: dict[str, Float[Tensor, "N T"]]

    def rows(self, which: Tensor) -> "Seen":
        """Those responses alone."""
        parts = {name: value[which] for name, value in vars(self.transcript).items()}
        return replace(
            self,
            transcript=Transcript(**parts),
            prompts=[self.prompts[i] for i in torch.arange(len(self.mask))[which.cpu()].tolist()],
            mask=self.mask[which],
            advantages=self.advantages[which],
            scores={name: value[which] for name, value in self.scores.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Watcher(Term):
    """Changes nothing; keeps every generation batch with the scores of its tokens."""

    needs_scores: ClassVar[bool] = True
    needs_vocab: ClassVar[bool] = True
    needs_rescoring: ClassVar[bool] = True
    is_diagnostic: ClassVar[bool] = True

    names: tuple[str, ...] = tuple(SCORES)
    seen: list[Seen] = field(default_factory=list)

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        assert rollout.transcript is not None
        weights, advantages = loss_weights(rollout), per_token(rollout.advantages, rollout.mask)
        scores = {name: SCORES[name](rollout, advantages) for name in self.names}
        self.seen.append(
            Seen(
                transcript=rollout.transcript,
                prompts=[str(prompt) for prompt in rollout.prompts],
                mask=rollout.mask,
                advantages=torch.where(rollout.mask, advantages * weights, 0),
                scores={name: finite_part(of, rollout.mask)[0] * weights for name, of in scores.items()},
            )
        )
        return RolloutEffect()


@dataclass(frozen=True, kw_only=True)
class Step:
    """An optimiser step that is about to be taken, and what the entropy is measured on."""

    trainer: Any
    batch: Seen
    held_out: list[Seen]  # of other prompts
    learning_rate: float

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in self.trainer.model.parameters() if p.requires_grad]

    @property
    def trained(self) -> Bool[Tensor, "N T"]:
        """The tokens that have a gradient."""
        return self.batch.mask & (self.batch.advantages != 0)

    def gradient(self, tokens: Bool[Tensor, "N T"]) -> list[Tensor]:
        """Of the policy loss, what these tokens give: -mean over all tokens of A log p, at ratio 1."""
        self.trainer.model.zero_grad()
        count, rows = self.batch.mask.sum(), tokens.any(dim=1).nonzero().squeeze(1)
        for some in rows.split(self.trainer.args.per_device_train_batch_size):
            part = self.batch.rows(some)
            logps, _ = score(self.trainer, self.trainer.model, part.transcript)
            (-torch.where(tokens[some], part.advantages * logps, 0).sum() / count).backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in self.parameters]
        self.trainer.model.zero_grad()
        return found

    def entropy(self) -> float:
        """Nats, mean over the tokens held out."""
        total, count = 0.0, 0
        with torch.no_grad():
            for each in self.held_out:
                _, entropy = score(self.trainer, self.trainer.model, each.transcript)
                total += torch.where(each.mask, entropy, 0).double().sum().item()
                count += int(each.mask.sum())
        return total / count

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The recipe's, without accelerate's wrapper."""
        given = self.trainer.optimizer
        return given.optimizer if isinstance(given, AcceleratedOptimizer) else given

    def in_float64(self) -> "Step":
        """The same step of the model in float64: a single token moves a mean by less than float32 can tell."""
        self.trainer.model.double()
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))  # casts its memory to the parameters
        return self

    def entropy_after(self, gradient: Sequence[Tensor]) -> float:
        """The entropy held out if the step were taken with this gradient; all is put back."""
        optimizer = self.optimizer
        state, before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in self.parameters]
        try:
            for p, own in zip(self.parameters, gradient, strict=True):
                p.grad = own.clone()
            if self.trainer.args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.trainer.args.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate
            optimizer.step()
            return self.entropy()
        finally:
            optimizer.load_state_dict(state)
            with torch.no_grad():
                for p, old in zip(self.parameters, before, strict=True):
                    p.copy_(old)
            self.trainer.model.zero_grad()

    def moved_by(self, parts: Sequence[Bool[Tensor, "N T"]]) -> list[float]:
        """Nats by which each part moves the entropy held out: with the whole step, less without the part's gradient."""
        whole = self.gradient(self.trained)
        with_all = self.entropy_after(whole)
        found = []
        for part in parts:
            rest = [a - b for a, b in zip(whole, self.gradient(part), strict=True)]
            found.append(with_all - self.entropy_after(rest))
        return found


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What a score says of the parts of a step, beside what they did."""

    score: str
    recipe: str
    tokens: int  # that have a gradient
    held_out: int  # responses
    entropy: float  # nats, held out, before the step
    step: float  # nats, by the whole step
    said: list[float]  # mean over all tokens of the score, on the part
    did: list[float]  # nats

    @property
    def correlation(self) -> float:
        """Spearman's, between said and did."""
        from scipy import stats

        return float(stats.spearmanr(self.said, self.did)[0])  # type: ignore[arg-type]


def sorted_parts(step: Step, name: str, parts: int) -> list[Bool[Tensor, "N T"]]:
    """The tokens that have a gradient, by the score, in equal parts from the least to the greatest."""
    places = step.trained.nonzero()
    if len(places) < parts:
        raise ValueError(
            f"{parts} parts need as many tokens with an advantage, the step has {len(places)}: give more prompts"
        )
    order = step.batch.scores[name][step.trained].argsort(stable=True)
    found = []
    for part in order.tensor_split(parts):
        chosen = torch.zeros_like(step.trained)
        chosen[tuple(places[part].T)] = True
        found.append(chosen)
    return found


def ablated(step: Step, name: str, recipe: str, parts: int = 10) -> Ablation:
    """The parts of the step by that score."""
    chosen, before = sorted_parts(step, name, parts), step.entropy()
    count = step.batch.mask.sum()
    return Ablation(
        score=name,
        recipe=recipe,
        tokens=int(step.trained.sum()),
        held_out=sum(len(each.mask) for each in step.held_out),
        entropy=before,
        step=step.entropy_after(step.gradient(step.trained)) - before,
        said=[(torch.where(part, step.batch.scores[name], 0).sum() / count).item() for part in chosen],
        did=step.moved_by(chosen),
    )


def prepared(
    line: Sequence[str], folder: str, algorithm: Algorithm = "grpo", prompts: int = 16, batches: int = 4, **own: object
) -> Step:
    """Dry steps at learning rate 0, which fill the optimiser's memory; the last batch is the step's."""
    config = parse(algorithm, line)[1]
    if config.world_size > 1:
        raise ValueError(f"hclm-rl ablate runs on one process, got {config.world_size}")
    refuse_unwritable(Path(config.output_dir or "trainer_output"))
    group = config.num_generations or 1
    rows = min(config.per_device_train_batch_size, prompts * group)
    rows = max(rows - rows % group, group)
    of = Sizes(rows=rows, pieces=max(prompts * group // rows, 1), updates=1, group=group, is_whole=True)
    # the watcher is a term, beside which TRL's own control is refused
    alone = {"max_steps": batches, "entropy_terms": [], "entropy_coef": 0.0, "use_adaptive_entropy": False}
    settings = dry_settings(config, of, batches, folder) | alone | own
    watcher = Watcher()
    given = parse(algorithm, line, instead=settings)
    given[1].entropy_terms = [watcher]
    trainer, _ = build_trainer(algorithm, given, [])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert trainer.model is not None
    trainer.model.eval()  # no dropout
    *others, last = watcher.seen
    asked = set(last.prompts)
    kept = [each.rows(torch.tensor([prompt not in asked for prompt in each.prompts])) for each in others]
    held_out = [each for each in kept if each.mask.any()]
    if not held_out:
        raise ValueError("no prompt is held out: give data with more prompts than one step takes, or more --batches")
    return Step(trainer=trainer, batch=last, held_out=held_out, learning_rate=config.learning_rate)
