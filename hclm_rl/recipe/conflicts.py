"""Links that work against each other, each in one sentence: said before training and to whoever checks a recipe."""

from itertools import combinations

from ..chain.chain import Chain, Link
from ..chain.coefficients import Aer, Constant, StepToTarget
from ..types import Direction

OPPOSITE: dict[Direction, Direction] = {"more": "less", "less": "more"}


def conflicts(chain: Chain) -> list[str]:
    """What of the chain undoes what; a link whose coefficient is the number 0 is not there."""
    links = [link for link in chain.links if not link.term.is_diagnostic and link.coef != Constant(coefficient=0.0)]
    found = [_of_two_controllers(links), *(_of_a_runaway(link) for link in links)]
    found += [f"'{link.name}': {caveat}" for link in links for caveat in link.term.caveats()]
    for first, second in combinations(links, 2):
        found += [_of_directions(first, second), _of_a_baseline(first, second)]
    return [sentence for sentence in found if sentence]


def direction(link: Link) -> Direction | None:
    """What a link does to the policy's entropy: its term's word, turned round by a negative coefficient."""
    is_turned = isinstance(link.coef, Constant) and link.coef.coefficient < 0
    seeks = link.term.seeks
    return OPPOSITE.get(seeks, seeks) if is_turned and seeks else seeks


def is_controlled(link: Link) -> bool:
    """Whether the link follows the entropy: by a coefficient that remembers, or by its term's own rule."""
    return direction(link) == "level" or bool(link.coef.initial_state())


def _of_two_controllers(links: list[Link]) -> str | None:
    names = [f"'{link.name}'" for link in links if is_controlled(link)]
    if len(names) < 2:
        return None
    return (
        f"{', '.join(names)} each control the entropy: every one answers what the others did, so they swing or drive "
        "each other to their bounds; keep one controller and give the others a number as coef"
    )


def _of_a_runaway(link: Link) -> str | None:
    if not (isinstance(link.coef, StepToTarget | Aer) and direction(link) == "less"):
        return None
    return (
        f"the coefficient of '{link.name}' grows while the entropy is below its target, and the term lowers the "
        "entropy: the two drive it to nothing; give the term a number or a schedule as coef"
    )


def _of_directions(first: Link, second: Link) -> str | None:
    """One link that lowers the entropy beside one that raises it or holds it up."""
    for lowers, other in ((first, second), (second, first)):
        if direction(lowers) != "less" or direction(other) == "less":
            continue
        if direction(other) is None and not is_controlled(other):
            continue
        does = "holds it at a level" if is_controlled(other) else "raises it"
        return (
            f"'{lowers.name}' lowers the entropy of the policy and '{other.name}' {does}: they work against each "
            "other; keep one of the two"
        )
    return None


def _of_a_baseline(first: Link, second: Link) -> str | None:
    """`first` runs before `second`."""
    if first.term.sets_baseline and second.term.centres:
        return (
            f"'{second.name}' centres the advantages again, which undoes the baseline that '{first.name}' set; keep "
            "one of the two"
        )
    if second.term.sets_baseline and (first.term.sets_baseline or first.term.centres):
        return (
            f"'{second.name}' makes the advantages anew from the rewards, which undoes '{first.name}' before it; keep "
            "one of the two"
        )
    if second.term.sets_baseline and first.term.shapes_advantages:
        return (
            f"'{second.name}' makes the advantages anew from the rewards, which undoes what '{first.name}' made of "
            f"them before it; put '{second.name}' first"
        )
    return None
