"""Which terms work where: what they declare, and what happens on a small batch. docs/integrations.md has the table."""

from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from ..chain.chain import Chain, Link
from ..chain.coefficients import Constant
from ..recipe.links import find_term, known_terms
from ..testbed.policy import new_tokenizer
from .absent import Absent
from .first_stage import FirstStage, Generated, Shaped
from .refusals import lacks
from .second_stage import second_stage, token_batch
from .skyrl import arguments as skyrl
from .skyrl.both_stages import left_by_both
from .told import Told
from .verl import settings as verl

UNDER_VERL = verl.gives({"actor_rollout_ref": {"actor": {"use_kl_loss": True}}})
UNDER_SKYRL = skyrl.gives(SimpleNamespace(use_kl_loss=True))
REASONS = {
    verl.NO_ENTROPY: "entropies",
    skyrl.NO_ENTROPY: "entropies",
    skyrl.NO_POLICY: "the policy as it is in the update, or a loss of its own",
}
LIGHT = ", with `statistics: micro_batch`"


def batch() -> Generated:
    """Two prompts, four responses each, some of them right."""
    draws = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor([6, 3, 5, 2, 4, 6, 3, 5]).unsqueeze(1)
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 0])
    return Generated(
        ids=torch.randint(0, 8, mask.shape, generator=draws),
        mask=mask,
        rewards=rewards,
        advantages=torch.where(mask, (2 * rewards - 1).unsqueeze(1), 0),
        uid=[0, 0, 0, 0, 1, 1, 1, 1],
        counts=[True] * 8,
        scale=torch.ones(8),
        logps=-torch.rand(mask.shape, generator=draws),
        entropy=torch.rand(mask.shape, generator=draws),
        ref_logps=-torch.rand(mask.shape, generator=draws),
        beta=0.1,
        prompts=["1 + 1 ="] * 8,
        texts=["2", "3", "4", "2", "5", "6", "2", "7"],
        tokenizer=new_tokenizer(),
    )


def unchanged(rewards: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """An algorithm whose advantages are the rewards. All are (N,), N the places of the groups."""
    return rewards, torch.ones_like(rewards)


def first(chain: Chain, given: Generated) -> Shaped:
    """Stage 1 of a chain alone."""
    return FirstStage.of(chain)(given, unchanged, step=0, progress=0.0)


def in_light_loss(chain: Chain) -> None:
    """Stage 2 alone, of log-probs and advantages."""
    given = batch()
    assert given.logps is not None
    logps = given.logps.clone().requires_grad_()
    told = Told(step=0, progress=0.0, coefs={link.name: 1.0 for link in chain.links})
    tokens = token_batch(
        told,
        {},
        logps=logps,
        old_logps=given.logps - 0.1,
        entropy=Absent.like(logps, verl.NO_ENTROPY),
        advantages=given.advantages,
        mask=given.mask,
        ids=given.ids,
    )
    second_stage(chain, told, tokens, {})


def under_verl(chain: Chain) -> None:
    """Both stages, with log-probs and entropies."""
    given = batch()
    assert given.logps is not None and given.entropy is not None
    shaped = first(chain, given)
    tokens = token_batch(
        shaped.told,
        shaped.rows,
        logps=given.logps.clone().requires_grad_(),
        old_logps=given.logps - 0.1,
        entropy=given.entropy.clone().requires_grad_(),
        advantages=given.advantages if shaped.advantages is None else shaped.advantages,
        mask=given.mask,
        ids=given.ids,
        ref_logps=given.ref_logps,
    )
    second_stage(chain, shaped.told, tokens, shaped.rows)


def under_skyrl(chain: Chain) -> None:
    """Both stages as SkyRL runs them, which raises where a term does not work there."""
    given = replace(batch(), entropy=None, no_entropy=skyrl.NO_ENTROPY)
    left_by_both(chain, given, first(chain, given))


def tried(run: Callable[[Chain], None], chain: Chain) -> str | None:
    """What the term lacks when it is run on the small batch; None where it lacks nothing."""
    try:
        run(chain)
    except ValueError as error:
        for sentence, what in REASONS.items():
            if sentence in str(error):
                return what
        raise
    return None


def works(name: str) -> tuple[str, str, str]:
    """Under verl's trainer, in verl's policy loss, under SkyRL: "yes", or what the term lacks there."""
    term_class = find_term(name)
    link = Link(name=name, term=term_class(), coef=Constant(coefficient=1.0))
    chain = Chain((link,))
    light, more = link, ""
    if "statistics" in [each.name for each in fields(link.term)]:
        light, more = replace(link, term=replace(link.term, statistics="micro_batch")), LIGHT
    return (
        lacks(link, UNDER_VERL) or tried(under_verl, chain) or "yes",
        lacks(light, verl.OF_THE_LOSS) or tried(in_light_loss, Chain((light,))) or f"yes{more}",
        lacks(link, UNDER_SKYRL) or tried(under_skyrl, chain) or "yes",
    )


def table() -> list[tuple[str, str, str, str]]:
    """A row a term."""
    return [(name, *works(name)) for name in known_terms()]
