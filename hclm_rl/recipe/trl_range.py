"""Which releases of TRL the library works with: `make test-trl-matrix` runs the seam and the invariants on each.

1.15 is not among them: its loss is a Triton kernel alone, which no test on a CPU can run.
"""

import trl
from packaging.version import Version

LOWEST, BELOW = "1.16", "1.17"  # as in pyproject.toml


def other_trl() -> str | None:
    """What is wrong with the TRL that is installed, in a sentence; None where nothing is."""
    if Version(LOWEST) <= Version(trl.__version__) < Version(BELOW):
        return None
    allowed = f"trl>={LOWEST},<{BELOW}"
    return f"hclm_rl works with {allowed}, and trl {trl.__version__} is installed: pip install '{allowed}'"
