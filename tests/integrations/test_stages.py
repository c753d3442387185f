"""The adapters' own core, without the packages that they are for: what TRL's step does to a batch, it does too."""

import pytest
import torch

from hclm_rl.integrations.first_stage import FirstStage
from hclm_rl.integrations.second_stage import added, second_stage, token_batch

from .recorded import SEED, record

TERMS = {
    # all candidates are dropped: which of them a smaller share draws depends on the order of the rows
    "clip_cov": ([{"clip_cov": {"ratio": 1.0, "lower": 0.05, "upper": 9.0}}], False),
    "kl_cov": ([{"kl_cov": {"ratio": 0.2}}], True),
    "max_rl": (["max_rl"], False),
    "forking_tokens": ([{"forking_tokens": {"share": 0.4}}], False),
    "entropy_bonus": ([{"entropy_bonus": {"coef": 0.1}}], False),
    "rewards, then advantages": ([{"unlikeliness": {}}, {"forking_tokens": {"share": 0.4}}], True),
}


@pytest.fixture(scope="module", params=TERMS, ids=TERMS.keys())
def recorded(request, tmp_path_factory, policy):
    terms, off_policy = TERMS[request.param]
    return record(policy, tmp_path_factory.mktemp("run"), terms, off_policy=off_policy)


def normalised(given):
    """GRPO's advantages as TRL has them."""

    def renormalise(rewards, rows):
        uid = [given.uid[row] for row in rows.tolist()]
        advantages, scale = torch.zeros_like(rewards), torch.ones_like(rewards)
        for prompt in set(uid):
            own = torch.tensor([each == prompt for each in uid])
            scale[own] = rewards[own].std() + 1e-4
            advantages[own] = (rewards[own] - rewards[own].mean()) / scale[own]
        return advantages, scale

    return renormalise


def test_a_step_is_the_one_under_trl(recorded):
    given = recorded.given
    first = FirstStage.of(recorded.chain, SEED)
    shaped = first(given, normalised(given), step=0, progress=0.0)
    logps, entropy = (values.clone().requires_grad_() for values in (recorded.logps, recorded.entropy))
    advantages = given.advantages if shaped.advantages is None else shaped.advantages
    batch = token_batch(
        shaped.told,
        shaped.rows,
        logps=logps,
        old_logps=recorded.old_logps,
        entropy=entropy,
        advantages=advantages,
        mask=given.mask,
        ids=given.ids,
    )
    outcome = second_stage(recorded.chain, shaped.told, batch, shaped.rows)
    advantages = advantages if outcome.advantages is None else outcome.advantages
    ratio = (logps - recorded.old_logps).exp()
    surrogate = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)

    def mean(values):
        return torch.where(given.mask, values, 0).sum() / given.mask.sum()

    more = added(outcome, shaped.told, mean, 1.0)
    loss = mean(surrogate) + (0 if more is None else more)
    found = torch.autograd.grad(loss, [logps, entropy], allow_unused=True)
    at_entropy = torch.zeros_like(entropy) if found[1] is None else found[1]
    assert recorded.at_logps.abs().max() > 1e-3
    torch.testing.assert_close(found[0], recorded.at_logps, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(at_entropy, recorded.at_entropy, atol=1e-6, rtol=1e-5)
