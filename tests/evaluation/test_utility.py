import math

import pytest
import torch

from hclm_rl.evaluation.utility import Utility, answer_scores, before_answer, measure_utility, split_steps
from hclm_rl.testbed.policy import load_policy

# the worked example: the distributions of two answer tokens after 0, 1 and 2 steps
CHAIN = [
    [[0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.2, 0.1]],
    [[0.5, 0.3, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1]],
    [[0.9, 0.05, 0.03, 0.02], [0.97, 0.01, 0.01, 0.01]],
]


def test_the_worked_example():
    answer = torch.tensor([0, 0])
    scores = [answer_scores(torch.tensor(step, dtype=torch.float64).log(), answer) for step in CHAIN]
    found = Utility(entropies=tuple(h for h, _ in scores), losses=tuple(n for _, n in scores))
    assert found.entropies == pytest.approx([1.333074, 1.054365, 0.297874], abs=5e-7)
    assert found.losses == pytest.approx([1.151293, 0.524911, 0.067910], abs=5e-7)
    assert found.steps == pytest.approx([0.278709, 0.756491], abs=1e-6)
    assert found.slope == pytest.approx(-0.517600, abs=5e-7)
    assert (found.monotone_share, found.settled) == (1.0, None)
    assert found.total == pytest.approx(sum(found.steps))


def test_a_certain_word_adds_nothing_to_the_entropy():
    certain = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).log()
    assert answer_scores(certain, torch.tensor([0, 1])) == pytest.approx((math.log(2) / 2, math.log(2) / 2))


def test_a_chain_that_wavers_and_one_without_steps():
    found = Utility(entropies=(1.0, 1.2, 0.05, 0.02), losses=(0.0,) * 4)
    assert (found.monotone_share, found.settled) == (pytest.approx(2 / 3), 2)
    bare = Utility(entropies=(1.0,), losses=(0.0,))
    assert math.isnan(bare.slope) and math.isnan(bare.monotone_share) and bare.total == 0.0


@pytest.mark.filterwarnings("error")  # what transformers calls the cache changes: a warning names its caller as torch
def test_the_cropped_cache_gives_what_whole_passes_give():
    model, tokenizer = load_policy()
    question, steps, cue, answer = "7 3 5 : 35 ! 4 5 7 >", ["3 32", "5 27 7", "20"], ">", "7 13"
    found = measure_utility(model, tokenizer, question, steps, answer, cue=cue)
    ids = tokenizer(answer, return_tensors="pt")["input_ids"][0]
    assert len(found.entropies) == 4
    for j in range(4):
        text = " ".join([question, *steps[:j], cue, answer])
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -3:-1]
        distribution = torch.distributions.Categorical(logits=logits)
        assert found.entropies[j] == pytest.approx(distribution.entropy().mean().item(), abs=1e-4)
        assert found.losses[j] == pytest.approx(-distribution.log_prob(ids).mean().item(), abs=1e-4)


def test_nothing_to_score_is_refused():
    model, tokenizer = load_policy()
    with pytest.raises(ValueError, match="must have a token each, got 10, 1 and 0"):
        measure_utility(model, tokenizer, "7 3 5 : 35 ! 4 5 7 >", [], "", cue=">")


def test_steps_are_blank_lines_or_sentences():
    assert split_steps("One.\n\nTwo. Three.\n\n\nFour") == ["One.\n\n", "Two. Three.\n\n\n", "Four"]
    assert split_steps("First 3.5 is. Then? End") == ["First 3.5 is. ", "Then? ", "End"]


def test_steps_end_before_the_answer_is_stated():
    assert before_answer(["we have 142", "so 42 it is", "42"], "42") == ["we have 142"]
    assert before_answer(["a", "b"], "42") == ["a", "b"]


def test_a_part_of_a_number_is_not_the_answer_and_typography_is_no_matter():
    steps = ["each costs 4.50, ", "14 in all, ", r"$x = \frac{1}{2}$, ", "so 4."]
    assert before_answer(steps, "4") == steps[:3]
    assert before_answer(steps, r"\dfrac{1}{2}") == steps[:2]
