"""Which releases of TRL the library works with: `make test-trl-matrix` runs the seam and the invariants on each."""

import importlib.util

import trl
from packaging.version import Version

LOWEST, BELOW = "1.15", "1.17"  # as in pyproject.toml
WITHOUT_TRITON = "1.16"  # from here on TRL computes its loss where there is no triton


def other_trl() -> str | None:
    """What is wrong with the TRL that is installed, in a sentence; None where nothing is."""
    installed, allowed = Version(trl.__version__), f"trl>={LOWEST},<{BELOW}"
    if not Version(LOWEST) <= installed < Version(BELOW):
        return f"hclm_rl works with {allowed}, and trl {trl.__version__} is installed: pip install '{allowed}'"
    if installed < Version(WITHOUT_TRITON) and importlib.util.find_spec("triton") is None:
        return (
            f"trl {trl.__version__} has no loss without the package triton, which torch's CPU build does not bring: "
            f"pip install 'trl>={WITHOUT_TRITON},<{BELOW}', or pip install triton"
        )
    return None
