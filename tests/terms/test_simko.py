"""SimKO against its card (arXiv:2510.14807): numbers, the clip, and what the authors' ratio gives by autograd."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl import build_chain
from hclm_rl.equations.vocab import Head, over_vocab
from hclm_rl.terms.simko import Simko

from ..term_batches import card_step, first_stage, make_step, rollout, second_stage, surrogate, token_batch

LOGITS = [2.0, 1.0, 0.5, 0.0]


def one_token(ids: list[int], advantages: list[float], forks: list[bool], old: float | None = None):
    """A response whose every position has the card's logits: the hidden states, through a head of ones."""
    logits = torch.tensor([[LOGITS] * len(ids)], dtype=torch.float64).requires_grad_()
    tokens, fork = torch.tensor([ids]), torch.tensor([forks])
    logps = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    slots = [[0.0] * len(ids)]
    _, batch = card_step([[1] * len(ids)], slots, slots, [advantages])
    head = Head(weight=torch.eye(4, dtype=torch.float64))
    batch = replace(
        batch,
        ids=tokens,
        logps=logps,
        old_logps=logps.detach() if old is None else logps.detach() - old,
        over_vocab=lambda f: over_vocab(f, logits, head, mask=batch.mask),
        columns={"is_fork": fork},
    )
    return logits, batch


def gradient(term: Simko, **given) -> list[list[float]]:
    """Of PPO's loss and the added one, summed over the tokens, in the logits."""
    logits, batch = one_token(**given)
    effect = term(batch, {})
    assert effect.loss is not None and effect.advantages is not None and not effect.loss.any()
    (surrogate(batch, effect.advantages) + effect.loss).sum().backward()
    assert logits.grad is not None
    return logits.grad[0].tolist()


def test_the_cards_right_token():
    given = {"ids": [1], "advantages": [1.0]}
    # p less 0.99 of the second token and a third of 0.01 of the first three; the head is float32's softmax
    assert gradient(Simko(), forks=[True], **given)[0] == pytest.approx([0.5759, -0.7802, 0.1259, 0.0784], abs=5e-5)
    plain = [0.5793, -0.7869, 0.1293, 0.0784]
    assert gradient(Simko(), forks=[False], **given)[0] == pytest.approx(plain, abs=5e-5)
    assert gradient(Simko(a=0.0), forks=[True], **given)[0] == pytest.approx(plain, abs=5e-5)


def test_a_share_of_1_over_all_tokens_is_the_mean_of_their_pushes():
    # -(mean_k grad log p_k) = p - 1/4
    p = torch.tensor(LOGITS).softmax(0)
    found = gradient(Simko(a=1.0, k=9), ids=[1], advantages=[1.0], forks=[True])[0]
    assert found == pytest.approx((p - 0.25).tolist(), abs=1e-6)


def test_the_cards_wrong_favourite():
    _, batch = one_token(ids=[0, 0, 1], advantages=[-0.5] * 3, forks=[True, False, True])
    effect = Simko()(batch, {})
    # only where the policy is uncertain, and not the second choice
    assert effect.advantages is not None
    assert effect.advantages.tolist() == [pytest.approx([-0.55, -0.5, -0.5])]
    assert effect.metrics["favourites"].tolist() == [[1, 0, 0]] and effect.affected.tolist() == [[False] * 3]


def test_the_cards_uncertain_tokens():
    # places 0.8 * 4 = 3.2 of 0, 0.1, 0.2, 0.9, 1.5: 0.9 + 0.2 * 0.6 = 1.02
    entropy = [[0.1, 0.2, 1.5, 0.0, 0.9, math.nan]]
    view, _ = card_step([[1, 1, 1, 1, 1, 0]], entropy, entropy, entropy, entropy)
    assert Simko().on_rollout(view, {}).columns["is_fork"].tolist() == [[False, False, True, False, False, False]]


def test_the_ratio_weighs_the_shared_push_and_the_clip_drops_it():
    old = math.log(1.1)  # r = 1.1
    p = torch.tensor(LOGITS).softmax(0)
    one = torch.tensor([0.0, 1, 0, 0])
    three = torch.tensor([1.0, 1, 1, 0]) / 3
    expected = 1.1 * (p - 0.7 * one - 0.3 * three)
    found = gradient(Simko(a=0.3), ids=[1], advantages=[1.0], forks=[True], old=old)[0]
    assert found == pytest.approx(expected.tolist(), abs=1e-6)
    logits, batch = one_token(ids=[1], advantages=[1.0], forks=[True], old=math.log(1.3))
    effect = Simko(a=0.3)(replace(batch, is_clipped=torch.tensor([[True]])), {})
    assert not effect.affected.any()
    (surrogate(batch, effect.advantages) + effect.loss).sum().backward()
    assert not logits.grad.any()


def test_it_is_the_gradient_of_the_authors_ratio():
    """r~ = (1 - a) r + a/K sum_k sg(r / r_k) r_k, in the surrogate, over a whole step."""
    step = make_step(dtype=torch.float64)
    term = Simko(a=0.2, tau=0.5, lam=1.0, statistics="micro_batch")
    batch = token_batch(step)
    hidden = batch.hidden()
    logps = (hidden.double() @ step.head.T).log_softmax(-1)
    taken = logps.gather(-1, step.ids.unsqueeze(-1)).squeeze(-1)
    batch = replace(batch, logps=taken, clip_range=(1e9, 1e9))
    asked = second_stage(term, batch, first_stage(term, rollout(step), {}), {})
    (surrogate(batch, batch.advantages) + asked.losses["link"])[batch.mask].sum().backward()
    found = hidden.grad.clone()

    hidden = step.hidden.clone().requires_grad_()
    logps = (hidden @ step.head.T).log_softmax(-1)
    old = (step.old_hidden @ step.head.T).log_softmax(-1)
    r = (logps - old).gather(-1, step.ids.unsqueeze(-1)).squeeze(-1).exp()
    top = logps.topk(3, dim=-1).indices
    r_k = (logps - old).gather(-1, top).exp()
    mixed = 0.8 * r + 0.2 / 3 * ((r.unsqueeze(-1) / r_k).detach() * r_k).sum(-1)
    loss = torch.zeros(())
    for i, length in enumerate(step.mask.sum(1).tolist()):
        threshold = step.entropy[i, :length].quantile(0.5)
        for t in range(length):
            is_mixed = step.entropy[i, t] > threshold and step.advantages[i] > 0
            loss = loss - step.advantages[i] * (mixed if is_mixed else r)[i, t]
    loss.backward()
    torch.testing.assert_close(found, hidden.grad, atol=1e-6, rtol=0)  # the head's softmax is float32's


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"a": 1.5}, "a must be in [0, 1], got 1.5"),
        ({"tau": -0.1}, "tau must be in [0, 1], got -0.1"),
        ({"lam": 0.9}, "lam must be at least 1 and finite, got 0.9"),
    ],
)
def test_what_it_refuses(given: dict, sentence: str):
    with pytest.raises(ValueError) as caught:
        build_chain([{"simko": given}])
    assert str(caught.value) == f"simko: {sentence}"
