"""The processors: the cards' examples, strength 0 is plain `generate()`, batch mates change nothing, distributions."""

import math
import random

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hclm_rl.decoding import AdaptiveTemperature, Edt, EmInf, StableEntropy
from hclm_rl.decoding.rows import RowSampler, draw, left_padded, streams_of, within_context
from hclm_rl.decoding.stable_entropy import fit_zone, violations
from hclm_rl.equations.temperature import entropy_of

NO_IDS = torch.zeros(1, 1, dtype=torch.long)
PROMPTS = [[3, 4, 5], [6, 7, 8, 9], [10, 11], [12]]
ZONE = {"mean": 2.6, "deviation": 0.9, "prompt_length": 1}
# at work on the tiny policy, whose entropies lie around 1 to 3 nats
AT_WORK = {
    "edt": Edt(theta=0.5),
    "adaptive_temperature": AdaptiveTemperature(),
    "em_inf": EmInf(steps=10, kl_weight=0.05),
    "stable_entropy": StableEntropy(mean=1.0, deviation=0.5, prompt_length=4, guard=1, draw="top_k", top_k=5),
}
OFF = {
    "edt": Edt(theta=0.0),
    "adaptive_temperature": AdaptiveTemperature(share=1.0),
    "em_inf": EmInf(steps=0),
    "stable_entropy": StableEntropy(**ZONE, strength=0.0),
}


@pytest.fixture(scope="module")
def model(policy: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(policy).eval()


def applied(processor: LogitsProcessor, *rows: list[float]) -> torch.Tensor:
    return processor(NO_IDS, torch.tensor(rows))  # pyright: ignore[reportArgumentType]


def close(got: torch.Tensor, wanted: list, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float32), atol=atol, rtol=0)


def test_edt_as_on_its_card():
    logits = [3.0, 1.0, 0.0, -1.0]
    close(entropy_of(torch.tensor([logits])), [0.595087])
    close(Edt(theta=0.1).temperatures(torch.tensor([logits])), [0.963197])
    close(applied(Edt(theta=0.1), logits).softmax(-1), [[0.843531, 0.105761, 0.037449, 0.013260]])
    close(Edt(theta=1.0).temperatures(torch.tensor([logits])), [0.687305])
    close(applied(Edt(theta=1.0), logits).softmax(-1), [[0.934436, 0.050908, 0.011883, 0.002774]])


def test_edt_at_a_certain_token_is_greedy_and_finite():
    scores = applied(Edt(theta=1.0), [50.0, 0.0, -math.inf])
    assert scores.softmax(-1).tolist() == [[1.0, 0.0, 0.0]]


def test_em_inf_as_on_its_cards():
    z = [2.0, 1.5, 1.0, -1.0]
    found = applied(EmInf(steps=3, kl_weight=0.0), z)
    close(found, [[2.300152, 1.210346, 0.699508, -1.299399]], atol=2e-6)
    close(entropy_of(found), [0.951417], atol=2e-6)
    close(applied(EmInf(steps=3, kl_weight=0.05), z), [[2.300216, 1.209857, 0.699508, -1.299370]], atol=2e-6)
    close(applied(EmInf(), [1.0, 0.5, 0.0, -1.0]), [[1.501663, 0.029726, -0.502144, -1.499089]], atol=2e-6)
    # up to 40 steps it stops after 14, since 15 steps more change nothing
    forty, fourteen = (applied(EmInf(steps=steps, kl_weight=0.0), z) for steps in (40, 14))
    assert torch.equal(forty, fourteen) and not torch.equal(fourteen, applied(EmInf(steps=13, kl_weight=0.0), z))
    close(entropy_of(forty), [0.272399], atol=2e-6)
    assert applied(EmInf(), [6.0, 1.0, 0.0, 0.0]).tolist() == [[6.0, 1.0, 0.0, 0.0]]  # H = 0.074 < 0.3


def test_em_inf_leaves_words_that_are_ruled_out():
    found = applied(EmInf(), [1.0, 0.5, -math.inf, 0.0, -1.0])[0]
    assert found[2] == -math.inf
    close(found[[0, 1, 3, 4]], [1.501663, 0.029726, -0.502144, -1.499089], atol=2e-6)


def test_adaptive_temperature_as_on_the_card():
    z = [2.0, 1.5, 1.0, -1.0]
    found = applied(AdaptiveTemperature(share=0.5, floor=0.1), z)
    close(2.0 / found[0, :1], [0.299105], atol=1e-5)
    close(entropy_of(found), [0.555261], atol=1e-5)
    # below the floor a token is left alone: H = 0.074
    assert applied(AdaptiveTemperature(), [6.0, 1.0, 0.0, 0.0]).tolist() == [[6.0, 1.0, 0.0, 0.0]]


def with_entropy(nats: float, words: int = 400) -> list[float]:
    """Logits of that entropy: one word above the others, equal ones, by bisection."""
    low, high = 0.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        p = softmax([middle] + [0.0] * (words - 1))
        low, high = (middle, high) if -(p * np.log(p)).sum() > nats else (low, middle)
    return [low] + [0.0] * (words - 1)


def test_stable_entropy_as_on_its_card():
    processor = StableEntropy(**ZONE, guard=2, draw="top_k", top_k=30)
    kept = []
    for step, nats in enumerate([5.0, 1.0, 3.5, 2.0, 4.0]):
        ids = torch.zeros(1, 1 + step, dtype=torch.long)
        kept.append(torch.isfinite(processor(ids, torch.tensor([with_entropy(nats)]))).sum().item())
    # the others are equal, so that all of them tie with the 30th: greedy keeps one word, the sample all 400
    assert kept == [1, 1, 400, 1, 400]


def test_stable_entropy_draws_from_the_typical_or_the_top_words():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).log_softmax(-1)  # p = .636 .234 .086 .032 .012, H = .987
    at_work = {"mean": 0.5, "deviation": 0.1, "prompt_length": 1, "guard": 0}
    top = StableEntropy(**at_work, draw="top_k", top_k=2)(NO_IDS, scores)
    assert torch.isfinite(top).tolist() == [[True, True, False, False, False]]
    # |-log p - H| is |.452 - .987| = .535 at the first and |1.452 - .987| = .465 at the second, which comes first
    typical = StableEntropy(**at_work, draw="typical", typical_p=0.2)(NO_IDS, scores)
    assert torch.isfinite(typical).tolist() == [[False, True, False, False, False]]


def test_half_a_strength_is_half_of_each_distribution():
    scores = torch.tensor([[2.0, 1.0, 0.0]])
    p = softmax([2.0, 1.0, 0.0])
    mixed = StableEntropy(mean=9.0, deviation=0.0, prompt_length=1, strength=0.5)(NO_IDS, scores).softmax(-1)
    close(mixed, [[0.5 + p[0] / 2, p[1] / 2, p[2] / 2]])


def test_the_zone_of_a_text_and_what_leaves_it():
    entropies = torch.tensor([[1.0, 3.0, 5.0, math.nan], [2.0, 2.0, math.nan, math.nan]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    # windows of two: 1, 2, 4 and 2, 2; mean 11/5, variance 29/5 - (11/5)^2 = 24/25
    assert fit_zone(entropies, mask, window=2) == pytest.approx((2.2, math.sqrt(0.96)))
    found = violations(entropies, mask, mean=2.2, deviation=math.sqrt(0.96), width=1.0, window=2)
    assert found == pytest.approx({"below": 0.2, "above": 0.2, "outside": 0.4})  # 1 < 1.22, 4 > 3.18
    with pytest.raises(ValueError, match="at least one token that counts"):
        fit_zone(entropies, torch.zeros_like(mask))


@pytest.mark.parametrize("is_sampled", [False, True])
@pytest.mark.parametrize("name", OFF)
def test_at_strength_zero_it_is_plain_generate(name: str, is_sampled: bool, model: PreTrainedModel):
    ids, mask = left_padded(PROMPTS, 0, model.device)
    found = []
    for processors in ([], [OFF[name]]):
        torch.manual_seed(3)
        settings = {"do_sample": True, "top_k": 0} if is_sampled else {"do_sample": False}
        found.append(
            model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList(processors),
                max_new_tokens=12,
                **settings,
            )
        )
    assert torch.equal(*found)


@pytest.mark.parametrize("name", AT_WORK)
def test_batch_mates_padding_and_cache_change_nothing(name: str, model: PreTrainedModel):
    processor = AT_WORK[name]
    rows = torch.randn(4, 26, generator=torch.Generator().manual_seed(0)) * 2
    ids = torch.zeros(4, 9, dtype=torch.long)
    together = processor(ids, rows)
    assert torch.equal(together, torch.cat([processor(ids[:1], row) for row in rows.split(1)]))
    assert not torch.equal(together, rows)

    def responses(prompts: list[list[int]], names: list[int], **settings: bool) -> list[list[int]]:
        streams, limits = streams_of(5, names), [8] * len(names)
        drawn = draw(model, prompts, streams, limits, ends=[1], pad=0, processors=[processor], **settings)
        return [each.ids for each in drawn]

    whole = responses(PROMPTS, [0, 1, 2, 3])
    assert responses(PROMPTS[::-1], [3, 2, 1, 0])[::-1] == whole
    assert responses(PROMPTS, [0, 1, 2, 3], use_cache=False) == whole
    # alone, or behind another padding: the prompt's width is what `prompt_length` counts from
    if name != "stable_entropy":
        assert [responses([prompt], [i])[0] for i, prompt in enumerate(PROMPTS)] == whole
        longer = [*PROMPTS, [2] * 9]
        assert responses(longer, [0, 1, 2, 3, 4])[:4] == whole


def expected(name: str, logits: np.ndarray) -> np.ndarray:
    """The distribution that a processor should leave, by its formula and numpy alone."""
    p = softmax(logits)
    entropy = -(p * np.log(p)).sum()
    if name == "edt":
        return softmax(logits / 0.8 ** (0.5 / entropy))
    assert name == "stable_entropy" and entropy > 1.25
    top = np.argsort(-p)[:5]
    return np.where(np.isin(np.arange(len(p)), top), p, 0) / p[top].sum()


@pytest.mark.parametrize("name", ["edt", "stable_entropy"])
@pytest.mark.parametrize("is_by_row", [False, True])
def test_the_first_word_has_the_distribution_of_the_formula(name: str, is_by_row: bool, model: PreTrainedModel):
    prompt, n = [3, 4, 5], 4000
    processor = AT_WORK[name]
    if name == "stable_entropy":
        processor = StableEntropy(mean=1.0, deviation=0.5, prompt_length=3, guard=0, draw="top_k", top_k=5)
    with torch.no_grad():
        wanted = expected(name, model(torch.tensor([prompt])).logits[0, -1].double().numpy())
    if is_by_row:
        streams = [random.Random(i) for i in range(n)]
        drawn = draw(model, [prompt] * n, streams, [1] * n, ends=[1], pad=0, processors=[processor])
        words = torch.tensor([each.ids[0] for each in drawn])
    else:
        torch.manual_seed(0)
        words = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=torch.tensor([prompt] * n),
            attention_mask=torch.ones(n, 3, dtype=torch.long),
            logits_processor=LogitsProcessorList([processor]),
            max_new_tokens=1,
            do_sample=True,
            top_k=0,
        )[:, -1]
    counts = torch.bincount(words, minlength=26).numpy()
    assert counts[wanted == 0].sum() == 0
    common = wanted * n >= 5
    seen = [*counts[common], counts[~common & (wanted > 0)].sum()]
    hoped = [*wanted[common] * n, wanted[~common].sum() * n]
    if hoped[-1] == 0:
        seen, hoped = seen[:-1], hoped[:-1]
    assert chisquare(seen, hoped).pvalue > 1e-3


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Edt(theta=-1.0), r"theta must be at least 0 and finite, got -1\.0"),
        (lambda: Edt(base=1.5), r"base must be in \(0, 1\], got 1\.5"),
        (lambda: Edt(base_temperature=0.0), r"base_temperature must be more than 0 and finite, got 0\.0"),
        (lambda: AdaptiveTemperature(share=0.0), r"share must be in \(0, 1\], got 0\.0"),
        (lambda: AdaptiveTemperature(floor=-1.0), r"floor must be at least 0, got -1\.0"),
        (lambda: EmInf(steps=-1), r"steps must be at least 0, got -1"),
        (lambda: EmInf(threshold=math.nan), r"threshold must be at least 0 and finite, got nan"),
        (lambda: EmInf(learning_rate=0.0), r"learning_rate must be more than 0 and finite, got 0\.0"),
        (lambda: StableEntropy(mean=math.inf, deviation=1.0, prompt_length=1), r"mean must be finite, got inf"),
        (lambda: StableEntropy(mean=1.0, deviation=-1.0, prompt_length=1), r"deviation must be at least 0"),
        (
            lambda: StableEntropy(mean=1.0, deviation=1.0, prompt_length=0),
            r"prompt_length and top_k must be at least 1",
        ),
        (lambda: StableEntropy(**ZONE, strength=2.0), r"strength must be in \[0, 1\], got 2\.0"),
        (lambda: StableEntropy(**ZONE, typical_p=1.0), r"typical_p must be in \(0, 1\), got 1\.0"),
    ],
)
def test_what_is_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_rows_that_would_run_over_the_context_are_drawn_apart(model: PreTrainedModel):
    context = model.config.max_position_embeddings
    prompts, limits = [[3] * (context - 2), [4, 5], [6], [7] * 9], [2, 9, 4, context - 9]
    for rows in within_context(model, prompts, limits):
        assert max(len(prompts[i]) for i in rows) + max(limits[i] for i in rows) <= context
    assert sorted(i for rows in within_context(model, prompts, limits) for i in rows) == [0, 1, 2, 3]
    assert within_context(model, prompts[1:3], limits[1:3]) == [[1, 0]]


@pytest.mark.parametrize(
    "processor",
    [
        Edt(theta=1e300, base=1.0),
        Edt(base_temperature=1e300),
        Edt(theta=1e300),
        AdaptiveTemperature(floor=1e300),
        StableEntropy(mean=1e300, deviation=1e300, prompt_length=1),
        EmInf(threshold=1e300),
    ],
    ids=repr,
)
def test_huge_values_leave_a_distribution(processor: LogitsProcessor):
    [found] = applied(processor, [2.0, 1.0, 0.0, -math.inf]).softmax(-1).tolist()
    assert sum(found) == pytest.approx(1.0) and found[0] >= found[1] >= found[2] and found[3] == 0


@pytest.mark.parametrize("temperature", [1e-300, 1e-40])
def test_the_coldest_temperature_is_the_greedy_one(temperature: float, model: PreTrainedModel):
    def responses(at: float) -> list[list[int]]:
        drawn = draw(model, PROMPTS, streams_of(5, range(4)), [8] * 4, ends=[1], pad=0, temperature=at)
        return [each.ids for each in drawn]

    assert responses(temperature) == responses(0.0)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_scores_that_are_no_distribution_are_refused(temperature: float, model: PreTrainedModel):
    with pytest.raises(ValueError, match=r"row 0 of the batch has no distribution to draw token 0 from"):
        draw(
            model, PROMPTS, streams_of(5, range(4)), [8] * 4, ends=[1], pad=0, temperature=temperature,
            processors=[EmInf(learning_rate=1e300)],
        )  # fmt: skip


def test_the_number_0_draws_no_word_that_is_ruled_out():
    stream = random.Random()
    stream.random = lambda: 0.0
    sampler = RowSampler([stream], [1], [1], 1.0)
    sampler(NO_IDS, torch.tensor([[-math.inf, -math.inf, 0.0, 0.0]]))
    assert sampler.rows[0].ids == [2]
