"""sigmaReparam: the worked example, a model that starts unchanged, learns under it and is plain again after it."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from hclm_rl.equations.sigma_reparam import SigmaReparam, attention_entropy_bound, sigma_reparam

from ..tiny import make


def example() -> tuple[nn.Parameter, SigmaReparam]:
    weight = nn.Parameter(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    reparam = SigmaReparam(weight)
    # singular values sqrt((6 +- sqrt(20)) / 2): the Gram matrix [[5, 1], [1, 1]] has trace 6 and determinant 4
    torch.testing.assert_close(reparam.gamma.item(), 2.288246, atol=1e-6, rtol=0)
    with torch.no_grad():
        reparam.gamma.fill_(1.5)
        reparam.u.copy_(torch.tensor([1.0, 0.0]))
    return weight, reparam


def test_one_training_forward_and_its_gradient():
    weight, reparam = example()
    output = reparam(weight) @ torch.tensor([1.0, 2.0])
    torch.testing.assert_close(reparam.v, torch.tensor([0.894427, 0.447214]), atol=1e-6, rtol=0)
    torch.testing.assert_close(reparam.u, torch.tensor([0.980581, 0.196116]), atol=1e-6, rtol=0)
    torch.testing.assert_close(output, torch.tensor([1.315587, 1.973381]), atol=1e-6, rtol=0)
    output.sum().backward()
    wanted = torch.tensor([[-0.607194, 1.062590], [0.025300, 1.189088]])
    torch.testing.assert_close(weight.grad, wanted, atol=2e-6, rtol=0)
    # sigma = 2.280351; the gradient of gamma is the output over gamma
    assert reparam.gamma.grad is not None
    torch.testing.assert_close(reparam.gamma.grad.item(), (1.315587 + 1.973381) / 1.5, atol=1e-5, rtol=0)


def test_power_iteration_converges_and_stands_still_without_gradient_or_training():
    weight, reparam = example()
    with torch.no_grad():
        reparam(weight)
    reparam.eval()
    reparam(weight)
    assert reparam.u.tolist() == [1.0, 0.0]
    reparam.train()
    for _ in range(4):
        reparam(weight)
    torch.testing.assert_close((reparam.v @ weight @ reparam.u).item(), 2.288246, atol=1e-6, rtol=0)


def test_checkpointing_advances_once_and_changes_nothing():
    inputs = torch.tensor([1.0, 2.0])
    results = []
    for is_checkpointed in (False, True):
        weight, reparam = example()

        def forward(x: torch.Tensor, weight: nn.Parameter = weight, reparam: SigmaReparam = reparam) -> torch.Tensor:
            return reparam(weight) @ x

        output = checkpoint(forward, inputs, use_reentrant=False) if is_checkpointed else forward(inputs)
        assert isinstance(output, torch.Tensor)
        output.sum().backward()
        results.append((weight.grad, reparam.u))
    (plain, u), (recomputed, again) = results
    assert torch.equal(plain, recomputed) and torch.equal(u, again)


@pytest.mark.parametrize("norm, least", [(0.0, 1.386294), (1.0, 1.226659), (3.0, 0.387119), (10.0, 0.000364)])
def test_the_bound_of_four_keys(norm: float, least: float):
    assert attention_entropy_bound(norm, 4) == pytest.approx(least, abs=1e-6)
    # it is reached by logits of that norm with one high and the others equal: a (1, -1/3, -1/3, -1/3), a^2 4/3 = s^2
    a = norm * (3 / 4) ** 0.5
    reached = torch.distributions.Categorical(logits=torch.tensor([a, -a / 3, -a / 3, -a / 3])).entropy().item()
    assert reached == pytest.approx(least, abs=1e-6)


def test_a_model_starts_unchanged_trains_and_is_plain_again(policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path)
    model, ids = trainer.model, torch.tensor([[3, 4, 5, 6]])
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def logits() -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return model(input_ids=ids).logits

    untouched = logits()
    with sigma_reparam(model):
        gammas = {name: value for name, value in model.named_parameters() if name.endswith("gamma")}
        # four projections of the attention and three of the MLP, not the head
        assert len(gammas) == 7 and not any("lm_head" in name for name in gammas)
        torch.testing.assert_close(logits(), untouched, atol=1e-5, rtol=1e-5)
        start = [value.item() for value in gammas.values()]
        trainer.train()
        assert all(value.item() != was for value, was in zip(gammas.values(), start, strict=True))
        trained = logits()
    after = model.state_dict()
    assert after.keys() == before.keys()
    torch.testing.assert_close(logits(), trained, atol=1e-5, rtol=1e-5)
    moved = after["model.layers.0.self_attn.q_proj.weight"] - before["model.layers.0.self_attn.q_proj.weight"]
    assert moved.abs().max() > 1e-4


def test_frozen_layers_and_impossible_bounds_are_refused(policy: str):
    model = AutoModelForCausalLM.from_pretrained(policy).requires_grad_(False)
    with pytest.raises(ValueError, match=r"trains the weights themselves, and '.*q_proj' is frozen or quantised"):
        sigma_reparam(model).__enter__()
    model.requires_grad_(True)
    with torch.no_grad():
        kept = model.model.layers[0].mlp.up_proj.weight.clone()
        model.model.layers[0].mlp.up_proj.weight.zero_()
    with pytest.raises(ValueError, match=r"divides by the largest singular value, and that of '.*up_proj' is 0"):
        sigma_reparam(model).__enter__()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.copy_(kept)
    with sigma_reparam(model), pytest.raises(ValueError, match=r"'.*q_proj' is parametrised already"):
        sigma_reparam(model).__enter__()
    with pytest.raises(ValueError, match=r"norm must be >= 0 and finite and keys at least 2, got -1\.0 and 4"):
        attention_entropy_bound(-1.0, 4)


def test_under_autocast_and_in_half_precision_the_layer_starts_unchanged_and_comes_back(policy: str, tmp_path: Path):
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    reparam = SigmaReparam(weight)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(5):
            torch.testing.assert_close(reparam(weight), weight, rtol=1e-5, atol=1e-5)
    half = weight.bfloat16()
    # 2^-8: the rounding of the result alone
    torch.testing.assert_close(SigmaReparam(half)(half), half, rtol=2**-8, atol=0)
    trainer = make(policy, tmp_path, bf16=True)
    with sigma_reparam(trainer.model):
        trainer.train()
    assert all(value.dtype == torch.float32 for value in trainer.model.state_dict().values())


def test_a_model_without_linear_layers_is_refused():
    message = r"found no nn\.Linear to reparametrise in Conv1d"
    with pytest.raises(ValueError, match=message), sigma_reparam(nn.Conv1d(2, 2, 1)):
        pass
