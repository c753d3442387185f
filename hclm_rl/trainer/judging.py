"""Nothing that is not finite reaches an optimiser step: who put it there is found, on all processes together.

What links put into a micro-batch is noted as it is made (chain/finite.py): advantages and losses in the forward pass,
what the losses add to the gradient at log-probs, entropies and hidden states in the backward pass. One number then
travels with the metrics' all-reduce; only if it says so is the culprit looked for.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from accelerate.utils import DistributedType, gather_object
from torch import Tensor

from ..chain.finite import NotFinite, Watch, policy_sentence, sentence
from ..types import Attention, TokenBatch
from .head import over_vocab_of
from .run import once

logger = logging.getLogger(__name__)

EXCESS = "hclm_excess"  # the number that travels
ENTROPY, LOGP = "hclm_entropy", "hclm_logp"  # means of the step, of the policy itself


@dataclass
class Watched:
    """Gives each link aliases of what it reads, through which what its loss adds to the gradient is noted.

    Log-probs come one alias from the other, the last goes to the base algorithm's loss: a hook of a term's own sees
    the gradient of all that comes after it. The first alias whose gradient is not finite has the culprit's name.
    """

    trainer: Any
    logps: Tensor  # the last alias

    def __call__(self, batch: TokenBatch, link: str) -> TokenBatch:
        watch, coef, chain = self.trainer._hclm.watch, batch.coef, self.trainer._hclm.chain
        self.logps = watch.alias(link, "log-probs", self.logps, coef)

        def hidden(layer: int = -1) -> Tensor:
            return watch.alias(link, "hidden states", batch.hidden(layer), coef)

        def attention() -> Attention:
            read = batch.attention()
            return replace(read, entropy=watch.alias(link, "attention entropies", read.entropy, coef))

        def score(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            logps, entropy = batch.score(*args, **kwargs)
            what = "scores of other texts"
            return watch.alias(link, what, logps, coef), watch.alias(link, what, entropy, coef)

        own = replace(
            batch,
            logps=self.logps,
            entropy=watch.alias(link, "entropies", batch.entropy, coef),
            hidden=hidden,
            attention=attention,
            score=score,
        )
        if chain.needs_vocab_gradient:
            own = replace(own, over_vocab=lambda f: over_vocab_of(self.trainer, f, hidden(), batch.mask))
        return own


def judge(trainer: Any, watch: Watch, excess: float, policy: str = "") -> None:
    """Stops all processes together where one of them noted what is not finite; forgets what was noted."""
    if excess == 0:
        watch.noted.clear()
        return
    found = watch.findings()
    watch.noted.clear()
    if trainer.accelerator.num_processes > 1:
        found = gather_object(found)
    raise NotFinite(sentence(found, trainer.state.global_step, policy and f"{policy}. Of these "))


@contextmanager
def before_deepspeed_steps(trainer: Any) -> Iterator[None]:
    """DeepSpeed makes its optimiser step at the end of the backward pass: inside, the judgement comes before it."""
    if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED or not trainer._hclm.chain.links:
        yield
        return
    engine = trainer.accelerator.deepspeed_engine_wrapped.engine
    step = engine.step

    def judged(*args: Any, **kwargs: Any) -> Any:
        excess = trainer._hclm.watch.excess(trainer.accelerator.device)
        judge(trainer, trainer._hclm.watch, cast(Tensor, trainer.accelerator.reduce(excess, reduction="sum")).item())
        return step(*args, **kwargs)

    engine.step = judged
    try:
        yield
    finally:
        engine.step = step


def say_of_policy(trainer: Any, *, entropies: bool = False, logps: bool = False) -> str:
    """What is wrong with the policy; said once a run, with what it disables."""
    if not (entropies or logps):
        return ""
    said = policy_sentence(entropies, logps, trainer.state.global_step)
    if once(trainer, "policy") and trainer.accelerator.is_main_process:
        links = trainer._hclm.chain.links
        held = [link.name for link in links if trainer._hclm.state.controller[link.name]]
        stands = f"; the coefficient of {', '.join(held)} follows the entropy and stays as it is" if held else ""
        logger.warning("%s. Terms that read them act on NaN, or not at all%s", said, stands)
    return said
