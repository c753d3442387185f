"""Where a user of another trainer names terms: a YAML file with `entropy_terms`, or the list itself."""

import logging
from collections.abc import Mapping
from pathlib import Path

from ..chain.chain import Chain
from ..recipe.links import build_chain
from ..recipe.reading import read_recipe

logger = logging.getLogger("hclm_rl")

KEYS = ("recipe", "entropy_terms", "seed")


def chain_of_file(path: str) -> Chain:
    """The terms that a recipe names; its other keys are of TRL, and whoever has some is told that nobody reads them.

    Refuses a recipe without entropy_terms.
    """
    file = Path(path).expanduser()
    recipe = read_recipe(file)
    if "entropy_terms" not in recipe:
        raise ValueError(f"{file} names no entropy_terms: a list of names is needed, as in `entropy_terms: [clip_cov]`")
    if others := [key for key in recipe if key != "entropy_terms"]:
        logger.warning("of %s only entropy_terms is read here; not read: %s", file, ", ".join(others))
    return not_empty(build_chain(recipe["entropy_terms"]), str(file))


def chain_of_section(section: object, where: str) -> tuple[Chain, int]:
    """Terms and seed of a trainer's own config; `where` is what the section is called there.

    Refuses unknown keys, none or both of recipe and entropy_terms, and a seed that is no whole number.
    """
    example = f"`{where}.recipe=terms.yaml`"
    if not isinstance(section, Mapping):
        raise ValueError(f"this run has no {where} that names entropy terms: set {example}, got {section!r:.60}")
    if unknown := [str(key) for key in section if key not in KEYS]:
        raise ValueError(f"{where} has no key '{unknown[0]}'; allowed: {', '.join(KEYS)}")
    if (section.get("recipe") is None) == (section.get("entropy_terms") is None):
        raise ValueError(f"{where} needs either recipe or entropy_terms, as in {example}; got {sorted(section)}")
    seed = section.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"{where}.seed must be a whole number, got {seed!r}")
    if section.get("recipe") is not None:
        return chain_of_file(str(section["recipe"])), seed
    return not_empty(build_chain(section["entropy_terms"]), where), seed


def not_empty(chain: Chain, where: str) -> Chain:
    """Whoever asked for terms and gets none would train plainly without knowing. So that is refused."""
    if not chain.links:
        raise ValueError(f"{where} names no entropy term: take the adapter out, or name one")
    return chain
