"""Turns by the mask, steps by a delimiter, and the place of a token in its text."""

import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hclm_rl.responses import turns
from hclm_rl.responses.turns import (
    BETWEEN,
    at_tokens,
    ends_of_steps,
    locate,
    number_turns,
    share_of_turns,
    sum_by_turn,
    tokens_by_turn,
)

from ..term_batches import TOKENIZER, WORDS

# a turn of two tokens, a tool's token, a turn of one, padding | a tool's token first | nothing but a tool
MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()


def test_a_turn_is_a_run_of_response_tokens():
    assert number_turns(MASK).tolist() == [[0, 0, -1, 1, -1], [-1, 0, 0, 0, 0], [-1] * 5]


def test_an_end_cuts_a_turn_after_its_token():
    # an end just before a tool's tokens adds nothing, nor does one at the last token or off the mask
    ends = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]]).bool()
    assert number_turns(MASK, ends).tolist() == [[0, 0, -1, 1, -1], [-1, 0, 0, 1, 1], [-1] * 5]


def test_sums_of_turns_and_back():
    x = torch.tensor([[1.0, 2.0, torch.nan, 4.0, torch.inf], [torch.nan, 1.0, 1.0, 1.0, 1.0], [torch.nan] * 5])
    turn = number_turns(MASK)
    sums = sum_by_turn(x, turn)
    assert sums.tolist() == [[3.0, 4.0], [4.0, 0.0], [0.0, 0.0]]
    assert tokens_by_turn(turn).tolist() == [[2, 1], [4, 0], [0, 0]]
    assert at_tokens(sums, turn).tolist() == [[3, 3, 0, 4, 0], [0, 4, 4, 4, 4], [0] * 5]


def test_without_any_token_there_is_one_empty_slot():
    turn = number_turns(torch.zeros(2, 3).bool())
    assert tokens_by_turn(turn).tolist() == [[0], [0]]
    assert at_tokens(tokens_by_turn(turn), turn).tolist() == [[0] * 3] * 2


def test_shares_of_turns():
    # two turns: 1 / (2 * 2) twice and 1 / (2 * 1); one turn of four: 1 / 4; each response sums to 1
    assert share_of_turns(MASK).tolist() == [[0.25, 0.25, 0, 0.5, 0], [0, 0.25, 0.25, 0.25, 0.25], [0] * 5]


def test_places_of_words():
    ids = torch.tensor([[WORDS.index(word) for word in ("let", "me", "see", "wait", "see")]])
    # the space before a word belongs to it; what is off the mask is one separator and has no place
    [(text, places)] = locate(TOKENIZER, ids, torch.tensor([[1, 1, 0, 0, 1]]).bool())
    assert text == f"let me{BETWEEN}see" and places == [(0, 3), (3, 6), (0, 0), (0, 0), (7, 10)]


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, as byte-level BPE falls back to."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_bytes_of_a_character_share_its_place():
    tokenizer = byte_level()
    ids = tokenizer("aé€b")["input_ids"]  # 1, 2, 3 and 1 bytes
    assert len(ids) == 7
    [(text, places)] = locate(tokenizer, torch.tensor([ids]), torch.ones(1, 7).bool())
    assert text == "aé€b"
    assert places == [(0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3), (3, 4)]


def test_a_cut_character_does_not_swallow_what_follows():
    tokenizer = byte_level()
    euro, letter = tokenizer("€")["input_ids"], tokenizer("b")["input_ids"]
    ids = torch.tensor([euro[:1] + letter * 5])
    [(text, places)] = locate(tokenizer, ids, torch.ones(1, 6).bool())
    assert text == "\N{REPLACEMENT CHARACTER}bbbbb"
    assert places[-1] == (5, 6)


def test_steps_end_where_the_delimiter_does():
    tokenizer = byte_level()
    text = "a\n\nb\n\n\n\nc"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    mask = torch.ones(ids.shape).bool()
    ends = ends_of_steps(tokenizer, ids, mask, re.compile("\n\n"))
    assert [i for i, end in enumerate(ends[0].tolist()) if end] == [2, 5, 7]
    # "a\n\n", "b\n\n", "\n\n", "c"
    assert number_turns(mask, ends).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 3]]


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="this rollout has no tokenizer"):
        locate(None, torch.zeros(1, 1).long(), torch.ones(1, 1).bool())


def test_a_pair_of_tokens_is_decoded_once_however_often_it_comes(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(WORDS), (50, 200), generator=generator)
    mask = torch.arange(200) < torch.randint(201, (50, 1), generator=generator)
    mask[3, 10:20] = False  # a tool's
    calls, decode = [], TOKENIZER.decode

    def counted(*given, **more) -> str:
        calls.append(given)
        return decode(*given, **more)

    monkeypatch.setattr(TOKENIZER, "decode", counted)
    found = locate(TOKENIZER, ids, mask)
    assert len(calls) <= 11 + 11**2 < mask.sum() / 30  # every word alone, and every two
    calls.clear()
    assert locate(TOKENIZER, ids, mask) == found and not calls  # the next rollout's are known
    monkeypatch.setattr(turns, "located_at_once", lambda pieces, counts: None)
    assert locate(TOKENIZER, ids, mask) == found  # token by token
    text, places = found[0]
    assert [text[start:end].strip() for start, end in places[: int(mask[0].sum())]] == [
        WORDS[i] for i in ids[0][mask[0]].tolist()
    ]
