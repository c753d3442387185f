"""Turns of a response, its steps by a delimiter, and where each token stands in the text.

A turn is an unbroken run of response tokens: what tools wrote lies between turns and belongs to none. In text without
tools a response is one turn, which a delimiter such as a blank line cuts into steps. Functions of all rows of a step
must be given those of all processes (`Rollout.everywhere`).
"""

import re
from collections.abc import Callable
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..equations.functional import widest

BETWEEN = "\0"  # stands in the text for what a tool wrote: no phrase reaches across it
PART_OF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"
# texts of tokens and of pairs of them, which come again in the next rollout; of each tokenizer for as long as it lives
KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, ...], str]] = WeakKeyDictionary()
MOST_KNOWN = 2**20  # about 200 MB
LONGEST_CHARACTER = 4  # bytes of UTF-8, so at most as many tokens


def number_turns(mask: Bool[Tensor, "N T"], ends: Bool[Tensor, "N T"] | None = None) -> Int[Tensor, "N T"]:
    """Each token's turn, from 0 in each response; -1 off the mask. A token in `ends` ends its turn."""
    is_start = mask & ~shifted(mask)
    if ends is not None:
        is_start = is_start | (mask & shifted(ends))
    return torch.where(mask, is_start.cumsum(dim=1) - 1, -1)


def shifted(x: Bool[Tensor, "N T"]) -> Bool[Tensor, "N T"]:
    """The value of the token before; False for the first."""
    return torch.nn.functional.pad(x[:, :-1], (1, 0), value=False)


def sum_by_turn(x: Float[Tensor, "N T"], turn: Int[Tensor, "N T"]) -> Float[Tensor, "N S"]:
    """The sum of x over each turn, S = the most turns that a response has (at least one); x off the turns is unread."""
    slots = max(int(turn.max()) + 1, 1) if turn.numel() else 1
    inside = turn >= 0
    sums = x.new_zeros(len(turn), slots)
    return sums.scatter_add(1, turn.clamp(min=0), torch.where(inside, x, 0))


def tokens_by_turn(turn: Int[Tensor, "N T"]) -> Float[Tensor, "N S"]:
    """The number of tokens of each turn, in double; 0 where a response has no such turn."""
    return sum_by_turn(torch.ones_like(turn, dtype=widest(turn.device)), turn)


def at_tokens(values: Float[Tensor, "N S"], turn: Int[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Each token's value of its turn; 0 off the turns."""
    return torch.where(turn >= 0, values.gather(1, turn.clamp(min=0)), 0)


def share_of_turns(mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """1 / (T_j |tau_jt|) at each token of turn t of response j, which has T_j turns; 0 off the mask. In double."""
    turn = number_turns(mask)
    tokens = tokens_by_turn(turn)
    turns = (tokens > 0).sum(dim=1, keepdim=True)
    return at_tokens(1 / (turns * tokens).clamp(min=1), turn)


# long: the way token by token stands inside it
def locate(
    tokenizer: PreTrainedTokenizerBase | None, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> list[tuple[str, list[tuple[int, int]]]]:
    """Per row the text of its tokens and each token's (start, end) in it.

    Each token is decoded behind the one before, so that spaces and merges come out as in the whole text. Tokens that
    only together make a character share its place. A run of tokens off the mask is one `BETWEEN` and has no place.
    Refuses a rollout without a tokenizer.
    """
    if tokenizer is None:
        raise ValueError("this rollout has no tokenizer, so the text of its tokens is not known")
    known = KNOWN.setdefault(tokenizer, {})
    if len(known) > MOST_KNOWN:
        known.clear()
    known[()] = ""

    def decode(*tokens: int) -> str:
        if tokens not in known:
            text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            known[tokens] = str(text)
        return known[tokens]

    def added(before: int, token: int) -> str:
        first = () if before < 0 else (before,)
        return decode(*first, token)[len(decode(*first)) :]

    def locate_row(tokens: list[int], counts: list[bool]) -> tuple[str, list[tuple[int, int]]]:
        text, places, before, pending = "", [(0, 0)] * len(tokens), (), []
        for t, token in enumerate(tokens):
            if not counts[t]:
                text += BETWEEN if text and not text.endswith(BETWEEN) else ""
                before = ()
                continue
            pending.append(t)
            new = decode(*before, *(tokens[p] for p in pending))[len(decode(*before)) :]
            goes_on = t + 1 < len(tokens) and counts[t + 1]
            if new.endswith(PART_OF_A_CHARACTER) and goes_on and len(pending) < LONGEST_CHARACTER:
                continue  # the first bytes of a character
            for p in pending:
                places[p] = (len(text), len(text) + len(new))
            text, before, pending = text + new, (token,), []
        return text, places

    found = []
    of_pairs, pair = texts_of_pairs(ids.cpu(), mask.cpu(), added)
    for tokens, counts, own in zip(ids.tolist(), mask.tolist(), pair.tolist(), strict=True):
        pieces = [of_pairs[number] for number in own]
        at_once = located_at_once(pieces, counts)
        found.append(locate_row(tokens, counts) if at_once is None else at_once)
    return found


def texts_of_pairs(
    ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], added: Callable[[int, int], str]
) -> tuple[list[str], Int[Tensor, "N T"]]:
    """(what a token adds to the one before it, for each pair that occurs; each token's pair).

    -1 stands for no token before. Off the mask the pair is the last, whose text is empty.
    """
    before = torch.where(shifted(mask), torch.nn.functional.pad(ids[:, :-1], (1, 0)), -1)
    size = int(ids.max()) + 1 if ids.numel() else 1
    pairs, place = torch.unique(((before + 1) * size + ids)[mask], return_inverse=True)
    texts = [added(key // size - 1, key % size) for key in pairs.tolist()]
    return [*texts, ""], torch.full_like(ids, len(texts)).masked_scatter(mask, place)


def located_at_once(pieces: list[str], counts: list[bool]) -> tuple[str, list[tuple[int, int]]] | None:
    """A row's text and places from what each token adds; None where a token is a part of a character, or adds nothing.

    Its own counts are a run of tokens, and what stands off the mask is behind them.
    """
    length = sum(counts)
    if not all(counts[:length]) or not all(pieces[:length]):
        return None
    text = "".join(pieces)
    if PART_OF_A_CHARACTER in text:
        return None
    ends = list(accumulate(map(len, pieces[:length])))
    places = [*zip([0, *ends], ends, strict=False), *[(0, 0)] * (len(counts) - length)]
    return text + (BETWEEN if text and length < len(counts) else ""), places


def ends_of_steps(
    tokenizer: PreTrainedTokenizerBase | None,
    ids: Int[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    pattern: re.Pattern[str],
) -> Bool[Tensor, "N T"]:
    """True at the tokens in which a match of `pattern` ends; of empty matches there are none."""
    is_end = torch.zeros_like(mask)
    for row, (text, places) in enumerate(locate(tokenizer, ids, mask)):
        last = {match.end() - 1 for match in pattern.finditer(text) if match.group()}
        is_end[row, [t for t, place in enumerate(places) if not last.isdisjoint(range(*place))]] = True
    return is_end
