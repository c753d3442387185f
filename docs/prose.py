"""How the front pages read: `make prose`. Sentences too long, words that the house does not use, and LIX a page.

LIX (Bjornsson, 1968) = words a sentence + 100 x share of words of more than six letters. About 30 reads like a story,
40 like a newspaper, 50 like an official text, 60 like a dissertation. It needs no syllables, so no dictionary. Code,
tables and addresses are left out; code within a sentence counts as a short word.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
HARDEST, LONGEST, LONG_WORD = 40.0, 40, 6  # LIX a page; words a sentence; letters
WORDS = {  # not in this house -> what is said instead
    r"utili[sz]e\w*": "use",
    r"leverag(e|es|ing) (the|a|an|this)": "use",
    r"in order to": "to",
    r"prior to": "before",
    r"subsequent(ly)?": "then",
    r"facilitate\w*": "help",
    r"commence\w*": "begin",
    r"approximately": "about",
    r"numerous": "many",
    r"via": "by or through",
    r"e\.g\.|i\.e\.": "such as, that is",
    r"obviously|simply|of course|very": "nothing",
    r"no longer|nowadays|currently": "what is so, without its history",
    r"optimizer|behavior|color|artifact|normalize\w*": "the British spelling",
    r"powerful|seamless(ly)?|robust(ly)?|state-of-the-art|cutting-edge": "a number",
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    lix: float
    words: int
    sentences: int
    too_long: list[str]
    strange: list[str]  # "utilize: say use"

    @property
    def is_fine(self) -> bool:
        return self.lix <= HARDEST and not self.too_long and not self.strange


def front_pages() -> list[str]:
    """README and what the site's navigation has under Start and How-to."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    parts = [part for each in nav for name, part in each.items() if name in ("Start", "How-to")]
    pages = [file for part in parts for entry in part for file in entry.values()]
    return ["README.md", *(f"docs/{page}" for page in pages if page != "index.md")]


def prose(text: str) -> Iterator[str]:
    """Paragraphs and list items as a reader's eye takes them: no code, tables, headings, pictures or addresses."""
    text = re.sub(r"^(```|~~~).*?^\1\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)", text):
        if not re.match(r"\s*(\||#|<| {4})", block):
            yield " ".join(re.sub(r"^\s*(?:[-*]|\d+\.)\s", "", block).replace("*", "").split())


def sentences_of(paragraph: str) -> list[str]:
    """Split where an end mark is followed by a space; a semicolon or a colon ends none."""
    return [each for each in re.split(r"(?<=[.!?])[)\"]?\s+", paragraph) if re.search(r"[A-Za-z]{2}", each)]


def words_of(text: str) -> list[str]:
    return re.findall(r"[A-Za-z][A-Za-z'-]*", text)


def read(text: str) -> Reading:
    sentences = [sentence for paragraph in prose(text) for sentence in sentences_of(paragraph)]
    words = [word for sentence in sentences for word in words_of(sentence)]
    long = sum(len(word) > LONG_WORD for word in words)
    whole = "\n".join(prose(text))
    strange = [
        f"{found[0]}: say {instead}"
        for pattern, instead in WORDS.items()
        for found in re.finditer(rf"\b(?:{pattern})(?!\w)", whole, flags=re.IGNORECASE)
    ]
    return Reading(
        lix=len(words) / len(sentences) + 100 * long / len(words) if words else 0.0,
        words=len(words),
        sentences=len(sentences),
        too_long=[each for each in sentences if len(words_of(each)) > LONGEST],
        strange=strange,
    )


def main() -> int:
    found = {page: read((ROOT / page).read_text(encoding="utf-8")) for page in front_pages()}
    for page, reading in found.items():
        print(f"{page:28} LIX {reading.lix:4.1f}, {reading.words / max(reading.sentences, 1):4.1f} words a sentence")
        for each in reading.too_long:
            print(f"    {len(words_of(each))} words: {each[:110]}")
        for each in reading.strange:
            print(f"    {each}")
    return 0 if all(reading.is_fine for reading in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
