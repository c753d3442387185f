"""SkyRL's trainer with the chain behind its advantages: both stages run there, on the whole generation batch.

SkyRL's workers hand neither rows of our own nor entropies to their loss. So stage 2 sees the advantages alone: a term
that weighs or drops tokens by what stage 1 found acts as under TRL; one that adds a loss, or reads the policy as it is
in the update, is refused.
"""

# pyright: reportMissingImports=false
# (SkyRL is no dependency)

from pathlib import Path
from typing import Any

import numpy as np
import torch
from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry
from skyrl.train.trainer import RayPPOTrainer
from torch import Tensor

from ...chain.chain import Chain
from ...chain.state import ChainState
from ..first_stage import FirstStage, Generated, Renormalise
from ..groups import Decoded, scale_of
from .arguments import DIVIDES, EPSILON, NO_ENTROPY, RENORMALISES, SECTION, refuse_settings
from .both_stages import left_by_both


class TermsTrainer(RayPPOTrainer):
    def __init__(self, *args: Any, chain: Chain, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_settings(self.cfg, chain)
        self.hclm_first = FirstStage.of(chain, seed)

    def compute_advantages_and_returns(self, data: Any) -> Any:
        data = super().compute_advantages_and_returns(data)
        given = generated(data, self.cfg, self.tokenizer)
        total = self.total_training_steps or 0
        step = max(self.global_step - 1, 0)  # SkyRL counts from 1
        shaped = self.hclm_first(
            given,
            renormaliser(given, self.cfg),
            step=step,
            progress=min(step / total, 1.0) if total else 0.0,
            share=min(1.0, self.cfg.trainer.policy_mini_batch_size / self.cfg.trainer.train_batch_size),
        )
        advantages, metrics = left_by_both(self.hclm_first.chain, given, shaped)
        data["advantages"] = advantages
        self.all_metrics.update({f"{SECTION}/{name}": value for name, value in metrics.items()})
        return data

    def save_checkpoints(self) -> str:
        folder = Path(self.cfg.trainer.ckpt_path) / f"global_step_{self.global_step}" / SECTION
        folder.mkdir(parents=True, exist_ok=True)
        self.hclm_first.state.save(folder)
        return super().save_checkpoints()  # it says at its end that the checkpoint is whole

    def load_checkpoints(self) -> tuple[int, str | None]:
        step, folder = super().load_checkpoints()
        if folder is not None:
            own = Path(folder) / SECTION
            if not ChainState.is_in(own):
                raise ValueError(
                    f"{folder} was written without entropy terms: resume without hclm_rl, or start a new run from its "
                    "weights"
                )
            self.hclm_first.state = ChainState.load(own, self.hclm_first.chain, torch.device("cpu"))
        return step, folder


def generated(data: Any, config: Any, tokenizer: Any) -> Generated:
    """SkyRL's generation batch as the adapter's core reads it."""
    algorithm = config.trainer.algorithm
    mask = data["loss_mask"].bool()
    width, count = mask.size(1), len(mask)
    real = count - data.metadata.get("pad_size", 0)
    uid, counts = list(data.metadata["uids"]), [row < real for row in range(count)]
    rewards = data["rewards"].sum(dim=-1).float()
    sequences, attention = data["sequences"], data["attention_mask"].bool()
    ids = sequences[:, -width:]
    whole = [row[seen] for row, seen in zip(ids, attention[:, -width:], strict=True)]
    prompts = [row[seen] for row, seen in zip(sequences[:, :-width], attention[:, :-width], strict=True)]
    divides = algorithm.advantage_estimator in DIVIDES and algorithm.grpo_norm_by_std
    return Generated(
        ids=ids,
        mask=mask,
        rewards=rewards,
        advantages=data["advantages"].float(),
        uid=uid,
        counts=counts,
        scale=scale_of(rewards, uid, counts, EPSILON if divides else None),
        logps=data.get("action_log_probs"),
        no_entropy=NO_ENTROPY,
        ref_logps=data.get("base_action_log_probs"),
        beta=algorithm.kl_loss_coef if algorithm.use_kl_loss else 0.0,
        loss_mean="sequences" if algorithm.loss_reduction == "sequence_mean" else "tokens",
        prompts=Decoded(prompts, tokenizer),
        texts=Decoded(whole, tokenizer),
        tokenizer=tokenizer,
    )


def renormaliser(given: Generated, config: Any) -> Renormalise:
    """SkyRL's own estimator on other rewards."""
    algorithm = config.trainer.algorithm
    uid = np.array(given.uid, dtype=object)

    def renormalise(rewards: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        if algorithm.advantage_estimator not in RENORMALISES:
            raise ValueError(
                f"a term shapes the rewards, which advantage_estimator {algorithm.advantage_estimator} does not allow"
            )
        index = uid[rows.cpu().numpy()]
        advantages, _ = AdvantageEstimatorRegistry.get(algorithm.advantage_estimator)(
            token_level_rewards=rewards.unsqueeze(1).clone(),
            response_mask=torch.ones_like(rewards).unsqueeze(1),
            index=index,
            grpo_norm_by_std=algorithm.grpo_norm_by_std,
            config=algorithm,
        )
        divides = algorithm.advantage_estimator in DIVIDES and algorithm.grpo_norm_by_std
        scale = scale_of(rewards, list(index), [True] * len(rewards), EPSILON if divides else None)
        return advantages.squeeze(1), scale

    return renormalise
