"""Attention entropy against its card (arXiv:2303.06296, arXiv:2501.03489): numbers, a loop, a real model, the traps."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from hclm_rl import Effect, Term, TokenBatch
from hclm_rl.terms.attention_entropy import AttentionEntropy, first_percentile
from hclm_rl.types import Attention, no_attention

from ..term_batches import card_step, make_step, token_batch
from ..tiny import make

CARD = [[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.2, 0.3, 0.5]]
NAN = math.nan


def the_card(heads: int = 1) -> TokenBatch:
    """Three queries that see one, two and three keys, and a padded slot of NaN."""
    slots = [[0.0] * 4]
    _, batch = card_step([[1, 1, 1, 0]], slots, slots, slots)
    entropy = [-sum(a * math.log(a) for a in row if a) for row in CARD] + [NAN]
    values = torch.tensor([[entropy] * heads], dtype=torch.float64, requires_grad=True)
    attention = Attention(entropy=values, visible=torch.tensor([[[1, 2, 3, 4]]]), width=3)
    return replace(batch, attention=lambda: attention)


def test_the_cards_regulariser():
    batch = the_card()
    loss = AttentionEntropy(relative_to="context")(batch, {}).loss
    # printed to six digits: half of the last one
    assert loss[batch.mask].tolist() == pytest.approx([0.301737, 0.0, 0.230733], abs=5e-7)
    assert loss[batch.mask].mean().item() == pytest.approx(0.177490, abs=5e-7)
    loss[batch.mask].sum().backward()
    # 2 dev outside the margin: dev = -0.549306, 0.123706 (inside), 0.480347
    gradient = batch.attention().entropy.grad[0, 0]
    assert gradient.tolist() == pytest.approx([-1.098612, 0.0, 0.960694, 0.0], abs=2e-6)


def test_relative_to_the_keys_that_are_visible():
    batch = the_card()
    loss = AttentionEntropy()(batch, {}).loss
    # one key: nothing to spread; 0.673012 - 0.5 ln 2 = 0.326438, outside 0.2 ln 2; the third as on the card, T = 3
    assert loss[batch.mask].tolist() == pytest.approx([0.0, 0.326438**2, 0.230733], abs=1e-6)


def test_the_cards_normalised_entropies():
    metrics = AttentionEntropy()(the_card(heads=2), {}).metrics
    spread = metrics["spread"].form(*(x.item() for x in metrics["spread"].sums))
    assert spread == pytest.approx((0.970951 + 0.937231) / 2, abs=5e-7)
    lowest = metrics["lowest"].form(*(x.item() for x in metrics["lowest"].sums))
    assert lowest == pytest.approx(spread)


def test_the_lowest_heads():
    # means 0.5, 0.1 and 0.9 of two tokens: the 1st percentile lies 0.02 of the way from 0.1 to 0.5
    assert first_percentile(1.0, 0.2, 1.8, 2.0) == pytest.approx(0.108)
    assert first_percentile(1.0, 0.2, 0.0) == 0.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("relative_to", ["visible", "context"])
def test_agrees_with_a_loop(seed: int, relative_to: str):
    batch = token_batch(make_step(seed, torch.float64))
    loss = AttentionEntropy(target=0.4, margin=0.1, relative_to=relative_to)(batch, {}).loss
    attention = batch.attention()
    for b, t in batch.mask.nonzero().tolist():
        largest = math.log(attention.visible[b, 0, t] if relative_to == "visible" else attention.width)
        deviations = [entropy - 0.4 * largest for entropy in attention.entropy[b, :, t].tolist()]
        penalties = [d * d if abs(d) > 0.1 * largest else 0.0 for d in deviations]
        assert loss[b, t].item() == pytest.approx(sum(penalties) / len(penalties))


@dataclass(frozen=True, kw_only=True)
class Keeps(Term):
    """Keeps what it sees."""

    needs_attention: ClassVar[bool] = True
    seen: ClassVar[list] = []

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        self.seen.append(batch)
        return Effect()


def test_a_real_models_entropies_are_those_of_its_attention(policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, terms=[Keeps()], fixed=True, max_steps=1, learning_rate=0.0)
    forward, inputs = trainer._get_per_token_logps_and_entropies, []

    def spy(model, ids, mask, *rest, **more):
        inputs.append((ids, mask))
        return forward(model, ids, mask, *rest, **more)

    trainer._get_per_token_logps_and_entropies = spy
    Keeps.seen.clear()
    trainer.train()
    [batch], (ids, mask) = Keeps.seen, inputs[-1]
    assert not mask.all()  # or padding would not be tried
    with torch.no_grad():
        layers = trainer.model.base_model(ids, attention_mask=mask, output_attentions=True).attentions
    attention, first = batch.attention(), ids.size(1) - batch.mask.size(1)
    assert attention.entropy.requires_grad and attention.entropy.shape[1] == 2  # one layer of two heads
    for b, t in batch.mask.nonzero().tolist():
        query = first + t - 1  # the position that predicted the token
        assert (attention.visible[b, :, t] == mask[b, : query + 1].sum()).all()
        for head in range(2):
            weights = layers[0][b, head, query].tolist()
            expected = -sum(a * math.log(a) for a in weights if a > 0)
            assert attention.entropy[b, head, t].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("window", [2, None])
def test_a_sliding_window_hides_keys(window: int | None, policy: str, tmp_path: Path):
    config = MistralConfig(
        vocab_size=26, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=window, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)  # as spread out as can be
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path / "model")
    terms = ["attention_entropy"]
    trainer = make(str(tmp_path / "model"), tmp_path / "out", terms=terms, fixed=True, max_steps=1, learning_rate=0.0)
    trainer.train()
    log = trainer.state.log_history[0]
    assert float(log["attention_entropy/spread"]) == pytest.approx(1.0, abs=1e-5)
    assert float(log["attention_entropy/lowest"]) == pytest.approx(1.0, abs=1e-5)


def test_the_gradient_is_finite_where_keys_are_masked(policy: str, tmp_path: Path):
    terms = [{"attention_entropy": {"coef": 1.0, "target": 1.0, "margin": 0.0}}]
    trainer = make(policy, tmp_path, terms=terms, fixed=True, max_steps=1)
    trainer.train()
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    log = trainer.state.log_history[0]
    assert 0 < float(log["attention_entropy/lowest"]) <= float(log["attention_entropy/spread"]) <= 1
    assert float(log["attention_entropy/affected"]) == 1.0


def test_other_attention_is_refused(policy: str, tmp_path: Path):
    with pytest.raises(ValueError) as error:
        make(policy, tmp_path, terms=["attention_entropy"], model_init_kwargs={"attn_implementation": "sdpa"})
    assert str(error.value) == (
        "attention_entropy: reads attention probabilities, which attn_implementation 'sdpa' does not keep: set "
        "attn_implementation: eager (in Python model_init_kwargs={'attn_implementation': 'eager'})"
    )


def test_checkpointing_is_refused_unless_it_only_logs(policy: str, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"which gradient checkpointing throws away: set gradient_checkpointing: false"
    ):
        make(policy, tmp_path, terms=[{"attention_entropy": {"coef": 0.1}}], gradient_checkpointing=True)
    trainer = make(policy, tmp_path, terms=["attention_entropy"], gradient_checkpointing=True, fixed=True, max_steps=1)
    trainer.train()
    assert 0 < float(trainer.state.log_history[0]["attention_entropy/spread"]) < 1


def test_a_batch_without_attention_says_so():
    with pytest.raises(ValueError, match="declares needs_attention = True"):
        no_attention()


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"target": 1.1}, "target must be in [0, 1], got 1.1"),
        ({"target": NAN}, "target must be in [0, 1], got nan"),
        ({"margin": -0.1}, "margin must be >= 0, got -0.1"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        AttentionEntropy(**wrong)
    assert str(error.value) == sentence
