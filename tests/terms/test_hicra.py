"""HICRA against its card (arXiv:2509.03646): numbers, a loop written from the definition, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.hicra import GRAMS, Hicra, semantic_entropy, words_of

from ..responses.test_turns import byte_level
from ..term_batches import WORDS, Processes, card_step, first_stage, fit, make_step, rollout


def view_of(texts: list[str], advantages: list[float], mask: list[list[int]] | None = None):
    """Stage 1's view of responses in the 11 words of the tests' tokenizer."""
    width = max(len(text.split()) for text in texts)
    mask = mask or [[int(t < len(text.split())) for t in range(width)] for text in texts]
    view, _ = card_step(mask, *[[[0.0] * width] * len(texts)] * 3)
    rows = [[WORDS.index(word) for word in text.split()] for text in texts]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return replace(view, ids=ids, advantages=torch.tensor(advantages, dtype=torch.float64))


CARD_TEXTS = ["it let me is 4", "wait it is 4 .", "it is 4 so .", "it is 4 so ."]


def test_the_cards_example():
    # rewards 1, 0, 0, 1: A = +-0.5; grams at tokens 1 and 2 of the first response, at token 0 of the second
    view = view_of(CARD_TEXTS, [0.5, -0.5, -0.5, 0.5])
    first = first_stage(Hicra(grams=("let me", "wait")), view, {})
    assert first.advantages[0].tolist() == pytest.approx([0.5, 0.6, 0.6, 0.5, 0.5], rel=1e-12)
    assert first.advantages[1].tolist() == pytest.approx([-0.4, -0.5, -0.5, -0.5, -0.5], rel=1e-12)
    assert first.advantages[2].tolist() == [-0.5] * 5 and first.advantages[3].tolist() == [0.5] * 5
    assert first.affected["link"].sum() == 3


def test_the_cards_example_with_a_scale():
    scale = math.sqrt(1 / 3) + 1e-6  # the unbiased deviation of 1, 0, 0, 1
    view = view_of(CARD_TEXTS, [0.5 / scale, -0.5 / scale, -0.5 / scale, 0.5 / scale])
    shaped = first_stage(Hicra(grams=("let me", "wait")), view, {}).advantages
    # printed to six digits: half of the last one
    assert shaped[0, 1].item() == pytest.approx(1.039229, abs=5e-7)
    assert shaped[1, 0].item() == pytest.approx(-0.692819, abs=5e-7)


def test_the_cards_semantic_entropy():
    assert semantic_entropy(torch.tensor([3.0, 1.0, 1.0])).item() == pytest.approx(0.950271, abs=5e-7)
    assert semantic_entropy(torch.zeros(3)) == 0
    view = view_of(["wait . wait . wait let me see . check then"], [1.0])
    first = first_stage(Hicra(grams=("wait", "let me see", "check then", "so it")), view, {})
    assert first.metrics["link/semantic_entropy"].item() == pytest.approx(0.950271, abs=5e-7)
    assert first.metrics["link/grams_found"].item() == 3


def test_zero_advantage_stays_zero():
    shaped = first_stage(Hicra(grams=("let me",)), view_of(["let me see"], [0.0]), {}).advantages
    assert (shaped == 0).all()


def test_a_phrase_does_not_reach_across_a_tools_tokens():
    view = view_of(["let it me see"], [1.0], [[1, 0, 1, 1]])
    assert (first_stage(Hicra(grams=("let me", "it")), view, {}).advantages == 1).all()
    view = view_of(["let me it see"], [1.0], [[1, 1, 0, 1]])
    shaped = first_stage(Hicra(grams=("let me",)), view, {}).advantages
    assert shaped.tolist() == [[1.2, 1.2, 1, 1]]


def test_punctuation_parts_a_phrase():
    view = view_of(["let . me let me"], [1.0])
    assert first_stage(Hicra(grams=("let me",)), view, {}).advantages.tolist() == [[1, 1, 1, 1.2, 1.2]]
    assert (first_stage(Hicra(grams=("let . me",)), view, {}).advantages[0, :3] == 1.2).all()


def test_overlapping_occurrences_are_merged_and_all_counted():
    view = view_of(["wait let me see me see"], [1.0])
    first = first_stage(Hicra(grams=("let me see", "wait let me", "me see")), view, {})
    assert first.advantages.tolist() == [[1.2] * 6]
    # once, once and twice: q = 1/4, 1/4, 1/2
    assert first.metrics["link/semantic_entropy"].item() == pytest.approx(1.5 * math.log(2))


@pytest.mark.parametrize("text", ["so we LET me see", "so\nLet  me, see", " let\nme"])
def test_case_spaces_and_newlines_do_not_hide_a_phrase(text):
    tokenizer = byte_level()
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    view, _ = card_step([[1] * ids.size(1)], *[[[0.0] * ids.size(1)]] * 3)
    view = replace(view, ids=ids, tokenizer=tokenizer, advantages=torch.ones(1, dtype=torch.float64))
    shaped = first_stage(Hicra(grams=("let me",)), view, {}).advantages[0]
    start = text.lower().index("let")
    inside = range(start, text.lower().index("me") + 2)
    assert [t for t, a in enumerate(shaped.tolist()) if a > 1] == list(inside)


def test_a_word_that_only_begins_alike_is_no_match():
    tokenizer = byte_level()
    ids = torch.tensor([tokenizer("let men outlet me")["input_ids"]])
    view, _ = card_step([[1] * ids.size(1)], *[[[0.0] * ids.size(1)]] * 3)
    view = replace(view, ids=ids, tokenizer=tokenizer, advantages=torch.ones(1, dtype=torch.float64))
    assert (first_stage(Hicra(grams=("let me",)), view, {}).advantages == 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_a_loop(seed):
    step = make_step(seed, torch.float64)
    step = replace(step, ids=step.ids % 4)  # four words, so that phrases repeat
    grams = [("so",), ("it", "is"), ("4", "so", "it"), ("is", "is")]
    first = first_stage(Hicra(alpha=0.35, grams=tuple(" ".join(gram) for gram in grams)), rollout(step), {})
    counts, planning = [0] * len(grams), set()
    for row, n in enumerate(step.mask.sum(1).tolist()):
        words = [WORDS[i] for i in step.ids[row, :n].tolist()]
        for number, gram in enumerate(grams):
            for start in range(n - len(gram) + 1):
                if tuple(words[start : start + len(gram)]) == gram:
                    counts[number] += 1
                    planning |= {(row, start + i) for i in range(len(gram))}
    assert planning and sum(counts) < 32
    for row, t in step.mask.nonzero().tolist():
        a = step.advantages[row].item()
        expected = a + 0.35 * abs(a) if (row, t) in planning else a
        assert first.advantages[row, t].item() == pytest.approx(expected, rel=1e-12)
    entropy = -sum(c / sum(counts) * math.log(c / sum(counts)) for c in counts if c)
    assert first.metrics["link/semantic_entropy"].item() == pytest.approx(entropy, rel=1e-12)


def test_the_semantic_entropy_is_that_of_all_processes():
    step = make_step()
    term = Hicra(grams=("so", "is", "let me", "then"))
    processes = Processes(2)
    views = processes.views(step, [6, 5])
    both = processes.run(lambda rank: first_stage(term, views[rank], {}))
    alone = first_stage(term, rollout(step), {})
    for each in both:
        assert torch.equal(each.metrics["link/semantic_entropy"], alone.metrics["link/semantic_entropy"])
    assert torch.equal(torch.cat([fit(each.advantages, 6) for each in both])[step.mask], alone.advantages[step.mask])


def test_the_default_phrases_are_distinct():
    assert len({gram.lower() for gram in GRAMS}) == len(GRAMS)
    assert all(2 < len(gram.split()) < 6 for gram in GRAMS)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"alpha": -0.1}, "alpha must be >= 0 and finite, got -0.1"),
        ({"grams": ()}, "grams must be one or more phrases of at least one word, got ()"),
        ({"grams": ("so", " ")}, "grams must be one or more phrases of at least one word, got ('so', ' ')"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Hicra(**wrong)
    assert str(error.value) == sentence


def test_the_form_of_the_released_code_takes_uncertain_tokens_of_long_right_answers():
    # lengths 10, 4, 4, 2: mean 5. Of ten entropies sorted the one at int(0.7 * 10) = 7 is 0.7; above it 0.8 and 0.9
    entropy = [0.9, 0.1, 0.2, 0.0, 0.3, 0.8, 0.4, 0.5, 0.6, 0.7]
    view = view_of(["it is 4 so it is 4 so wait ."] + ["it is 4 ."] * 2 + ["it ."], [0.5, 0.5, -0.5, -0.5])
    blank = torch.zeros(4, 10, dtype=torch.float64)
    view = replace(view, entropy=blank.index_put((torch.tensor([0]),), torch.tensor(entropy, dtype=torch.float64)))
    shaped = first_stage(Hicra(grams=("wait",), form="verl"), view, {}, group_size=4).advantages
    assert shaped[0].tolist() == pytest.approx([0.6] + [0.5] * 4 + [0.6] + [0.5] * 2 + [0.6, 0.5])
    assert shaped[1, :4].tolist() == [0.5] * 4  # shorter than the mean
    without = first_stage(Hicra(grams=(), form="verl"), view, {}, group_size=4).advantages
    assert without[0].tolist() == pytest.approx([0.6] + [0.5] * 4 + [0.6] + [0.5] * 4)
    wrong = replace(view, advantages=-view.advantages)
    shaped = first_stage(Hicra(grams=("wait",), form="verl"), wrong, {}, group_size=4).advantages
    assert shaped[0].tolist() == pytest.approx([-0.5] * 8 + [-0.4, -0.5])  # the phrase alone


def test_a_curly_apostrophe_is_an_apostrophe():
    curly, straight = (GRAMS[at].replace("'", mark) for at, mark in ((6, "\u2019"), (6, "'")))
    assert "'" in straight and words_of(curly) == words_of(straight)
