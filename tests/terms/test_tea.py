"""TEA against its card (arXiv:2508.03178): numbers, a loop written from the definition, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.tea import Tea

from ..term_batches import card_step, first_stage, make_step, rollout, second_stage, token_batch

NAN = math.nan
MASK = [[1, 1, 1], [1, 1, 0]]
LOGPS = [[-0.1, -1.0, -0.4], [-0.3, -2.0, NAN]]
H = [[0.3, 1.2, 0.6], [0.5, 1.5, NAN]]
A = [[0.8] * 3, [-0.8, -0.8, NAN]]
BOTH = pytest.mark.parametrize("statistics", ["step", "micro_batch"])


def regularised(term: Tea, view, batch):
    """The added loss (B, T), 0 off the mask, and the weights of the tokens that count."""
    outcome = second_stage(term, batch, first_stage(term, view, {}), {})
    assert outcome.advantages is None
    return outcome.losses["link"], outcome.metrics["link/weight"][batch.mask].tolist()


@BOTH
def test_the_cards_example(statistics):
    view, batch = card_step(MASK, LOGPS, LOGPS, A, H)
    loss, weight = regularised(Tea(statistics=statistics), view, batch)
    # printed to six digits: half of the last one
    assert weight == pytest.approx([4.188571, 2.354573, 3.456856, 1.635566, 5.0], abs=5e-7)
    assert sum(weight) / 5 == pytest.approx(3.327113, abs=5e-7)
    mean = loss[batch.mask].mean()
    assert mean.item() == pytest.approx(-2.894791, abs=5e-7)
    mean.backward()
    # the weight is a constant: nothing reaches the log-probs, and -w / N the entropies
    assert batch.logps.grad is None
    assert batch.entropy.grad[batch.mask].tolist() == pytest.approx([-w / 5 for w in weight])
    assert batch.entropy.grad[~batch.mask].tolist() == [0]


@BOTH
def test_equal_advantages_make_it_a_uniform_bonus(statistics):
    view, batch = card_step([[1, 1, 1]], LOGPS[:1], LOGPS[:1], A[:1], H[:1])
    loss, weight = regularised(Tea(statistics=statistics), view, batch)
    assert weight == pytest.approx([10 / 3] * 3)
    assert loss[0].tolist() == pytest.approx([-10 / 3 * h for h in H[0]])


def test_a_response_of_its_own_micro_batch_has_no_covariance_and_the_step_has():
    view, _ = card_step(MASK, LOGPS, LOGPS, A, H)
    _, alone = card_step(MASK[:1], LOGPS[:1], LOGPS[:1], A[:1], H[:1])
    assert Tea(statistics="micro_batch")(alone, {}).metrics["weight"][0].tolist() == pytest.approx([10 / 3] * 3)
    columns = {"weight": Tea().on_rollout(view, {}).columns["weight"][:1]}
    weight = Tea()(replace(alone, columns=columns), {}).metrics["weight"][0].tolist()
    assert weight == pytest.approx([4.188571, 2.354573, 3.456856], abs=5e-7)


@BOTH
def test_by_length_a_mean_weight_is_one(statistics):
    # 3 / 10 and 2 / 10 of the card's weights; without the cap the means are 1
    view, batch = card_step(MASK, LOGPS, LOGPS, A, H)
    _, weight = regularised(Tea(scale="length", statistics=statistics), view, batch)
    assert weight == pytest.approx([1.2565713, 0.7063719, 1.0370568, 0.3271132, 1.0], abs=5e-7)
    _, weight = regularised(Tea(scale="length", cap=10.0, statistics=statistics), view, batch)
    assert sum(weight[:3]) / 3 == pytest.approx(1) and sum(weight[3:]) / 2 == pytest.approx(1)


def by_the_card(mask, logps, advantages, entropy, factor=10.0, cap=5.0) -> float:
    """L_ent, token by token."""
    tokens = [(b, t) for b, row in enumerate(mask) for t, counts in enumerate(row) if counts]
    mean_a = sum(advantages[b][t] for b, t in tokens) / len(tokens)
    mean_logp = sum(logps[b][t] for b, t in tokens) / len(tokens)
    total = 0.0
    for b in range(len(mask)):
        own = [t for row, t in tokens if row == b]
        power = {t: math.exp((advantages[b][t] - mean_a) * (logps[b][t] - mean_logp)) for t in own}
        for t in own:
            total += min(factor * power[t] / sum(power.values()), cap) * entropy[b][t]
    return total / len(tokens)


@pytest.mark.parametrize("seed", range(4))
@BOTH
def test_agrees_with_a_loop(seed, statistics):
    step = make_step(seed, torch.float64)
    view, batch = rollout(step), token_batch(step)
    loss, _ = regularised(Tea(statistics=statistics), view, batch)
    logps = step.old_logps if statistics == "step" else step.logps  # "step" looks at the sampling policy
    expected = by_the_card(step.mask.tolist(), logps.tolist(), batch.advantages.tolist(), step.entropy.tolist())
    assert loss[batch.mask].mean().item() == pytest.approx(-expected, rel=1e-9)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"factor": 0.0}, "factor must be positive and finite, got 0.0"),
        ({"cap": math.inf}, "cap must be positive and finite, got inf"),
        ({"cap": NAN}, "cap must be positive and finite, got nan"),
        (
            {"weight_gradient": True},
            "weight_gradient needs weights of the current policy, statistics='micro_batch': those of the step are of "
            "the sampling policy, which is a constant",
        ),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Tea(**wrong)
    assert str(error.value) == sentence


def test_the_weights_carry_a_gradient_as_in_the_authors_code():
    # L = -(1/5) sum_t w_t H_t, w = min(10 s, 5), s the softmax of cov in a response, d cov_k / d log p_k = A_k - mean A
    # dL / d log p_k = -(10 / 5) (A_k - mean A) s_k (u_k H_k - sum_t u_t s_t H_t), u = 0 at the capped token, else 1
    # response 1: A - mean A = 0.64, s = .418857 .235457 .345686, sum s H = .615617
    # response 2: -0.96, s = .163557 .836443, of which the second is capped: sum u s H = .081778
    view, batch = card_step(MASK, LOGPS, LOGPS, A, H)
    loss, weight = regularised(Tea(statistics="micro_batch", weight_gradient=True), view, batch)
    assert weight == pytest.approx([4.188571, 2.354573, 3.456856, 1.635566, 5.0], abs=5e-7)  # the value is the same
    loss[batch.mask].mean().backward()
    expected = [0.169214, -0.176125, 0.006910, 0.131332, -0.131332]
    assert batch.logps.grad[batch.mask].tolist() == pytest.approx(expected, abs=2e-6)
    assert batch.logps.grad[~batch.mask].tolist() == [0]
    assert batch.entropy.grad[batch.mask].tolist() == pytest.approx([-w / 5 for w in weight])
