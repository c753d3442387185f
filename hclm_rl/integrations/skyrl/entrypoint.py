"""A run of SkyRL with terms: its own experiment, whose trainer is ours."""

# pyright: reportMissingImports=false
# (SkyRL is no dependency)

import logging
from collections.abc import Sequence
from typing import Any

import ray
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.utils import validate_cfg
from skyrl.train.utils.utils import initialize_ray

from ...chain.chain import Chain
from .arguments import refuse_settings, split
from .trainer import TermsTrainer

logger = logging.getLogger("hclm_rl")


class Experiment(BasePPOExp):
    def __init__(self, config: Any, chain: Chain, seed: int) -> None:
        super().__init__(config)
        self.chain, self.seed = chain, seed

    # long: SkyRL's own parameters, each handed on
    def get_trainer(
        self,
        cfg: Any,
        tracker: Any,
        tokenizer: Any,
        train_dataset: Any,
        eval_dataset: Any,
        inference_engine_client: Any,
        generator: Any,
        colocate_pg: Any,
    ) -> TermsTrainer:
        return TermsTrainer(
            cfg=cfg,
            tracker=tracker,
            tokenizer=tokenizer,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            inference_engine_client=inference_engine_client,
            generator=generator,
            colocate_pg=colocate_pg,
            chain=self.chain,
            seed=self.seed,
        )


@ray.remote(num_cpus=1)
def train(config: Any, chain: Chain, seed: int) -> None:
    Experiment(config, chain, seed).run()


def run(arguments: Sequence[str]) -> None:
    """Says what is wrong before Ray starts."""
    chain, seed, rest = split(arguments)
    config = SkyRLTrainConfig.from_cli_overrides(rest)
    refuse_settings(config, chain)
    validate_cfg(config)
    logger.warning("hclm_rl: entropy terms are on: %s", ", ".join(link.name for link in chain.links))
    initialize_ray(config)
    ray.get(train.remote(config, chain, seed))
