"""A token weight multiplies exactly that token's gradient, in every loss of TRL; what cannot be said is refused."""

from pathlib import Path

import pytest
import torch

from hclm_rl.equations.functional import split_token_weights
from hclm_rl.trainer.stage_two import vespo_weights

from .. import own_terms
from ..tiny import LOSSES, largest_difference, make, weights_after

SURROGATES = {
    **{loss: {"loss_type": loss} for loss in LOSSES},
    "luspo, sequence level": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "grpo, sequence level": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "dapo, sequence level": {"loss_type": "dapo", "importance_sampling_level": "sequence"},
    "rloo": {"algorithm": "rloo"},
}


def gradients(policy: str, out: Path, weight: float, **changes) -> list[torch.Tensor]:
    """The gradient at the log-probs, (B, T) for each micro-batch; the second of two iterations is off-policy."""
    own_terms.SEEN.clear()
    # a learning rate of 1e-12, so that both iterations see the same policy whatever the weight
    changes = {"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-12, **changes}
    make(policy, out, terms=[{"tests.own_terms.TokenWeight": {"weight": weight}}], **changes).train()
    return list(own_terms.SEEN)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_weight_scales_exactly_its_tokens_gradient(surrogate: str, weight: float, policy: str, tmp_path: Path):
    stock = gradients(policy, tmp_path / "1", 1.0, **SURROGATES[surrogate])
    weighted = gradients(policy, tmp_path / "w", weight, **SURROGATES[surrogate])
    assert len(stock) == len(weighted) == 2
    for before, after in zip(stock, weighted, strict=True):
        assert (before[:, 1] != 0).any()
        expected = before.clone()
        expected[:, 1] *= weight
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=0)
        if weight == 0:
            assert (after[:, 1] == 0).all()


@pytest.mark.parametrize("surrogate", [name for name in SURROGATES if name != "vespo"])  # it has weights of its own
def test_what_a_term_is_told_of_the_loss_is_what_the_loss_does(surrogate: str, policy: str, tmp_path: Path):
    own_terms.SEEN.clear()
    own_terms.ACTING.clear()
    changes = {"num_iterations": 2, "max_steps": 2, "learning_rate": 5.0, "epsilon": 0.01, **SURROGATES[surrogate]}
    make(policy, tmp_path, terms=["tests.own_terms.Acting"], **changes).train()
    (advantages, weights, is_clipped), (_, _, later) = own_terms.ACTING
    first, second = own_terms.SEEN
    # at ratio 1 the gradient of a token is -A times its part in the mean
    expected = -advantages * weights
    torch.testing.assert_close(first / first.abs().sum(), expected / expected.abs().sum(), rtol=1e-4, atol=1e-7)
    if surrogate in ("cispo", "sapo"):
        assert is_clipped is None and later is None
        return
    assert not is_clipped.any() and later.any() and not later.all()
    assert torch.equal(second == 0, later | (advantages == 0) | (weights == 0))


def test_split_of_token_weights():
    # row 1: largest 2, so weights 1/2, 1; row 2: largest in size -4, so 1/4, 1; row 3: nothing to weight
    advantages = torch.tensor([[1.0, 2.0, 9.0], [-1.0, -4.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, True, True], [True, True, True]])
    rows, weights = split_token_weights(advantages, mask)
    assert rows.tolist() == [2.0, -4.0, 0.0]
    assert weights.tolist() == [[0.5, 1.0, 1.0], [0.25, 1.0, 0.0], [1.0, 1.0, 1.0]]


def test_vespos_weight_of_a_response_is_that_of_the_tokens_it_acts_on():
    # rows: one sign; a token that a term dropped (phi of A >= 0, here 5); nothing left; no tokens at all; both signs
    weights = torch.tensor([[2.0, 2.0, 9.0], [5.0, 3.0, 3.0], [5.0, 5.0, 5.0], [1.0, 1.0, 1.0], [5.0, 3.0, 3.0]])
    advantages = torch.tensor([[1.0, 0.5, 9.0], [0.0, -1.0, -1.0], [0.0, 0.0, 0.0], [7.0, 7.0, 7.0], [1.0, -1.0, -1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 1]])
    # the last: (5 + 3 + 3) / 3
    assert vespo_weights(weights, advantages, mask).tolist() == pytest.approx([2.0, 3.0, 5.0, 1.0, 11 / 3])
    assert vespo_weights(weights[:, :1], advantages[:, :1], mask).tolist() == [2.0, 5.0, 5.0, 1.0, 5.0]


def test_the_metric_of_vespo_is_a_mean_over_responses_with_advantages_by_token_too(policy: str, tmp_path: Path):
    # responses of three to seven tokens, of both signs, a policy that has moved: a mean over tokens would differ
    changes = {"loss_type": "vespo", "num_iterations": 2, "max_steps": 2, "learning_rate": 1.0, "fixed": True}

    def logged(out: str, **more) -> list[float]:
        trainer = make(policy, tmp_path / out, **changes, **more)
        trainer.train()
        return [float(entry["vespo/phi_seq_mean"]) for entry in trainer.state.log_history if "loss" in entry]

    stock = logged("stock", ours=False)
    assert len(stock) == 2
    ours = logged("ours", terms=["tests.own_terms.TokenWeight"])  # every weight is 1
    assert ours == pytest.approx(stock, rel=1e-6) and stock[0] != stock[1]


@pytest.mark.parametrize("changes", [{"algorithm": "rloo"}, {"importance_sampling_level": "sequence"}])
def test_both_signs_in_one_response_are_refused(changes: dict, policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, terms=[{"tests.own_terms.TokenWeight": {"weight": -1.0}}], **changes)
    with pytest.raises(ValueError, match="both signs, which a sequence-level surrogate"):
        trainer.train()


def test_weights_beside_a_kl_at_sequence_level_are_refused(policy: str, tmp_path: Path):
    terms = [{"tests.own_terms.TokenWeight": {"weight": 0.5}}]
    trainer = make(policy, tmp_path, terms=terms, importance_sampling_level="sequence", beta=0.1)
    with pytest.raises(ValueError, match="beta=0"):
        trainer.train()


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_rewards_shaped_into_themselves_are_trl_bit_for_bit(scale_rewards: str, policy: str, tmp_path: Path):
    changes = {"scale_rewards": scale_rewards, "loss_type": "dapo"}
    same = weights_after(policy, tmp_path / "1", terms=["tests.own_terms.ShapedReward"], **changes)
    stock = weights_after(policy, tmp_path / "2", ours=False, **changes)
    assert largest_difference(same, stock) == 0.0
    halved = [{"tests.own_terms.ShapedReward": {"factor": -1.0}}]
    assert largest_difference(weights_after(policy, tmp_path / "3", terms=halved, **changes), stock) > 1e-4


def test_rewards_shaped_into_themselves_are_trls_rloo_bit_for_bit(policy: str, tmp_path: Path):
    same = weights_after(policy, tmp_path / "1", algorithm="rloo", beta=0.0, terms=["tests.own_terms.ShapedReward"])
    stock = weights_after(policy, tmp_path / "2", algorithm="rloo", beta=0.0, ours=False)
    assert largest_difference(same, stock) == 0.0


def test_rewards_are_not_shaped_where_rloo_changes_them_first(policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, algorithm="rloo", beta=0.1, terms=["tests.own_terms.ShapedReward"])
    with pytest.raises(ValueError, match="only with beta=0"):
        trainer.train()


def test_doubled_rewards_leave_group_scaled_advantages_nearly_alone(policy: str, tmp_path: Path):
    # (2 R - mean 2 R) / (std 2 R + 1e-4) differs from R's by 1e-4 / std, so at most by a part in 1e3 here
    doubled = [{"tests.own_terms.ShapedReward": {"factor": 2.0, "offset": 5.0}}]
    ours = weights_after(policy, tmp_path / "1", terms=doubled, max_steps=1)
    stock = weights_after(policy, tmp_path / "2", ours=False, max_steps=1)
    assert 0 < largest_difference(ours, stock) < 1e-3 * 0.1


def test_over_vocab_sees_trls_distribution(policy: str, tmp_path: Path):
    terms = [{"tests.own_terms.ReadsVocabulary": {"coef": 0.1}}]
    trainer = make(policy, tmp_path, terms=terms, temperature=0.7, num_iterations=2)
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        assert float(entry["ReadsVocabulary/gap_to_entropy"]) < 5e-6  # float32: 20 roundings
