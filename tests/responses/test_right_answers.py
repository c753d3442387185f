import pytest
import torch

from hclm_rl.responses.right_answers import RightAnswers, kept_in, number_of, pieces, unpadded, widest_apart
from hclm_rl.types import Transcript


def answers(prompts: list[int], numbers: list[int], states: torch.Tensor | None = None) -> RightAnswers:
    """Of prompt p the tokens 1 to p, of answer a as many tokens a as its place, counted from 1."""
    count = len(prompts)
    return RightAnswers(
        prompt=torch.tensor(prompts),
        answer=torch.tensor(numbers),
        step=torch.zeros(count, dtype=torch.int32),
        prompt_length=torch.tensor(prompts, dtype=torch.int32),
        length=torch.arange(1, count + 1, dtype=torch.int32),
        prompt_ids=torch.tensor([i for p in prompts for i in range(1, p + 1)], dtype=torch.int32),
        ids=torch.tensor([a for i, a in enumerate(numbers, 1) for _ in range(i)], dtype=torch.int32),
        mask=torch.ones(count * (count + 1) // 2, dtype=torch.bool),
        counted=torch.zeros(count, 0, dtype=torch.long),
        logps=-torch.arange(1.0, count * (count + 1) // 2 + 1),
        states=torch.zeros(count, 0) if states is None else states,
    )


def test_pieces_of_a_row_of_pieces():
    # lengths 2, 0, 3: they lie at 0 1, -, 2 3 4
    assert pieces(torch.tensor([2, 0, 3]), torch.tensor([2, 1, 0, 2])).tolist() == [2, 3, 4, 0, 1, 2, 3, 4]


def test_rows_take_their_texts_along():
    some = answers([2, 1, 3], [7, 8, 9]).rows(torch.tensor([2, 0]))
    assert some.prompt_ids.tolist() == [1, 2, 3, 1, 2] and some.ids.tolist() == [9, 9, 9, 7]
    assert some.logps.tolist() == [-4, -5, -6, -1] and some.prompt.tolist() == [3, 2]
    assert answers([2, 1], [7, 8]).rows(torch.tensor([False, True])).ids.tolist() == [8, 8]


def test_padding_comes_back_where_a_model_wants_it():
    padded = answers([2, 1], [7, 8]).padded()
    assert padded["prompt_ids"].tolist() == [[1, 2], [0, 1]]
    assert padded["prompt_mask"].tolist() == [[True, True], [False, True]]
    assert padded["ids"].tolist() == [[7, 0], [8, 8]] and padded["present"].tolist() == [[True, False], [True, True]]
    assert padded["logps"].tolist() == [[-1, 0], [-2, -3]]


def test_responses_of_a_rollout_lose_their_padding_and_what_stood_there():
    text = Transcript(
        prompt_ids=torch.tensor([[0, 5, 6], [7, 8, 9]]),
        prompt_mask=torch.tensor([[False, True, True], [True, True, True]]),
        ids=torch.tensor([[3, 4, 0], [5, 0, 0]]),
        present=torch.tensor([[True, True, False], [True, False, False]]),
    )
    mask = torch.tensor([[True, False, False], [True, False, False]])  # a tool wrote the 4
    logps = torch.tensor([[-1.0, float("nan"), float("nan")], [-2.0, float("inf"), 0.0]])
    numbers = torch.tensor([1, 2])
    kept = unpadded(
        text,
        mask,
        logps,
        prompt=numbers,
        answer=numbers,
        step=4,
        states=torch.zeros(2, 0),
        counted=torch.zeros(2, 0).long(),
    )
    assert kept.prompt_ids.tolist() == [5, 6, 7, 8, 9] and kept.ids.tolist() == [3, 4, 5]
    assert kept.mask.tolist() == [True, False, True] and kept.logps.tolist() == [-1, 0, -2]
    assert kept.step.tolist() == [4, 4]


def test_bytes_are_those_that_the_docstring_says():
    assert answers([2, 1, 3], [7, 8, 9]).bytes() == 3 * 28 + 4 * 6 + 9 * 6
    assert answers([2, 1, 3], [7, 8, 9], torch.zeros(3, 5)).bytes() == 3 * 28 + 4 * 6 + 9 * 6 + 3 * 4 * 5


def test_each_new_answer_once_up_to_the_capacity_of_its_prompt():
    kept = answers([1, 1, 2], [10, 11, 20])
    new = answers([1, 1, 2, 1, 2], [11, 12, 21, 12, 22])
    assert kept.with_new(new, 3, "first").answer.tolist() == [10, 11, 20, 12, 21, 22]
    assert kept.with_new(new, 2, "first").answer.tolist() == [10, 11, 20, 21]
    assert kept.with_new(kept, 9, "first") is kept


def test_those_that_span_most_stay():
    # a square's corners and a point close to the first of them: of these two the newer goes
    states = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1], [0.9, 0.9]])
    assert widest_apart(states, 4).tolist() == [0, 1, 2, 3]
    # of copies nothing tells which adds least: the last goes
    assert widest_apart(torch.ones(3, 2), 2).tolist() == [0, 1]
    # 0, 1 and 10 on a line, four times over in unit: the middle one is nearest to the mean 11/3 and adds least
    for unit in (1e-3, 1.0, 1e3):
        assert widest_apart(unit * torch.tensor([[0.0], [1.0], [10.0]]), 2).tolist() == [0, 2]
    kept = answers([1, 1], [10, 11], torch.tensor([[0.0], [1.0]]))
    new = answers([1], [12], torch.tensor([[10.0]]))
    assert kept.with_new(new, 2, "log_det").answer.tolist() == [10, 12]


def test_a_memory_gives_them_back():
    kept, memory = answers([2, 1], [7, 8]), {}
    assert kept_in(memory) is None
    kept.save(memory)
    assert all(torch.equal(getattr(kept_in(memory), name), value) for name, value in vars(kept).items())


@pytest.mark.parametrize("other", [("a", "bc"), ("ab", "c "), ([1, 23],), ([12, 3],)])
def test_a_number_tells_texts_apart(other):
    assert number_of("ab", "c") == number_of("ab", "c") != number_of(*other)
    assert number_of([1, 23]) != number_of([12, 3]) and -(2**63) <= number_of("x") < 2**63
