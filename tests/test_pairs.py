"""Every pair of terms trains two steps: a fixed tenth of the pairs by default, the rest with `-m slow`."""

import copy
import math
import zlib
from itertools import combinations, product
from typing import Any

import pytest
import torch

from hclm_rl import build_chain
from hclm_rl.chain.state import ChainState
from hclm_rl.recipe.links import find_term
from hclm_rl.trainer.run import Run as _Run

from .tiny import beta_of, make, weights_of
from .trainer.test_invariance import STRONG, all_terms_in_order

STEPS = 2
PAIRS = list(combinations(all_terms_in_order(beta=0.04), 2))  # those that shape rewards first, as the chain wants it


def is_in_the_tenth(pair: tuple[str, str]) -> bool:
    """A draw by the names alone, so that a new term leaves the drawn pairs of the others as they are."""
    return zlib.crc32("+".join(pair).encode()) % 10 == 0


def as_parameters(pairs: list[tuple[str, str]]) -> list:
    slow = pytest.mark.slow
    return [pytest.param(*pair, marks=() if is_in_the_tenth(pair) else slow, id="+".join(pair)) for pair in pairs]


@pytest.fixture(scope="module")
def trainer(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One trainer for all pairs, which has trained a step and so has its optimiser: eight responses to two prompts."""
    sizes = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 1}
    made = make(policy, tmp_path_factory.mktemp("pairs"), fixed=True, loss_type="dapo", **sizes)
    made.train()
    made.batches = list(made.get_train_dataloader())
    made.start = weights_of(made)
    made.reference = copy.deepcopy(made.model).requires_grad_(False)
    return made


def train(trainer: Any, terms: list) -> dict[str, list[float]]:
    """Two optimiser steps with these terms from the same start; what was logged."""
    chain = build_chain(terms)
    trainer._hclm = _Run(chain=chain, state=ChainState.fresh(chain), trace=trainer._hclm.trace)
    trainer._metrics["train"].clear()
    trainer._step, trainer._buffered_inputs = 0, None
    trainer.beta = max(beta_of(type(link.term).__module__.rpartition(".")[2]) for link in chain.links)
    trainer.ref_model = trainer.reference if trainer.beta else None
    trainer.model.train()
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            weight.copy_(trainer.start[name])
    for step in range(STEPS):
        trainer.state.global_step, trainer.state.max_steps = step, STEPS
        trainer.training_step(trainer.model, trainer.batches[step % len(trainer.batches)], None)
        trainer.optimizer.step()
        trainer.model.zero_grad()
    return trainer._metrics["train"]


@pytest.mark.parametrize("first, second", as_parameters(PAIRS))
def test_two_steps_without_error_or_nan(first: str, second: str, trainer: Any):
    logged = train(trainer, [{first: STRONG.get(first, {})}, {second: STRONG.get(second, {})}])
    for name, metric in product((first, second), ("coef", "affected")):
        assert len(logged[f"{name}/{metric}"]) == (0 if find_term(name).is_diagnostic else STEPS)
    for name, values in logged.items():
        if name.startswith((f"{first}/", f"{second}/")):
            assert all(math.isfinite(value) for value in values), f"{name}: {values}"
    weights = weights_of(trainer)
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any(not torch.equal(weights[name], trainer.start[name]) for name in weights), "nothing was trained"


def test_the_drawn_pairs_are_about_a_tenth():
    drawn = sum(map(is_in_the_tenth, PAIRS))
    assert 0.05 * len(PAIRS) < drawn < 0.15 * len(PAIRS)
