"""A stranger's first ten minutes, outside the clone: from the wheel to a run of their own, as the documentation says.

The library comes from the wheel, into an environment of its own; what it depends on is borrowed from the environment
of the tests, so that no network is needed but for the build. `pytest -m slow -s tests/test_stranger.py` prints the
transcript: every command, how long it took, and the end of what it said.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ["--task_kwargs", '{"prompts": 16}', "--max_steps", "4", "--per_device_train_batch_size", "16"]
TINY += ["--steps_per_generation", "1", "--num_generations", "8", "--logging_steps", "1", "--use_cpu", "true"]
OWN = ["--model_name_or_path", "first", "--max_completion_length", "8", "--learning_rate", "1e-4", *TINY[2:]]


def block(page: str, language: str, begins: str) -> str:
    """The code block of a documentation page that begins so."""
    found = re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    return next(each for each in found if each.startswith(begins))


@dataclass
class Stranger:
    """Types commands into a shell in their own folder."""

    python: Path
    folder: Path
    told: list[str] = field(default_factory=list)

    def types(self, *line: str, code: int = 0) -> str:
        """Runs `hclm-rl LINE` with nothing of the clone in the environment; gives both outputs."""
        kept = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
        environment = {**kept, "HOME": str(self.folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        start = time.perf_counter()
        done = subprocess.run(
            [self.python.with_name("hclm-rl"), *line],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        ends = "\n".join(f"    {each[:160]}" for each in done.stdout.splitlines()[-4:])
        self.told.append(f"$ hclm-rl {shlex.join(line)}\n{ends}\n    [{time.perf_counter() - start:.1f} s]")
        assert done.returncode == code, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(build, check=True)  # fetches hatchling, as every build does
    [found] = out.glob("*.whl")
    return found


@pytest.fixture
def stranger(wheel: Path, tmp_path: Path) -> Stranger:
    home = tmp_path / "home"
    home.mkdir()
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    [own] = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # a plain path: the .pth files over there, such as that of an editable hclm-rl, are not read
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Stranger(python=python, folder=home)


@pytest.mark.slow
def test_a_stranger_gets_from_the_wheel_to_a_run_of_their_own(stranger: Stranger):
    home = stranger.folder
    try:
        walk(stranger)
    finally:
        print("\n" + "\n".join(stranger.told))
    assert (home / "first" / "report.html").is_file()


def walk(stranger: Stranger) -> None:
    """Every step, each with what the stranger must be able to see."""
    home = stranger.folder
    assert "right_anchor" in stranger.types("recipes")
    # 1. a first run, and the same line with another method
    stranger.types("grpo", "--task", "coins", "--output_dir", "first", *TINY)
    stranger.types("grpo", "--task", "coins", "--output_dir", "second", "--entropy_terms", '["hold_coverage"]', *TINY)
    assert "hold_coverage/coef" in (home / "second" / "log.jsonl").read_text()
    # 2. side by side, and what the entropy does
    page = home / stranger.types("report", "first", "second").splitlines()[-1]
    assert "hold_coverage" in page.read_text()
    assert "healthy" in stranger.types("watch", "second")
    # 3. the shortest term of docs/extending.md, in a file beside the recipe
    term = block("docs/extending.md", "python", "# floor.py")
    assert len(term.splitlines()) < 20
    (home / "floor.py").write_text(term)
    (home / "mine.yaml").write_text("task: coins\n" + block("docs/extending.md", "yaml", "entropy_terms:\n  - floor."))
    refused = stranger.types("grpo", "--config", "mine.yaml", "--output_dir", "third", *TINY, code=2)
    assert "--allow_custom_code" in refused
    stranger.types("grpo", "--config", "mine.yaml", "--output_dir", "third", "--allow_custom_code", *TINY)
    assert "EntropyFloor/affected" in (home / "third" / "log.jsonl").read_text()
    # 4. problems of their own in JSONL, with the shipped judge and with the reward of docs/data.md
    rows = [{"prompt": f"{a} {b}", "answer": a + b} for a in range(4) for b in range(4)]
    (home / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stranger.types("grpo", "--dataset_name", "problems.jsonl", "--output_dir", "fourth", *OWN)
    assert "rewards/right_answer/mean" in (home / "fourth" / "log.jsonl").read_text()
    (home / "my_rewards.py").write_text(block("docs/data.md", "python", "# my_rewards.py"))
    own = ["--reward_funcs", "my_rewards.short", "--allow_custom_code"]
    stranger.types("grpo", "--dataset_name", "problems.jsonl", "--output_dir", "fifth", *own, *OWN)
    assert "rewards/short/mean" in (home / "fifth" / "log.jsonl").read_text()
    # 5. the judgement, of the model that they trained beside the one that they began with
    judged = ["--task", "problems.jsonl", "--samples", "4", "--max_new_tokens", "4", "--out", "judged"]
    stranger.types("eval", "fourth", "--base", "first", *judged)
    assert json.loads((home / "judged" / "report.json").read_text())["problems"] == len(rows)
