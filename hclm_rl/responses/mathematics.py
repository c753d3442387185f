r"""Answers as mathematics, read and compared by math-verify: each whole, or as its text where math-verify reads a part.

What math-verify does by itself, and what is done about it here:
- of what is no LaTeX it takes the last number (7 hours 30 minutes is 30): text that it does not read whole stays text;
- 12\,345 and 12 345 are 12 + 345, a minus sign U+2212 is dropped, 101_2 is 101, 3:30 is 1/10: read here, and in
  typography.py;
- its regular expressions take quadratic time and more: they see one answer, or the end of a response.
All of it runs in the process of limits.py.
"""

import functools
import re
from dataclasses import dataclass

from .limits import DIGITS, LENGTH, OverLimits, within_limits
from .readers import minus_signs
from .typography import is_read_apart, plainly

LARGEST_POWER = 100
ENVIRONMENT = re.compile(r"\\(?:begin|end) *\{[A-Za-z*]+\}(?: *\{[lcr| ]+\})?")
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|rm) *\{([^{}]*)\}( *\^ *\{?-?\d\}?)?")
RUN = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}\.?|[^\W\d_A-Za-z\u0370-\u03ff]+")  # single letters are variables
LIST = re.compile(r" *,? *(?:\\text *\{ *,? *(?:and|or) *\}|(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])) *")
FUNCTIONS = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|sqrt|max|min|gcd|lcm|mod"
PLAIN_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({FUNCTIONS})(?![A-Za-z])")
SMALL_WORD = re.compile(  # of two or three letters, and no product of variables
    "to|of|is|at|by|in|on|or|and|the|for|are|per|was|yes|no|not|all|odd|cm|mm|km|kg|mg|ml|ft|yd|lb|oz|hr|hrs|sec|day|"
    "mph|am|pm|usd|eur"
)
AREA = re.compile(  # 5 cm^2
    r"(?<=[\d}])( ?(?:[cdkm]m|ft|yd|in|inch|(?:inche|unit|meter|metre|mile|yard)s?|feet|foot))"
    r" ?\^ ?(?:[23](?!\d)|\{[23]\})"
)
CLOCK = re.compile(r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))? ?(?:([ap])\.? ?m\.?)?", re.IGNORECASE)
BASE = re.compile(r"\(?(-?\d[0-9A-Fa-f]*(?:\.[0-9A-Fa-f]+)?)\)? ?_ ?\{? ?\(?(\d{1,2})\)? ?\}?")
CODED = re.compile(r"(-?)0(?:(x)|(o)|(b))([0-9a-f]+)", re.IGNORECASE)
PLAIN_NUMBERS = re.compile(r"[\d .,+\-*/^()%]+")
RANGE = re.compile(r"-?\d[\d,]*(?:\.\d+)? ?[-\u2013] ?-?\d[\d,]*(?:\.\d+)?")
CHOICE = re.compile(r"\(([A-Z])\)")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What an answer says, as far as it can be read."""

    text: str  # without spaces and typography
    values: list  # math-verify's: the expression and its text; empty where only the text counts
    in_words: bool = False  # several numbers among words, or words alone
    clock: frozenset[int] = frozenset()  # seconds of the day that a time may mean, 3:30 being two
    base: tuple[str, int] | None = None  # 101_2: "101" and 2


def equal(first: str, second: str) -> bool:
    """Whether both are the same answer. Raises OverLimits."""
    return bool(_checked(_equal, first, second))


def reference(answer: str) -> tuple[str | None, str]:
    """The name of a reference answer, or None and why it cannot be compared with. Raises OverLimits."""
    name, why = _checked(_reference, answer)  # type: ignore[misc]
    return name, why


def judged(gold: str, answer: str, is_boxed: bool) -> tuple[str | None, bool]:
    """The name of the answer, None where nothing was read, and whether it is `gold`. Raises OverLimits."""
    name, is_right = _checked(_judged, gold, answer, is_boxed)  # type: ignore[misc]
    return name, is_right


def _checked(function: object, *arguments: str | bool) -> object:
    for text in arguments:
        if isinstance(text, str) and len(text) > LENGTH:
            raise OverLimits(f"more than {LENGTH} characters")
        if isinstance(text, str) and re.search(rf"\d{{{DIGITS + 1}}}", text):
            raise OverLimits(f"more than {DIGITS} digits")
    return within_limits(function, *arguments)  # type: ignore[arg-type]


def _equal(first: str, second: str) -> bool:
    return is_same(read(first), read(second))


def _reference(answer: str) -> tuple[str | None, str]:
    answer = answer.strip()
    found = read(answer)
    if RANGE.fullmatch(plainly(answer)):
        return None, "may be a range or a difference"
    if found.in_words and re.search(r"\d", found.text):
        return None, "holds several numbers among words, which are not compared as mathematics"
    is_read = found.values or found.clock or found.base or (re.search(r"\d", found.text) and not found.in_words)
    return (name_of(found), "") if is_read else (None, "does not parse as mathematics")


def _judged(gold: str, answer: str, is_boxed: bool) -> tuple[str | None, bool]:
    right = read(gold)
    found = read(answer) if is_boxed else read_prose(answer)
    if found is None or not (found.text or found.values):
        return None, False
    if is_same(right, found):
        return name_of(right), True
    name = name_of(found)
    return f"{name}, otherwise written" if name == name_of(right) else name, False


@functools.lru_cache(maxsize=256)
def read(answer: str) -> Reading:
    """The whole of it as mathematics, else its text."""
    plain = plainly(answer)
    text = squeezed(plain)
    if clock := CLOCK.fullmatch(unwrapped(plain)):
        return Reading(text=text, values=parsed(plain), clock=times(clock))
    if (based := BASE.fullmatch(plain)) and 2 <= int(based[2]) <= 36:
        return Reading(text=text, values=[], base=(based[1].upper(), int(based[2])))
    if coded := CODED.fullmatch(plain):
        base = 16 if coded[2] else 8 if coded[3] else 2
        return Reading(text=text, values=[], base=(coded[1] + coded[5].upper(), base))
    parts = listed(plain)
    if len(parts) > 1:
        is_time = any(CLOCK.fullmatch(unwrapped(part)) for part in parts)
        is_read = not is_time and not any(map(has_words, parts)) and all(parsed(part) for part in parts)
        values = parsed("$ and $".join(parts)) if is_read else []
        return Reading(text=text, values=values, in_words=not values)
    numbers = [piece for piece in pieces(plain) if re.search(r"\d", piece)]
    if not has_words(plain):
        return Reading(text=text, values=parsed(plain))
    values = parsed(numbers[0]) if len(numbers) == 1 and not RANGE.fullmatch(numbers[0]) else []
    return Reading(text=text, values=values, in_words=not values)


def read_prose(text: str) -> Reading | None:
    """The answer in the end of a response without a box, where math-verify finds one, else the last choice (C)."""
    from math_verify import parse

    values = parse(minus_signs(text), parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if values:
        return Reading(text=squeezed(plainly(str(values[-1]))), values=values)
    choices = CHOICE.findall(text)
    return read(choices[-1]) if choices else None


def unwrapped(plain: str) -> str:
    """Without the wrappers of text in LaTeX, spaces made one."""
    return " ".join(TEXT.sub(r" \1 ", plain).split())


def squeezed(plain: str) -> str:
    """Without spaces beside signs, and without the typography of LaTeX."""
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", unwrapped(plain)).replace(r"\dfrac", r"\frac")
    return re.sub(r"(?<=\W) | (?=\W)", "", text)


def pieces(plain: str) -> list[str]:
    """What stands between the words; plain itself where there are none."""

    def without(found: re.Match) -> str:
        return f" {found[1]} " if any(is_word(run, found[1]) for run in RUN.findall(found[1])) else found[0]

    text = re.sub(r" ?(?:percentage|percent|pct)(?![A-Za-z])", r"\\%", TEXT.sub(without, AREA.sub(r"\1", plain)))
    bare = ENVIRONMENT.sub("", text)
    words = [run for run in RUN.findall(bare) if is_word(run, bare)]
    if not words:
        return [text]
    ends = "|".join(rf"(?<![\\A-Za-z]){re.escape(word)}(?![A-Za-z])" for word in sorted(set(words), key=len)[::-1])
    return [piece.strip(" ,;:") for piece in re.split(ends, text)]


def has_words(plain: str) -> bool:
    """Whether it is more than one piece."""
    return len(pieces(plain)) > 1


def is_word(run: str, text: str) -> bool:
    """Whether the letters are a word and not a function's name or a product of variables, as in 2xy + z."""
    run = run.lower().removesuffix(".")
    if re.fullmatch(FUNCTIONS, run):
        return False
    if len(run) > 3 or SMALL_WORD.fullmatch(run) or not run.isascii():
        return True
    return not re.search(r"[\d+\-*/^=\\_<>]", text)


def listed(plain: str) -> list[str]:
    """The parts of "1, 2 and 3"; plain alone where neither "and" nor "or" joins it."""
    if not LIST.search(plain):
        return [plain]
    parts, depth, start = [], 0, 0
    text = LIST.sub("\0", plain)
    for at, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "\0" or (sign == "," and depth == 0):
            parts.append(text[start:at])
            start = at + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def parsed(plain: str) -> list:
    """What math-verify reads as LaTeX, or as numbers and signs alone; empty where that is not the whole of it."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    if not plain or is_read_apart(plain):
        return []
    plain = re.sub(r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}", PLAIN_FUNCTION.sub(r"\\\1", plain))
    found = parse(f"${plain}$", [LatexExtractionConfig()], parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if len(found) < 2 and PLAIN_NUMBERS.fullmatch(plain):
        found = parse(plain, [ExprExtractionConfig()], parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return found if len(found) > 1 else []  # the text alone says that nothing was read


def times(found: re.Match) -> frozenset[int]:
    """Seconds of the day that the time may mean: 3:30 is one of two."""
    hour, minute, second = (int(part or 0) for part in found.groups()[:3])
    hours = (
        {hour % 12 + 12 * (found[4].lower() == "p")} if found[4] else {hour, hour + 12} if 0 < hour <= 12 else {hour}
    )
    return frozenset(each * 3600 + minute * 60 + second for each in hours)


def is_same(gold: Reading, found: Reading) -> bool:
    """Whether the answer found means what the reference means."""
    from math_verify import verify

    if gold.clock and (found.clock or not gold.values or len(gold.clock) == 1):
        return bool(gold.clock & found.clock)
    if gold.base or found.base:
        digits = [each.base[0] if each.base else each.text.upper() for each in (gold, found)]
        bases = {each.base[1] for each in (gold, found) if each.base}
        return digits[0] == digits[1] and len(bases) == 1
    if gold.values and found.values:
        return verify(gold.values, found.values, timeout_seconds=None)
    return gold.text == found.text


def name_of(reading: Reading) -> str:
    """One name for all spellings that were read alike."""
    if reading.clock or not reading.values:
        return reading.text
    return canonical(reading.values)


def canonical(parsed: list) -> str:
    """One spelling for what math-verify read: floats as fractions, fractions reduced, where that cannot take long.

    Where evaluation leaves nothing of the answer (2 + 2 = 5 is False, 1/0 is zoo) what was read stays, or the text.
    """
    text = squeezed(plainly(str(parsed[-1])))
    try:
        spellings = [spelled(parsed[0]), parsed[0]]
        kept = [each for each in spellings if not is_swallowed(each)]
        return str(kept[0]) if kept else text
    except Exception:  # whatever sympy raises: no response may end the evaluation
        return text


def is_swallowed(value: object) -> bool:
    """Whether nothing of an answer is left: a truth value, no number, an empty set."""
    import sympy
    from sympy.logic.boolalg import BooleanAtom

    if not isinstance(value, sympy.Basic):
        return False
    parts = value.args[:2] if isinstance(value, sympy.Interval) else value.args  # the other two say which end is open
    is_nothing = isinstance(value, BooleanAtom) or value in (sympy.S.EmptySet, sympy.zoo, sympy.nan)
    return is_nothing or any(map(is_swallowed, parts))


def spelled(value: object) -> object:
    """The value with decimals as fractions and worked out, where that is quick."""
    import sympy

    if not isinstance(value, sympy.Basic) or not all(map(is_quick, sympy.preorder_traversal(value))):
        return value  # 9^9^9, 50!! and (1 + 0.06/365)^3650 stay as they are
    exact = value.xreplace({number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)})
    return exact.doit()


def is_quick(node: object) -> bool:
    """Whether a part of an expression can be evaluated at once: no factorial, no sum over many, no tower of powers."""
    import sympy
    from sympy.functions.combinatorial.factorials import CombinatorialFunction

    if isinstance(node, sympy.Pow):
        is_small = node.exp.is_Rational and abs(node.exp) <= LARGEST_POWER
        is_tower = any(abs(inside.exp) != 1 for inside in node.base.atoms(sympy.Pow))
        return node.exp == -1 or (is_small and not is_tower)
    slow = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.gamma, sympy.binomial, CombinatorialFunction)
    return not isinstance(node, slow)
