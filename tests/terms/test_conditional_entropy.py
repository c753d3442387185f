"""Conditional-entropy utility against its card (arXiv:2508.20395): numbers, the texts that are read, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.chain.chain import blend
from hclm_rl.recipe.config import build_chain
from hclm_rl.recipe.conflicts import conflicts
from hclm_rl.responses.answers import as_whole, normalised
from hclm_rl.terms.conditional_entropy import ConditionalEntropy

from ..term_batches import card_step, make_step, rollout, token_batch, whole_texts

NAN = math.nan
CARD = [
    [[0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.2, 0.1]],
    [[0.5, 0.3, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1]],
    [[0.9, 0.05, 0.03, 0.02], [0.97, 0.01, 0.01, 0.01]],
]
WORDS = ["", "first", "then", "\n\n", "so", "4", "2", "is", "end", "<eos>"]


class Speaks:
    """A tokenizer of WORDS."""

    all_special_ids = (WORDS.index("<eos>"),)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [WORDS.index(word) for word in text.split()]

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(WORDS[i] for i in ids)


def response(words: list[str], answer: str | None = "4 2", table=CARD, prompt: int = 1):
    """Stage 1's view of one response, of the texts that it lets read, and the scorer: `table` after each step."""
    ids = [WORDS.index(word) for word in words]
    slots = [[0.0] * len(ids) + [NAN]]
    view, _ = card_step([[1] * len(ids) + [0]], slots, slots, slots)
    seen = []
    p = torch.tensor(table, dtype=torch.float64)

    def score(transcript, scorer="policy"):
        ids, mask, tail = whole_texts(transcript)
        seen.extend(row[own].tolist() for row, own in zip(ids, mask, strict=True))
        assert tail == 2
        after = [min(j, len(p) - 1) for j in range(len(ids))]
        return p[after][:, :, 0].log(), -(p * p.log()).sum(2)[after]

    text = rf"\boxed{{{answer}}}" if answer else "hm"
    view = replace(
        view, ids=torch.tensor([[*ids, 0]]), texts=[text], rows=[{"solution": "4 2", "none": None}], score=score
    )
    prompts = torch.tensor([[0, prompt]])
    text = replace(view.transcript, prompt_ids=prompts, prompt_mask=prompts > 0)
    view = replace(view, transcript=text, tokenizer=Speaks(), step=0)
    return replace(view, advantages=torch.tensor([2.0], dtype=torch.float64)), seen


def measured(view, **settings):
    effect = ConditionalEntropy(**{"cue": "is", **settings}).on_rollout(view, {})
    metrics = {name: m.form(*(s.item() for s in m.sums)) for name, m in effect.metrics.items()}
    return view.advantages.unsqueeze(1) + effect.columns["paid"], metrics


TWO_STEPS = ["first", "\n\n", "then", "so", "\n\n"]


def test_the_cards_example():
    view, _ = response(TWO_STEPS)
    advantages, metrics = measured(view)
    # H = 1.333074, 1.054365, 0.297874; printed to six digits: half of the last one
    assert metrics["utility_total"] == pytest.approx(0.278709 + 0.756491, abs=1e-6)
    assert metrics["utility_slope"] == pytest.approx(-0.517600, abs=5e-7)
    assert metrics["nll_total"] == pytest.approx(1.151293 - 0.067910, abs=1e-6)
    assert metrics["useful_steps"] == 1 and metrics["surplus"] == 0
    # A + clip(u_j, +-0.5) on the last token of each step; a coef is the share of it
    assert advantages[0, :5].tolist() == pytest.approx([2.0, 2.278709, 2.0, 2.0, 2.5], abs=5e-7)
    assert blend(view.advantages.unsqueeze(1), advantages, 0.1)[0, 4].item() == pytest.approx(2.05)
    assert measured(view, limit=1.0)[0][0, 4].item() == pytest.approx(2.756491, abs=5e-7)


def test_the_texts_that_are_read():
    view, seen = response(TWO_STEPS)
    measured(view)
    # question, steps so far, cue, answer
    assert [Speaks().decode(text) for text in seen] == [
        "first is 4 2",
        "first first \n\n is 4 2",
        "first first \n\n then so \n\n is 4 2",
    ]


@pytest.mark.parametrize("settings", [{"answer_column": "solution"}, {"cuts": False}])
def test_nothing_is_asked_behind_the_end_of_the_text(settings):
    without, seen = response(TWO_STEPS[:-1], answer="4 2" if "cuts" in settings else "is")
    expected, metrics = measured(without, **settings)
    ended, read = response([*TWO_STEPS[:-1], "<eos>"], answer="4 2" if "cuts" in settings else "is")
    advantages, same = measured(ended, **settings)
    assert read == seen and same == metrics
    # paid at the last word, not at the end of the text
    assert advantages[0, :5].tolist() == pytest.approx([2.0, 2.278709, 2.0, 2.5, 2.0], abs=5e-7)
    assert expected[0, :4].tolist() == advantages[0, :4].tolist()


@pytest.mark.parametrize("settings", [{}, {"step_tokens": 1}])
def test_a_response_that_only_ends_has_no_step(settings):
    view, _ = response(["<eos>"])
    advantages, metrics = measured(view, cuts=False, **settings)
    assert advantages[0, 0] == 2.0 and metrics["utility_total"] == 0.0


def test_rising_entropy_is_paid_back_and_surplus_is_counted():
    view, _ = response(TWO_STEPS, table=CARD[::-1])
    advantages, metrics = measured(view, certain=0.3)
    assert advantages[0, 1].item() == pytest.approx(1.5) and advantages[0, 4].item() == pytest.approx(
        2 - 0.278709, abs=5e-7
    )
    # H_0 = 0.298 is below already: both steps are surplus
    assert metrics["useful_steps"] == 0 and metrics["surplus"] == 1 and metrics["utility_slope"] > 0


def test_certain_and_wrong_shows_in_the_nll():
    wrong = [[[0.01, 0.97, 0.01, 0.01]] * 2 if j else CARD[0] for j in range(3)]
    _, metrics = measured(response(TWO_STEPS, table=wrong)[0])
    assert metrics["utility_total"] > 1 and metrics["nll_total"] < -3


def test_steps_that_hold_the_answer_are_cut():
    words = ["first", "\n\n", "so", "4", "2", "\n\n", "end"]
    view, seen = response(words)
    advantages, _ = measured(view)
    assert len(seen) == 2 and advantages[0, :7].tolist() == pytest.approx([2, 2.278709, 2, 2, 2, 2, 2], abs=5e-7)
    view, seen = response(words)
    measured(view, cuts=False)
    assert len(seen) == 4


def test_steps_of_so_many_tokens_and_at_most_so_many():
    words = ["so"] * 7
    view, seen = response(words)
    measured(view, step_tokens=2)
    assert [len(text) for text in seen] == [4, 6, 8, 10, 11]
    view, seen = response(words)
    measured(view, step_tokens=1, most_steps=3)
    # of the seven ends those at 7/3, 14/3 and 7, rounded: 2, 5 and 7
    assert [len(text) for text in seen] == [4, 6, 9, 11]


def test_the_answer_of_the_data_set():
    view, seen = response(TWO_STEPS, answer=None)
    measured(view, answer_column="solution")
    assert len(seen) == 3
    with pytest.raises(ValueError, match="the data set has no column 'gold', only solution, none"):
        measured(view, answer_column="gold")


@pytest.mark.parametrize("settings", [{}, {"answer_column": "none"}])
def test_without_an_answer_nothing_is_measured_or_paid(settings):
    view, _ = response(TWO_STEPS, answer=None)
    view = replace(view, score=lambda text, scorer: (torch.zeros(len(text.ids), 1),) * 2)
    advantages, metrics = measured(view, **settings)
    assert (advantages == 2).all() and set(metrics.values()) == {0.0}


def test_it_measures_every_so_many_steps():
    view, _ = response(TWO_STEPS)
    term, memory = ConditionalEntropy(every=6, cue="is"), {}
    # a rollout every four steps: six after the last measurement, not at multiples of six
    measured_at = [at for at in range(0, 24, 4) if term.on_rollout(replace(view, step=at), memory).metrics]
    assert measured_at == [0, 8, 16]
    assert ConditionalEntropy(every=4)(token_batch(make_step()), {}).advantages is None


def test_all_processes_make_the_same_number_of_passes():
    seen = []
    step = make_step()
    view = rollout(step, slice(6, 8))  # one and five tokens

    def score(transcript, scorer="policy"):
        seen.append(len(transcript.ids))
        return view.score(transcript)

    settings = {"step_tokens": 1, "cuts": False, "cue": ""}
    own = ConditionalEntropy(**settings).on_rollout(replace(view, score=score), {})
    longer = replace(view, score=score, everywhere=lambda x: torch.cat([x, torch.tensor([6])]))
    both = ConditionalEntropy(**settings).on_rollout(longer, {})
    assert seen == [2 * 6, 2 * 7]
    torch.testing.assert_close(own.columns["paid"], both.columns["paid"])


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"answer": "x"}, "answer must have one group, which holds the answer, got 'x' with 0"),
        ({"every": 0}, "step_tokens must be >= 0, most_steps and every >= 1, got 0, 10 and 0"),
        ({"limit": NAN}, "limit must be positive and finite, got nan"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        ConditionalEntropy(**wrong)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "answer, text, stands",
    [
        ("4", "so 24", False),
        ("4", "so 4.5", False),
        ("4", "so 0.4", False),
        ("4", "so 4.", True),
        ("4", "x = 4, thus", True),
        (r"\frac{1}{2}", r"so \dfrac{1}{2}", True),
        (r"\frac{1}{2}", r"so \frac{1}{20}", False),
        ("(1, 2)", r"at \left(1, 2\right)", True),
    ],
)
def test_an_answer_stands_in_a_text_as_a_whole_and_however_it_is_set(answer, text, stands):
    assert bool(as_whole(answer).search(normalised(text))) == stands


def test_it_refuses_a_broken_expression_and_doubts_the_policys_own_word():
    with pytest.raises(ValueError, match=r"step_end must be a regular expression \(missing .*, got '\('"):
        ConditionalEntropy(step_end="(")
    said = conflicts(build_chain([{"conditional_entropy": {"coef": 0.05}}]))
    assert len(said) == 1 and said[0].startswith("'conditional_entropy': it pays by the policy's own certainty")
    assert conflicts(build_chain([{"conditional_entropy": {"coef": 0.05, "scorer": "reference"}}])) == []
    assert conflicts(build_chain(["conditional_entropy"])) == []
