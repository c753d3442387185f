"""The terms under SkyRL 0.3: `trainer.override_entrypoint=hclm_rl.integrations.skyrl hclm_rl.recipe=terms.yaml`.

Importing this package imports nothing of SkyRL.
"""


def main() -> None:
    """What SkyRL calls in place of its own entry point, with the command line as it came."""
    import sys

    from .entrypoint import run  # SkyRL and Ray: seconds

    run(sys.argv[1:])
