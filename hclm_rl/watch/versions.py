"""What a run or a page was made with: versions of packages, the commit of the folder where it was started, the time."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

PACKAGES: Final = ("hclm-rl", "trl", "transformers", "accelerate", "torch")
GIT: Final = ("git", "-c", "core.fsmonitor=false")  # a repository's own command is not to run
PATIENCE: Final = 5  # seconds; a run does not wait for a slow file system


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed, and Python's."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # hclm-rl itself, run from its source
            continue
    return found


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def said_by_git(folder: Path, *words: str) -> str:
    """What a git command prints; a CalledProcessError where it fails."""
    done = subprocess.run(
        [*GIT, "-C", str(folder), *words], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    return done.stdout.strip()


def commit_of(folder: Path) -> str | None:
    """Of the repository that the folder lies in, with what is not committed named; None outside of any."""
    try:
        commit = said_by_git(folder, "rev-parse", "HEAD")
        is_changed = said_by_git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}, with changes" if is_changed else commit
