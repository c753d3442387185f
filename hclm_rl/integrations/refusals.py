"""What another trainer cannot give to terms, each said in one sentence before anything is trained."""

from dataclasses import dataclass

from ..chain.chain import Chain, Link
from ..recipe.links import NOTHING
from ..types import Term


@dataclass(frozen=True, kw_only=True)
class Gives:
    """What of a rollout and of a micro-batch an adapter hands to the chain."""

    where: str  # as in "under verl's trainer"
    instead: str  # what to do about it
    scores: bool  # log-probs of the sampling policy, before the update
    entropies: bool  # and its entropies
    columns: bool  # whether what stage 1 attaches to a row reaches stage 2
    rewards: bool  # rewards and groups
    reference: bool  # log-probs of the frozen model of the KL penalty


def lacks(link: Link, gives: Gives) -> str | None:
    """What the term needs and does not get, in words."""
    term = link.term
    needs = [
        (term.needs_hidden, "hidden states"),
        (term.needs_vocab or term.needs_vocab_gradient, "the whole next-token distribution"),
        (term.needs_rescoring, "passes of its own over other texts"),
        (term.needs_reference_model, "the frozen model itself"),
        (term.needs_attention, "attention entropies"),
        (type(term).on_step is not Term.on_step, "what a whole optimiser step measured, to set itself by it"),
        (term.needs_reference and not gives.reference, "log-probs of a frozen model, which this run does not make"),
        (term.needs_scores and not gives.scores, "log-probs of the whole rollout before the update"),
        (has_first_stage(term) and not gives.rewards, "the whole rollout, with its rewards and groups"),
        (link.coef.needs_entropy and not gives.entropies, "the rollout's entropy, by which its coefficient is set"),
        (has_both_stages(term) and not gives.columns, "in the loss what it found in the whole rollout"),
    ]
    return next((what for does, what in needs if does), None)


def has_first_stage(term: Term) -> bool:
    """Whether stage 1 does anything: with statistics per micro-batch it does not."""
    return type(term).on_rollout is not Term.on_rollout and getattr(term, "statistics", "step") == "step"


def has_both_stages(term: Term) -> bool:
    """Whether stage 2 may build on stage 1."""
    return has_first_stage(term) and type(term).__call__ is not Term.__call__


def refuse_what_is_lacking(chain: Chain, gives: Gives) -> None:
    """Raises one sentence with the first term that cannot work here."""
    for link in chain.links:
        if link.coef != NOTHING and (what := lacks(link, gives)):
            raise ValueError(
                f"the entropy term '{link.name}' reads {what}, which it does not get {gives.where}: {gives.instead}"
            )
