r"""Answers in one typography before they are read as mathematics: x² is x^{2}, 2½ is \frac{5}{2}, 12\,345 is 12345.

And what is not to be read at all, because math-verify takes a part of it, or a sum or product that nobody wrote:
"1 2" is 3 to it, "1, 2, ..., 5" is 5, "5'6" is 56, "2 R 3" is 6r.
"""

import re
import unicodedata

from .readers import minus_signs

GROUPED = re.compile(r"(?<![\d.,_^])\d{1,3}(?:(?: |'|\u2019|_|\\[,;: ]|\{,\}|,\\!)\d{3})+(?!\d)")
SPACES = re.compile(r"(?<!\\)\\[,;:! ]|\\q?quad(?![A-Za-z])|~|(?<!\\)\$|[\u20ac\xa3\xa5]|\s")
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-", strict=True))
POWER = re.compile(rf"[{''.join(RAISED)}]+")
ROOT = re.compile(r"√ ?(\d+(?:\.\d+)?|[A-Za-z\u0370-\u03ff])?")
SIGNS = {"·": r"\cdot ", "∞": r"\infty ", "°": r"^\circ ", "\N{FRACTION SLASH}": "/"}
MIXED = re.compile(r"(?<![\w./^{}\\])(\d+) +(\d+) ?/ ?(\d+)(?![\d./])")  # 3 1/2
MIXED_FRACTION = re.compile(r"(?<![\w./^}\\])(?<![A-Za-z] )(\d+) ?\\[dt]?frac ?\{(\d+)\} ?\{(\d+)\}")  # 3\frac{1}{2}
UNBRACED = re.compile(r"\\sqrt ?(\d{2,})")  # \sqrt 15, of which TeX takes the 1
EXPONENT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]\+?(-?\d{1,3})(?!\w)")  # 2e3
INDEX = re.compile(r"(?<![A-Za-z])((?:log|sin|cos|tan|cot|sec|csc) ?[_^]) ?(\d+)(?= +[\d.])")  # \log_2 8
READS_APART = re.compile(
    r"(?<![cm]\ )(?<![\d.])[\d.]+\ +[\d.]"  # 1 2, but not \frac 1 2 or \binom 4 2
    r"|\.\.|\\[lc]?dots|\u2026"  # 1, 2, ..., 5
    r"|\d\.\d+\.\d"  # a date, a version
    r"|\d ?(?:['\"]|\\prime)"  # feet and inches
    r"|\d ?(?<![A-Za-z\\])[A-Za-z](?![A-Za-z]) ?\d"  # 2 R 3, 3h20, 2 x 3
    r"|\d_"  # 1010_{two}
    r"|[+-]$"  # 5+
    r"|\d ?: ?\d+ ?: ?\d"  # 5:3:2
    r"|≈|\\approx"
)


def plainly(answer: str) -> str:
    """With plain minus signs, spaces, numbers, powers and fractions, without signs of currency."""
    answer = POWER.sub(lambda found: f"^{{{''.join(RAISED[sign] for sign in found[0])}}}", minus_signs(answer))
    answer = ROOT.sub(lambda found: rf"\sqrt{{{found[1]}}}" if found[1] else r"\sqrt", answer)
    answer = MIXED_FRACTION.sub(mixed, MIXED.sub(mixed, "".join(map(plain_sign, answer))))
    answer = INDEX.sub(r"\1{\2}", EXPONENT.sub(r"\1\\times 10^{\2}", answer))
    answer = GROUPED.sub(lambda found: re.sub(r"\D", "", found.group()), answer)
    answer = UNBRACED.sub(r"\\sqrt{\1}", answer)
    return " ".join(SPACES.sub(" ", answer.replace("{:}", ":")).split()).removesuffix(".").strip()


def plain_sign(sign: str) -> str:
    r"""½ as \frac{1}{2}, and SIGNS as LaTeX."""
    if sign.isascii() or sign in SIGNS:
        return SIGNS.get(sign, sign)
    upper, slash, lower = unicodedata.normalize("NFKC", sign).partition("\N{FRACTION SLASH}")
    return rf"\frac{{{upper}}}{{{lower}}}" if slash else sign


def mixed(found: re.Match) -> str:
    r"""3 1/2 as \frac{7}{2}, as 3\frac{1}{2}x is a product to math-verify, 3x/2.

    12 345/2 has an improper fraction, and is one number with its thousands apart.
    """
    whole, upper, lower = map(int, found.groups())
    return rf"\frac{{{whole * lower + upper}}}{{{lower}}}" if upper < lower else found[0]


def is_read_apart(plain: str) -> bool:
    """Whether math-verify would take a part of it, or put together what stands beside each other."""
    return READS_APART.search(plain) is not None
