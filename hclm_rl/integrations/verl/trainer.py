"""Stage 1 in verl's driver, which sees the whole generation batch: verl's own trainers with the chain in between."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (verl is no dependency, and a mixin's attributes are those of the trainers it is mixed into)

import logging
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transfer_queue as tq
from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.padding import response_to_nested

from ...chain.state import ChainState
from ..first_stage import FirstStage, Generated, Renormalise, Shaped
from ..groups import Decoded, scale_of
from ..recipe import chain_of_section
from ..told import GROUP_REWARDS, Told, carried
from .loss import PREFIX, TOLD, TermsLoss
from .settings import RENORMALISES, at, epsilon, gives, loss_mean, progress, refuse_settings, share_of_update

logger = logging.getLogger("hclm_rl")

SECTION = "hclm_rl"
FOLDER = "hclm_rl"  # in a checkpoint


class WithTerms:
    """What the three trainers share: stage 1 after verl's advantages, and stage 2 in the workers' loss."""

    mode: ClassVar[str]  # verl's own name of the trainer that this one is

    def __init__(self, config: Any) -> None:
        section = OmegaConf.to_container(config[SECTION], resolve=True) if SECTION in config else None
        chain, seed = chain_of_section(section, f"+{SECTION}")
        refuse_settings(config, chain)
        with open_dict(config):
            # verl asks for this name in many places to know whether it is synchronous
            config.trainer.v1.trainer_mode = self.mode
            config.actor_rollout_ref.actor.calculate_entropy = True
        super().__init__(config)
        self.hclm_first = FirstStage.of(chain, seed)
        self.hclm_told: Told | None = None
        logger.warning("hclm_rl: entropy terms are on: %s", ", ".join(link.name for link in chain.links))

    def _setup(self) -> None:
        super()._setup()
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        self.actor_rollout_wg.set_loss_fn(TermsLoss(config=actor, chain=self.hclm_first.chain))

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        fields = FIELDS + (["ref_log_prob"] if self.use_reference_policy else [])
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        given = generated(data, batch, self.config, self.tokenizer)
        step = self.global_steps
        shaped = self.hclm_first(
            given,
            renormaliser(given, self.config),
            step=max(step - 1, 0),
            progress=progress(step, getattr(self, "total_training_steps", None)),
            share=share_of_update(self.config),
        )
        self.hclm_told = shaped.told
        metrics.update({PREFIX + name: value for name, value in shaped.metrics.items()})
        return put(batch, shaped, data["response_mask"])

    def _update_actor(self, batch: Any, metrics: dict) -> Any:
        batch.extra_info[TOLD] = self.hclm_told
        return super()._update_actor(batch, metrics)

    def _save_checkpoint(self) -> None:
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}" / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self.hclm_first.state.save(folder)
        super()._save_checkpoint()  # it says at its end that the checkpoint is whole

    def _load_checkpoint(self) -> Any:
        loaded = super()._load_checkpoint()
        if self.global_steps:
            named = self.config.trainer.resume_mode == "resume_path"
            root = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
            folder = (Path(self.config.trainer.resume_from_path) if named else root) / FOLDER
            if not ChainState.is_in(folder):
                raise ValueError(
                    f"{folder.parent} was written without entropy terms: resume with verl's own trainer_mode, or start "
                    "a new run from its weights"
                )
            self.hclm_first.state = ChainState.load(folder, self.hclm_first.chain, torch.device("cpu"))
        return loaded


class HclmSync(WithTerms, PPOTrainerSync):
    mode = "sync"


class HclmColocateAsync(WithTerms, PPOTrainerColocateAsync):
    mode = "colocate_async"


class HclmSeparateAsync(WithTerms, PPOTrainerSeparateAsync):
    mode = "separate_async"


TRAINERS = {
    "hclm_rl_sync": HclmSync,
    "hclm_rl_colocate_async": HclmColocateAsync,
    "hclm_rl_separate_async": HclmSeparateAsync,
}

FIELDS = ["uid", "prompts", "responses", "response_mask", "rm_scores", "old_log_probs", "entropy", "advantages"]


def generated(data: Any, batch: Any, config: Any, tokenizer: Any) -> Generated:
    """verl's generation batch as the adapter's core reads it."""
    if any(key.rsplit("_", 1)[-1] != "0" for key in batch.keys):
        raise ValueError(
            "an agent loop gave several outputs for one response, of which entropy terms would see each as a response "
            "of its own: use an agent loop with one output"
        )
    counts = [not tag.get("is_padding", False) for tag in batch.tags]
    uid = list(data["uid"].tolist() if hasattr(data["uid"], "tolist") else data["uid"])
    has_scores = gives(config).scores
    tensors = [name for name in data.keys() if name not in ("uid", "prompts")]  # noqa: SIM118 (a TensorDict iterates over its rows)
    padded = data.select(*tensors).to_padded_tensor()
    rewards = padded["rm_scores"].sum(dim=-1)
    rows = {name: Decoded(data[name].unbind(), tokenizer) for name in ("prompts", "responses")}
    return Generated(
        ids=padded["responses"],
        mask=padded["response_mask"].bool(),
        rewards=rewards,
        advantages=padded["advantages"],
        uid=uid,
        counts=counts,
        scale=scale_of(rewards, uid, counts, epsilon(config)),
        logps=padded["old_log_probs"] if has_scores else None,
        entropy=padded["entropy"] if has_scores else None,
        ref_logps=padded.get("ref_log_prob"),
        beta=float(config.actor_rollout_ref.actor.kl_loss_coef) if config.actor_rollout_ref.actor.use_kl_loss else 0.0,
        loss_mean=loss_mean(config),
        prompts=rows["prompts"],
        texts=rows["responses"],
        tokenizer=tokenizer,
    )


def renormaliser(given: Generated, config: Any) -> Renormalise:
    """verl's own estimator on other rewards."""
    name = str(config.algorithm.adv_estimator)
    uid = np.array(given.uid, dtype=object)

    def renormalise(rewards: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        if name not in RENORMALISES:
            raise ValueError(f"a term shapes the rewards, which algorithm.adv_estimator {name} does not allow")
        index, normalises = uid[rows.cpu().numpy()], at(config, "algorithm.norm_adv_by_std_in_grpo", True)
        of_grpo = {"norm_adv_by_std_in_grpo": normalises} if name.startswith("grpo") else {}
        advantages, _ = core_algos.get_adv_estimator_fn(name)(
            token_level_rewards=rewards.unsqueeze(1).clone(),
            response_mask=torch.ones_like(rewards).unsqueeze(1),
            index=index,
            config=config.algorithm,
            **of_grpo,
        )
        scale = scale_of(rewards, list(index), [True] * len(rewards), epsilon(config))
        return advantages.squeeze(1), scale

    return renormalise


def put(batch: Any, shaped: Shaped, response_mask: Tensor) -> Any:
    """Writes what stage 1 made where the workers read it: per token without padding, as verl has it."""
    width = response_mask.offsets().diff().max().item()
    fields = {}
    for name, value in carried(shaped.rows).items():
        is_per_token = value.dim() == 2 and value.size(1) == width and name != GROUP_REWARDS
        fields[PREFIX + name] = response_to_nested(value, response_mask) if is_per_token else value
    if shaped.advantages is not None:
        fields["advantages"] = response_to_nested(shaped.advantages, response_mask)
    fields = TensorDict(fields, batch_size=len(batch))
    return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
