"""With vLLM TRL samples elsewhere, and weighs tokens by the ratio of the two policies; a stand-in samples here.

The stand-in has the part of TRL's VLLMGeneration that a rollout function leaves in use. The real one needs a GPU.
"""

import random
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer as trls

from hclm_rl import known_terms

from ..tiny import fixed_rollout, largest_difference, make, weights_of
from .test_invariance import CUT, ROUNDING, STRONG, WHOLE

SYNCS: list[int] = []  # one a weight synchronisation


class StandIn:
    """TRL's VLLMGeneration without vLLM."""

    def __init__(self, **_: Any) -> None:
        SYNCS.clear()

    def sync_weights(self) -> None:
        SYNCS.append(1)


def other_policys_rollout(batch: list[str], trainer: Any) -> dict[str, Any]:
    """Fixed completions, and log-probs as from an engine that computes them a little differently."""
    made = fixed_rollout(batch, trainer)
    noise = [random.Random(zlib.crc32(str(ids).encode())) for ids in made["completion_ids"]]
    logps = [[noise[i].uniform(-6, -3) for _ in ids] for i, ids in enumerate(made["completion_ids"])]
    return made | {"logprobs": logps}


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch, policy: str, tmp_path: Path):
    """Trains with the stand-in; changes as those of `make`."""
    monkeypatch.setattr(trls, "VLLMGeneration", StandIn)

    def train(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        more = {"rollout_func": other_policys_rollout}
        settings = {"vllm_importance_sampling_mode": "token_truncate", "loss_type": "dapo", **changes}
        trainer = make(policy, tmp_path / name, trainer=more, use_vllm=True, **settings)
        trainer.train()
        ratio = {
            end: trainer.state.log_history[0][f"sampling/importance_sampling_ratio/{end}"] for end in ("min", "max")
        }
        assert 4 * ratio["min"] < ratio["max"]
        assert len(SYNCS) == 2  # once for each of the two rollouts
        return weights_of(trainer)

    return train


@pytest.mark.parametrize(("mode", "largest"), [("token_truncate", 2.0), ("sequence_truncate", 0.1)])
def test_without_terms_or_at_coef_zero_it_is_trl_bit_for_bit(mode: str, largest: float, with_vllm):
    settings = {"beta": 0.04, "vllm_importance_sampling_mode": mode}
    stock = with_vllm("stock", ours=False, **settings)
    assert largest_difference(stock, with_vllm("empty", **settings)) == 0.0
    zero = [{name: {"coef": 0.0}} for name in known_terms()]
    assert largest_difference(stock, with_vllm("zero", terms=zero, **settings)) == 0.0
    clipped = with_vllm("clipped", ours=False, vllm_importance_sampling_clip_max=largest, **settings)
    assert largest_difference(stock, clipped) > 100 * ROUNDING  # the ratio does weigh the tokens here


@pytest.mark.parametrize("term", ["clip_cov", "entropy_bonus", "force_reweight", "group_log_det", "log_det", "siren"])
def test_micro_batches(term: str, with_vllm):
    terms = [{term: STRONG.get(term, {})}]
    whole = with_vllm("whole", terms=terms, **WHOLE)
    assert largest_difference(whole, with_vllm("cut", terms=terms, **CUT)) < ROUNDING
    assert largest_difference(whole, with_vllm("plain", **WHOLE)) > 100 * ROUNDING
