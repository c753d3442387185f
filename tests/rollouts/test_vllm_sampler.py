"""The sampler that draws with vLLM, by itself: beside that which draws with transformers. A stand-in draws here."""

import math
import random
from typing import Any

import pytest
import torch

from hclm_rl.rollouts import Branch, Sampler
from hclm_rl.rollouts.vllm_sampler import VllmSampler
from hclm_rl.trainer.engine import VllmEngine
from tests.rollouts.test_sampler import model_of
from tests.rollouts.vllm_stand_in import Reseeded, StandIn, install


@pytest.fixture
def model() -> Any:
    return model_of("llama")


@pytest.fixture
def params(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def drawing(model: Any, *, settings: dict | None = None, engine: dict | None = None, **changes: Any) -> VllmSampler:
    stand_in = StandIn(model, **(engine or {}))
    asks = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, **(settings or {})}
    given = VllmEngine(llm=stand_in, context=stand_in.context, ends=[1], settings=asks)
    return VllmSampler(**{"model": model, "ends": [1], "pad": 0, "longest": 8, **changes}, engine=given)


def grown(sampler: Sampler, **given: Any) -> list[Branch]:
    """Texts of unlike lengths, and branches from their middle."""
    roots = sampler.begin([[2, 3], [4, 4, 2, 3, 2], [3]])
    rows = [root.fork(0, random.Random(f"{p}/{i}")) for p, root in enumerate(roots) for i in range(3)]
    sampler.extend(rows, **given)
    forks = [each.fork(len(each.ids) // 2, random.Random(f"fork {i}")) for i, each in enumerate(rows)]
    sampler.extend(forks, **given)
    return [*rows, *forks]


@pytest.mark.parametrize("kind", ["llama", "grouped heads, sliding window", "learned positions"])
@pytest.mark.parametrize("at_once", [1, 2**27])  # a token at a time, and all
def test_what_it_says_of_a_text_is_what_the_transformers_sampler_says(
    kind: str, at_once: int, params: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hclm_rl.rollouts.vllm_sampler.AT_ONCE", at_once)
    model = model_of(kind)
    due = grown(Reseeded(model=model, ends=[1], pad=0, longest=8, temperature=0.7, likeliest=3))
    found = grown(drawing(model, temperature=0.7, likeliest=3))
    for one, other in zip(found, due, strict=True):
        assert (one.ids, one.is_own, one.is_ended, one.shared) == (
            other.ids,
            other.is_own,
            other.is_ended,
            other.shared,
        )
        for name in ("logps", "entropies", "of_likeliest"):
            torch.testing.assert_close(torch.tensor(getattr(one, name)), torch.tensor(getattr(other, name)))


def test_another_temperature_is_the_draws_alone(model: Any, params: None):
    """The log-probs stay those of the loss's temperature, and the engine's error stays in them."""
    due = grown(Reseeded(model=model, ends=[1], pad=0, longest=8, temperature=0.7), temperature=1.4)
    found = grown(drawing(model, temperature=0.7, engine={"apart": 0.25}), temperature=1.4)
    assert [each.ids for each in found] == [each.ids for each in due]
    for one, other in zip(found, due, strict=True):
        # 0.25 below the policy's
        torch.testing.assert_close(torch.tensor(one.logps), torch.tensor(other.logps) - 0.25)
        torch.testing.assert_close(torch.tensor(one.entropies), torch.tensor(other.entropies))
    above = grown(drawing(model, temperature=0.7, engine={"apart": -9.0}), temperature=1.4)
    assert max(logp for each in above for logp in each.logps) == 0  # an error of the engine makes no log-prob positive


def test_the_log_probs_are_those_of_what_was_drawn_from(model: Any, params: None):
    """Of two words that are left, so the whole distribution's are lower."""
    found = grown(drawing(model, settings={"top_k": 2}, engine={"apart": 0.0}, top_k=2))
    whole = grown(Reseeded(model=model, ends=[1], pad=0, longest=8, top_k=2))
    assert [each.ids for each in found] == [each.ids for each in whole]
    pairs = [pair for a, b in zip(found, whole, strict=True) for pair in zip(a.logps, b.logps, strict=True)]
    assert all(here >= there - 1e-6 for here, there in pairs) and sum(here > there + 0.1 for here, there in pairs) > 5


def test_settings_lengths_and_seeds_reach_the_engine(model: Any, params: None):
    settings = {"top_p": 0.9, "top_k": 3, "min_p": 0.05, "repetition_penalty": 1.2}
    sampler = drawing(model, settings=settings, temperature=0.5)
    rows = grown(sampler)
    asked = sampler.engine.llm.asked  # type: ignore[attr-defined]
    assert len(asked) == 18 and len({params.seed for _, params in asked}) == 18
    for branch, (text, params) in zip(rows, asked, strict=True):
        given = (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty)
        assert given == (0.5, 0.9, 3, 0.05, 1.2) and list(params.stop_token_ids) == [1]
        assert text == branch.prompt + branch.ids[: branch.shared] and params.max_tokens == 8 - branch.shared
    assert any(each.shared for each in rows)
    again = drawing(model, settings=settings, temperature=0.5)
    assert [each.ids for each in grown(again)] == [each.ids for each in rows]
    assert [params.seed for _, params in again.engine.llm.asked] == [params.seed for _, params in asked]  # type: ignore[attr-defined]


def test_tokens_are_counted_where_they_pass(model: Any, params: None):
    """By hand: two responses to one prompt of three, the longest four; then a branch behind two tokens."""
    sampler = drawing(model, longest=4, ends=[])
    sampler.engine.llm.end = None  # type: ignore[attr-defined]
    [root] = sampler.begin([[2, 3, 4]])
    assert (sampler.counts.drawn, sampler.counts.read, sampler.counts.reused) == (0, 2, 0)
    rows = [root.fork(0, random.Random(i)) for i in range(2)]
    sampler.engine = VllmEngine(llm=sampler.engine.llm, context=64, ends=[], settings={})  # type: ignore[attr-defined]
    sampler.extend(rows)
    # the engine reads the first prompt but for its last token, which draws, and finds it in its cache for the second;
    # the policy reads each response behind the prompt's two: the prompt's last and three of the four
    assert (sampler.counts.drawn, sampler.counts.read, sampler.counts.reused) == (8, 2 + 2 + 8, 2)
    sampler.extend([rows[0].fork(2, random.Random(9))], with_entropies=False)
    assert (sampler.counts.drawn, sampler.counts.read, sampler.counts.reused) == (10, 12, 2 + 4)


def test_without_entropies_the_policy_does_not_read(model: Any, params: None):
    sampler = drawing(model)
    found = grown(sampler, with_entropies=False)
    assert all(math.isnan(value) for each in found for value in each.entropies)
    assert [each.logps for each in found] == [each.logps for each in grown(drawing(model), with_entropies=False)]
    scored = drawing(model)
    assert [each.ids for each in grown(scored)] == [each.ids for each in found]
    assert sampler.counts.read < scored.counts.read and sampler.counts.drawn == scored.counts.drawn


def test_a_log_prob_that_the_engine_lacks_is_the_policys(model: Any, params: None):
    whole = grown(drawing(model))
    lacking = grown(drawing(model, engine={"apart": math.nan}), with_entropies=False)
    for one, other in zip(lacking, whole, strict=True):
        assert one.ids == other.ids
        torch.testing.assert_close(torch.tensor(one.logps), torch.tensor(other.logps))


def test_the_engines_context_ends_a_text(model: Any, params: None):
    sampler = drawing(model, engine={"context": 6, "end": None}, ends=[])
    sampler.engine = VllmEngine(llm=sampler.engine.llm, context=6, ends=[], settings={})  # type: ignore[attr-defined]
    [root] = sampler.begin([[2, 3, 4, 2]])
    row = root.fork(0, random.Random(0))
    sampler.extend([row])
    assert len(row.ids) == 2 and not sampler.is_open(row)
    with pytest.raises(ValueError, match="a prompt has 6 tokens, and vLLM takes texts of 6 with the response: raise"):
        sampler.begin([[2] * 6])
