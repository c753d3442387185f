"""What of SkyRL's command line is ours, and which of its settings work against terms; nothing here imports SkyRL."""

from collections.abc import Sequence
from typing import Any

from ...chain.chain import Chain
from ...recipe.links import NOTHING
from ..recipe import chain_of_section
from ..refusals import Gives, refuse_what_is_lacking

SECTION = "hclm_rl"
RENORMALISES = ("grpo", "rloo")  # advantage estimators that are made of a response's reward and its group
DIVIDES = ("grpo",)
EPSILON = 1e-6
# policy losses in which an advantage (B, T) weighs single tokens, as tests/integrations/test_skyrl.py has it
TAKES_TOKEN_ADVANTAGES = ("regular", "dual_clip", "sapo", "gspo", "cispo", "dppo")
INSTEAD = "train it with hclm_rl.GRPOTrainer or under verl, or take another term"
NO_ENTROPY = f"SkyRL computes no entropies before the update: {INSTEAD}"
NO_POLICY = f"SkyRL's loss does not call terms, so none can read the policy as it is in the update: {INSTEAD}"


def split(arguments: Sequence[str]) -> tuple[Chain, int, list[str]]:
    """The terms, the seed, and what is left for SkyRL of `key=value` arguments."""
    own: dict[str, object] = {}
    rest = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.startswith(f"{SECTION}."):
            name = key.removeprefix(f"{SECTION}.")
            own[name] = int(value) if name == "seed" and value.isdigit() else value
        elif key != "trainer.override_entrypoint":
            rest.append(argument)
    if own.get("entropy_terms") == "":
        own.pop("entropy_terms")
    chain, seed = chain_of_section(own or None, SECTION)
    return chain, seed, rest


def gives(algorithm: Any) -> Gives:
    """What SkyRL's trainer can hand to the chain; `algorithm` is its AlgorithmConfig."""
    return Gives(
        where="under SkyRL",
        instead=INSTEAD,
        scores=True,
        entropies=False,
        columns=True,  # stage 2 runs right after stage 1
        rewards=True,
        reference=bool(algorithm.use_kl_loss or algorithm.use_kl_in_reward),
    )


def refuse_settings(config: Any, chain: Chain) -> None:
    """Raises one sentence with the first setting that the terms cannot work beside; `config`: SkyRLTrainConfig."""
    algorithm = config.trainer.algorithm
    refuse_what_is_lacking(chain, gives(algorithm))
    if algorithm.use_entropy_loss:
        raise ValueError(
            "SkyRL's use_entropy_loss beside entropy_terms: the two would fight over one entropy; set it to false"
        )
    if algorithm.policy_loss_type not in TAKES_TOKEN_ADVANTAGES:
        raise ValueError(
            f"trainer.algorithm.policy_loss_type {algorithm.policy_loss_type} does not take an advantage for each "
            f"token, or controls entropy itself; allowed beside entropy terms: {', '.join(TAKES_TOKEN_ADVANTAGES)}"
        )
    if config.generator.step_wise_trajectories:
        raise ValueError(
            "generator.step_wise_trajectories gives several outputs for one response, of which entropy terms would see "
            "each as a response of its own: set it to false"
        )
    if algorithm.advantage_batch_normalize:
        raise ValueError(
            "trainer.algorithm.advantage_batch_normalize takes the mean off what the entropy terms leave: set it to "
            "false"
        )
    refuse_rewards_out_of_sight(algorithm, chain)
    for link in chain.links:
        if link.coef != NOTHING and link.term.least_group > config.generator.n_samples_per_prompt:
            raise ValueError(
                f"{link.name}: needs groups of {link.term.least_group} responses or more, and "
                f"generator.n_samples_per_prompt is {config.generator.n_samples_per_prompt}"
            )


def refuse_rewards_out_of_sight(algorithm: Any, chain: Chain) -> None:
    """Terms that give rewards or replace advantages, where SkyRL's own are not made of a response's reward alone."""
    names = ", ".join(
        link.name
        for link in chain.links
        if link.coef != NOTHING and (link.term.sets_baseline or link.term.shapes_rewards)
    )
    if names and algorithm.advantage_estimator not in RENORMALISES:
        raise ValueError(
            f"{names}: makes advantages anew from the rewards, which advantage_estimator "
            f"{algorithm.advantage_estimator} does not allow; allowed: {', '.join(RENORMALISES)}"
        )
    if names and algorithm.use_kl_in_reward:
        raise ValueError(f"{names}: would not see the KL that SkyRL takes off the rewards: set use_kl_in_reward false")
