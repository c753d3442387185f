"""Rollout.score: texts that a term lets the policy or the reference model read, against a plain forward pass."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hclm_rl.trainer import mixin
from hclm_rl.trainer.stage_one import own_scores

from .. import own_terms
from ..tiny import largest_difference, make, weights_after


def plain_pass(policy: str, ids: torch.Tensor, mask: torch.Tensor, temperature: float):
    """Log-probs and entropies of all tokens but the first, by the model as it lies on disk."""
    model = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        logps = (model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1] / temperature).log_softmax(-1)
    return logps.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2), -(logps.exp() * logps).sum(2)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list:
    seen: list = []
    monkeypatch.setattr(own_terms, "READ", seen)
    return seen


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.parametrize("scorer, is_frozen", [("policy", False), ("reference", True)])
def test_the_policy_moves_and_the_reference_does_not(algorithm, scorer, is_frozen, policy: str, tmp_path: Path, read):
    terms = [{"tests.own_terms.ReadsPrompts": {"scorer": scorer}}]
    make(policy, tmp_path, algorithm=algorithm, terms=terms, beta=0.04, temperature=0.7, learning_rate=5.0).train()
    assert len(read) == 2 and not all(mask.all() for _, mask, *_ in read)  # some prompts are padded
    for step, (ids, mask, logps, entropy) in enumerate(read):
        counts = mask[:, 1:] & mask[:, :-1]
        pairs = zip((logps, entropy), plain_pass(policy, ids, mask, 0.7), strict=True)
        is_same = all(torch.allclose(ours[counts], plain[counts], atol=1e-5) for ours, plain in pairs)
        assert is_same == (step == 0 or is_frozen)
        assert not logps.requires_grad


def test_the_reference_of_an_adapter_is_the_model_without_it(policy: str, tmp_path: Path, read):
    terms = [{"tests.own_terms.ReadsPrompts": {"scorer": "reference"}}]
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = {"peft_config": config}
    make(policy, tmp_path, terms=terms, beta=0.04, temperature=0.7, learning_rate=5.0, trainer=trainer).train()
    ids, mask, logps, _ = read[1]
    counts = mask[:, 1:] & mask[:, :-1]
    torch.testing.assert_close(logps[counts], plain_pass(policy, ids, mask, 0.7)[0][counts], atol=1e-5, rtol=0)


def test_a_run_without_a_reference_says_so(policy: str, tmp_path: Path):
    terms = [{"tests.own_terms.ReadsPrompts": {"scorer": "reference"}}]
    with pytest.raises(ValueError, match="reference model, which this run does not load: set beta > 0"):
        make(policy, tmp_path, terms=terms).train()


def test_reading_changes_nothing(policy: str, tmp_path: Path, read):
    changes = {"gradient_checkpointing": True, "num_iterations": 2, "max_steps": 4}
    plain = weights_after(policy, tmp_path / "plain", **changes)
    reading = weights_after(policy, tmp_path / "reading", terms=["tests.own_terms.ReadsPrompts"], **changes)
    assert largest_difference(plain, reading) == 0.0 and len(read) == 2


def test_a_term_that_did_not_ask_cannot_read():
    from ..term_batches import make_step, rollout

    view = rollout(make_step())
    with pytest.raises(ValueError, match="declares needs_rescoring = True"):
        type(view).__dataclass_fields__["score"].default(view.transcript)


RIGHT = {"right_at": 0.5}  # what low_words pays is a share
HOLDS = {
    "right_anchor": {"source": "any", "coef": 1.0, "hinge": False, **RIGHT},
    "hold_coverage": RIGHT,
    "no_loss": RIGHT,
    "rehearsal": RIGHT,
    "right_kl": RIGHT,
}


@pytest.mark.parametrize("term", HOLDS)
def test_what_reads_other_texts_in_the_loss_alone_takes_no_scoring_pass(
    term: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    passes: list[str] = []

    def counted(trainer, output, generation):
        passes.append(term)
        return own_scores(trainer, output, generation)

    monkeypatch.setattr(mixin, "own_scores", counted)
    run = {"terms": [{term: HOLDS[term]}], "fixed": True, "max_steps": 4, "per_device_train_batch_size": 8}
    waited = weights_after(policy, tmp_path / "waited", **run)
    assert not passes
    monkeypatch.setattr(mixin, "can_wait", lambda trainer: False)
    before = weights_after(policy, tmp_path / "before", **run)
    assert len(passes) == 4
    assert largest_difference(waited, before) < 1e-6
