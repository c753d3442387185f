"""One entropy, log-prob or state that is not finite: what a term remembers stays finite, and the term says so."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl import Term, Total
from hclm_rl.chain import TermRefused
from hclm_rl.recipe.config import find_term

from ..term_batches import first_stage, make_step, rollout

STEP = make_step()


def with_one(name: str, value: float) -> object:
    """The rollout of STEP with one token's value replaced."""
    changed = getattr(STEP, name).clone()
    changed[0, 1] = value
    return rollout(replace(STEP, **{name: changed}))


def numbers(value: object) -> list[float]:
    if isinstance(value, dict | list):
        return [number for each in (value.values() if isinstance(value, dict) else value) for number in numbers(each)]
    if isinstance(value, torch.Tensor):
        return value.flatten().tolist()
    return [float(value)]  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["force_reweight", "entropy_flow", "epo"])
def test_sums_leave_out_an_entropy_that_is_not_finite_and_count_it(name: str, value: float):
    term, memory = find_term(name)(), {}
    first = first_stage(term, with_one("old_entropy", value), memory)
    assert memory and all(math.isfinite(each) for each in numbers(memory))
    ignored = first.metrics["link/ignored"]
    assert isinstance(ignored, Total) and [each.item() for each in ignored.sums] == [1.0]
    # the mean over the other 31 of 32 tokens
    others = STEP.mask.clone()
    others[0, 1] = False
    mean = STEP.old_entropy[others].double().mean().item()
    assert memory["entropy_sum" if name == "epo" else "measured"] == pytest.approx(mean, rel=1e-6)
    clean = first_stage(find_term(name)(), rollout(STEP), {}).metrics["link/ignored"]
    assert isinstance(clean, Total) and clean.sums[0].item() == 0.0


@pytest.mark.parametrize("name", ["force_reweight", "entropy_flow"])
def test_where_no_entropy_is_finite_nothing_is_remembered_of_it(name: str):
    memory: dict = {}
    first_stage(find_term(name)(), rollout(replace(STEP, old_entropy=STEP.old_entropy * math.nan)), memory)
    assert "measured" not in memory and all(math.isfinite(each) for each in numbers(memory))


READERS: dict[str, Term] = {
    "spectrum": find_term("spectrum")(),
    "information_force": find_term("information_force")(),
    "von_neumann": find_term("von_neumann")(),
    "log_det": find_term("log_det")(),
    "variance": find_term("variance")(),
    "coding_rate": find_term("coding_rate")(),
    "group_log_det": find_term("group_log_det")(),
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("term", READERS.values(), ids=READERS.keys())
def test_states_that_are_not_finite_end_in_a_sentence_with_the_links_name(term: Term, value: float):
    memory: dict = {}
    with pytest.raises(TermRefused, match=r"^the entropy term 'link' failed in stage 1 at step 3: .*NaN"):
        first_stage(term, with_one("old_hidden", value), memory)
    assert all(math.isfinite(each) for each in numbers(memory))
