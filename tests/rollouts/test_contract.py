"""What every rollout of the library keeps, taken by name as the terms' contract takes terms."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hclm_rl.recipe.rollout import ROLLOUTS, build_rollout
from hclm_rl.rollouts import Asked, Response, RolloutStrategy, Sampler
from hclm_rl.rollouts.checks import checked
from hclm_rl.rollouts.vllm_sampler import VllmSampler
from hclm_rl.trainer.engine import VllmEngine
from tests.rollouts.test_methods import Echo
from tests.rollouts.test_seam import TERMS, logs_of
from tests.rollouts.vllm_stand_in import StandIn, install
from tests.tiny import make

WORDS, GROUP = 7, 4
# so that each acts on a vocabulary of seven one-letter words and in groups of four
SMALL: dict[str, dict[str, Any]] = {
    "arpo": {"threshold": 0.9},
    "cure": {"branches": 1, "top": 2, "least_characters": 1},
    "entropy_balanced": {"threshold": 0.1},
    "entropy_fork": {"forks": 1, "branches": 1},
    "prompt_augmentation": {"templates": [{"name": "bare"}, {"name": "two", "user": "6 {question}", "opener": "5"}]},
}
STRATEGIES = {name: build_rollout({name: SMALL.get(name, {})}) for name in ROLLOUTS}
PROMPTS = [[2, 3, 4], [5, 6], [3]]


class Words:
    """A tokenizer of numbers."""

    all_special_ids = (0, 1)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
        return [self.decode(each) for each in rows]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            initializer_range=0.5, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def sampler_of(model: LlamaForCausalLM, longest: int, source: str) -> Sampler:
    given: dict[str, Any] = {"model": model, "ends": [1], "pad": 0, "longest": longest, "temperature": 0.8}
    if source == "transformers":
        return Sampler(**given)
    return VllmSampler(**given, engine=VllmEngine(llm=StandIn(model), context=64, ends=[1], settings={}))


def asked_of(sampler: Sampler, strategy: RolloutStrategy, prompts: list[list[int]], longest: int) -> Asked:
    return Asked(
        prompts=prompts,
        responses=GROUP,
        longest=longest,
        sampler=sampler,
        stream=lambda *names: random.Random(repr(names)),
        raw=[" ".join(map(str, each)) for each in prompts],
        encode=lambda text: Words()(text)["input_ids"],
        tokenizer=Words(),
        tools=Echo() if strategy.needs_tools else None,
        memory={"entropy": 0.9},
    )


Rolled = Callable[..., tuple[Asked, list[Response]]]


@pytest.fixture(params=["transformers", "vllm"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What draws."""
    install(monkeypatch)
    return request.param


@pytest.fixture(params=ROLLOUTS)
def rolled(request: pytest.FixtureRequest, model: LlamaForCausalLM, source: str) -> Rolled:
    """The rollout of that name, ready to be asked."""
    strategy = STRATEGIES[request.param]
    assert strategy is not None

    def ask(prompts: list[list[int]] = PROMPTS, longest: int = 12) -> tuple[Asked, list[Response]]:
        asked = asked_of(sampler_of(model, longest, source), strategy, prompts, longest)
        return asked, checked(request.param, strategy(asked), asked, words=WORDS)

    return ask


def test_the_budget_is_exact_however_short_a_response_may_be(rolled: Rolled):
    for longest in (12, 2, 1):
        _, responses = rolled(longest=longest)
        assert len(responses) == len(PROMPTS) * GROUP and max(len(each.ids) for each in responses) <= longest


def test_log_probs_are_those_of_a_pass_over_the_whole_text(rolled: Rolled, model: LlamaForCausalLM):
    asked, responses = rolled()
    for number, each in enumerate(responses):
        prompt = list(each.prompt or asked.prompts[number // GROUP])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *each.ids]])).logits[0, len(prompt) - 1 : -1]
        logps = (logits / 0.8).log_softmax(dim=-1).gather(1, torch.tensor(each.ids)[:, None])[:, 0]
        for t, (said, due) in enumerate(zip(each.logps, logps.tolist(), strict=True)):
            is_tools = said == 0 and each.is_trained is not None and not each.is_trained[t]
            assert is_tools or said == pytest.approx(due, abs=1e-5)
            assert not is_tools or each.ids[t] == 5  # what Echo writes


def test_it_draws_by_its_streams_alone(rolled: Rolled):
    torch.manual_seed(3)
    before, made = torch.get_rng_state(), []
    for seed in (3, 4):  # the state itself is moved by the type checks of the test run
        random.seed(seed)
        made.append(rolled()[1])
    assert torch.equal(torch.get_rng_state(), before)
    first, second = made
    assert [(each.ids, each.is_trained, each.columns) for each in first] == [
        (each.ids, each.is_trained, each.columns) for each in second
    ]


def test_another_prompt_in_the_batch_changes_nothing(rolled: Rolled):
    for mate in ([6, 5, 4, 3, 2, 6, 5, 4, 3], [2]):
        for one, other in zip(rolled()[1][GROUP:], rolled([mate, *PROMPTS[1:]])[1][GROUP:], strict=True):
            assert (one.ids, one.is_trained, one.prompt) == (other.ids, other.is_trained, other.prompt)
            torch.testing.assert_close(torch.tensor(one.logps), torch.tensor(other.logps))


# ---- terms of stage R and of stage T; tests/testbed/test_turns.py has the rollouts that branch behind tools

IN_A_TRAINER = {
    "arbitrary_entropy": {"right_at": 0.25},
    "cure": {"branches": 3, "top": 2, "least_characters": 1},
    "entropy_fork": {"forks": 3, "branches": 1},
    "prompt_augmentation": {"templates": [{"name": "a"}, {"name": "b", "user": "7 {question}", "once": ["2"]}]},
}


def test_every_rollout_is_met_by_terms():
    assert {*IN_A_TRAINER, "arpo", "entropy_balanced"} == set(ROLLOUTS)


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "+".join(str(each)[:12] for each in terms))
@pytest.mark.parametrize("name", IN_A_TRAINER)
def test_terms_work_with_every_rollout(name: str, terms: list, policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, rollout={name: IN_A_TRAINER[name]}, terms=terms)
    trainer.train()
    for entry in logs_of(trainer):
        assert all(torch.tensor(float(value)).isfinite() for value in entry.values())
    for each in terms:
        link = each if isinstance(each, str) else next(iter(each))
        assert max(float(entry[f"{link}/affected"]) for entry in logs_of(trainer)) > 0
