"""Makes `loss_mode=hclm_rl` known to verl; imported by `plugin` alone."""

# pyright: reportMissingImports=false
# (verl is no dependency)

from verl.trainer.ppo.core_algos import register_policy_loss


def register() -> None:
    @register_policy_loss("hclm_rl")
    def hclm_rl(**given: object) -> object:
        from .policy_loss import compute_policy_loss_hclm_rl  # it needs torch and the chain: not before it is used

        return compute_policy_loss_hclm_rl(**given)  # pyright: ignore[reportArgumentType]
