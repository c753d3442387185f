"""A step of our own trainer under TRL, written down: what both stages saw, and the gradient at the log-probs."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hclm_rl import Rollout
from hclm_rl.chain.chain import Chain
from hclm_rl.integrations.first_stage import Generated
from hclm_rl.recipe.config import build_chain
from hclm_rl.trainer import mixin, stage_one

from ..tiny import make

SEED = 7  # of tests/tiny.py: what is drawn at random depends on it
# the rows as another trainer might have them: neither in groups nor in the order of the loss
ORDER = torch.tensor([5, 0, 7, 2, 4, 1, 6, 3])


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Rows are in ORDER of the rollout's."""

    chain: Chain
    given: Generated
    logps: Tensor  # (N, T), of the policy in the loss
    old_logps: Tensor
    entropy: Tensor
    at_logps: Tensor  # (N, T), d loss / d log-prob under TRL
    at_entropy: Tensor


def record(policy: str, out: Path, terms: list, *, off_policy: bool = False) -> Recorded:
    """One step on eight responses of two prompts; off policy the log-probs have moved since sampling."""
    rollouts: list[Rollout] = []
    passes: list[tuple[Tensor, Tensor]] = []
    losses: list[tuple[dict, Tensor, Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        rollout_of, trls_pass = stage_one.rollout_of, mixin.EntropyTermsMixin._hclm_trls_pass

        def seen(*args: object) -> Rollout:
            rollouts.append(rollout_of(*args))
            return rollouts[-1]

        def leaves(self: object, *args: object, **kwargs: object) -> tuple:
            logps, entropy, aux = trls_pass(self, *args, **kwargs)
            if self._hclm.inputs is None or entropy is None:
                return logps, entropy, aux
            noise = torch.randn(logps.shape, generator=torch.Generator().manual_seed(3)) if off_policy else 0.0
            pair = (logps.detach() + 0.1 * noise).requires_grad_(), entropy.detach().requires_grad_()
            passes.append(pair)
            return *pair, aux

        def loss_of(self: object, model: object, inputs: dict) -> Tensor:
            loss = compute_loss(self, model, inputs)
            logps, entropy = passes[-1]
            both = torch.autograd.grad(loss, [logps, entropy], allow_unused=True, retain_graph=True)
            old = inputs.get("old_per_token_logps")
            losses.append((inputs, *(torch.zeros_like(logps) if each is None else each for each in both)))
            losses[-1][0]["old"] = logps.detach() if old is None else old
            return loss

        compute_loss = mixin.EntropyTermsMixin._compute_loss
        patch.setattr(stage_one, "rollout_of", seen)
        patch.setattr(mixin.EntropyTermsMixin, "_hclm_trls_pass", leaves)
        patch.setattr(mixin.EntropyTermsMixin, "_compute_loss", loss_of)
        iterations = 2 if off_policy else 1
        make(policy, out, terms=terms, fixed=True, max_steps=1, num_iterations=iterations).train()
    return as_recorded(terms, rollouts[0], losses[0], passes[0])


def as_recorded(
    terms: list, rollout: Rollout, step: tuple[dict, Tensor, Tensor], pair: tuple[Tensor, Tensor]
) -> Recorded:
    """All by the rows of ORDER."""
    inputs, at_logps, at_entropy = step
    # the loss has the rollout's rows shuffled; here no two responses are the same
    of_loss = [(inputs["completion_ids"] == rollout.ids[row]).all(dim=1).int().argmax().item() for row in ORDER]
    assert torch.equal(inputs["completion_ids"][of_loss], rollout.ids[ORDER]) and len(set(of_loss)) == len(ORDER)
    mask = rollout.mask[ORDER]
    given = Generated(
        ids=rollout.ids[ORDER],
        mask=mask,
        rewards=rollout.rewards[ORDER],
        advantages=torch.where(mask, rollout.advantages[ORDER].unsqueeze(1), 0),
        uid=[f"prompt-{number}" for number in rollout.group[ORDER].tolist()],
        counts=[True] * len(ORDER),
        scale=rollout.reward_scale[ORDER],
        logps=None if rollout.logps is None else rollout.logps[ORDER],
        entropy=None if rollout.entropy is None else rollout.entropy[ORDER],
    )
    logps, entropy = (values.detach()[of_loss] for values in pair)
    return Recorded(
        chain=build_chain(terms),
        given=given,
        logps=logps,
        old_logps=inputs["old"][of_loss],
        entropy=entropy,
        at_logps=at_logps[of_loss],
        at_entropy=at_entropy[of_loss],
    )
