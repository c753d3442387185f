"""examples/: the script trains, the recipes parse and add up, the cells of the notebook are Python, it runs."""

import ast
import importlib
import importlib.util
import json
import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from hclm_rl.recipe.arguments import make_parser, parse

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "notebook.ipynb"
GPUS = {"gsm8k_1.5b": 1, "gsm8k_7b": 8}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells() -> list[str]:
    return [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]


def test_the_script_differs_from_one_of_trls_by_two_lines_and_trains(tmp_path: Path):
    source = (EXAMPLES / "trl_script.py").read_text()
    marked = [line for line in source.splitlines() if "# changed:" in line or "# added:" in line]
    assert [line.split("#")[0].strip() for line in marked] == [
        "from hclm_rl import GRPOConfig, GRPOTrainer",
        'entropy_terms=["hold_coverage"],',
    ]
    trainer = example("trl_script").main(max_steps=1, output_dir=str(tmp_path))
    assert trainer.state.global_step == 1 and (tmp_path / "log.jsonl").is_file()


# what a cluster has: `scontrol` names the nodes; `srun` says what it was asked for, and runs what comes after its own
# flags where that is bash, as the second of the training nodes would; the server goes on until it is ended, and `curl`
# answers when it runs
STANDINS = {
    "scontrol": "printf 'a1\\na2\\na3\\n'",
    "curl": 'until [[ -s "$SAID/srun_1" ]]; do sleep 0.05; done',
    "accelerate": 'printf "%s\\n" accelerate "$@" > "$SAID/trainer"',
    "srun": """printf "%s\\n" "$@" > "$SAID/srun_$(echo "$*" | grep -c vllm-serve)"
while [[ $1 == --* ]]; do shift; done
if [[ $1 == trl ]]; then exec sleep 60; fi
SLURM_PROCID=1 exec "$@\"""",
}


def test_the_script_for_slurm_starts_a_server_and_the_trainers(tmp_path: Path):
    for name, body in STANDINS.items():
        (file := tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(tmp_path)}
    environment |= {"SLURM_JOB_NODELIST": "a[1-3]", "SLURM_JOB_ID": "7"}
    line = ["bash", str(EXAMPLES / "slurm.sh"), "r.yaml", "org/model", "--output_dir", "runs/with space"]
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    server, trainers, launched = (
        (tmp_path / name).read_text().splitlines() for name in ("srun_1", "srun_0", "trainer")
    )
    assert server[:3] == ["--nodes=1", "--ntasks=1", "--nodelist=a3"] and trainers[2] == "--nodelist=a1,a2"
    asked = " ".join(server[4:])
    assert asked == "trl vllm-serve --model org/model --tensor_parallel_size 8 --host 0.0.0.0 --port 8000"
    read = launch_command_parser().parse_args(launched[2:])  # behind `accelerate launch`
    assert (read.num_machines, read.num_processes, read.machine_rank) == (2, 16, 1)
    assert (read.main_process_ip, read.module, read.training_script) == ("a1", True, "hclm_rl")
    assert Path(read.config_file) == Path("recipes/accelerate/fsdp2.yaml")
    ours = read.training_script_args
    assert ours[:3] == ["grpo", "--config", "r.yaml"] and ours[-2:] == ["--output_dir", "runs/with space"]
    assert not {word for word in ours if word.startswith("--")} - {
        *make_parser("grpo")._option_string_actions,
        "--config",
    }
    assert ours[ours.index("--vllm_server_base_url") + 1] == "http://a3:8000"


@pytest.mark.parametrize("name", GPUS)
def test_a_recipe_parses_and_every_value_has_a_reason(name: str, tmp_path: Path):
    file = EXAMPLES / f"{name}.yaml"
    text = file.read_text()
    assert "NOT RUN BY US" in text
    given = yaml.safe_load(text)
    assert not {key for key in given if key not in vars(make_parser("grpo").parse_known_args([])[0])}
    for key in given.keys() - {"output_dir", "entropy_terms"}:
        [line] = [line for line in text.splitlines() if line.startswith(f"{key}:")]
        assert " # " in line, f"{key} has no reason beside it"
    there = tmp_path / "recipe.yaml"  # vLLM is not installed here
    there.write_text(yaml.safe_dump({key: value for key, value in given.items() if "vllm" not in key}))
    line = ["--config", str(there), "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    _, config, *_ = parse("grpo", line)
    assert config.checked()


@pytest.mark.parametrize(
    ("name", "update", "rollout", "updates_an_epoch"),
    # 32 prompts x 8 and 7,473 / 32 = 233.5; 128 prompts x 8 and 7,473 / 128 = 58.4; four updates a rollout
    [("gsm8k_1.5b", 256, 1024, 233), ("gsm8k_7b", 1024, 4096, 58)],
)
def test_the_batches_are_what_the_comments_say(name: str, update: int, rollout: int, updates_an_epoch: int):
    given = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    in_a_pass = given["per_device_train_batch_size"] * GPUS[name]
    assert in_a_pass * given["gradient_accumulation_steps"] == update
    assert in_a_pass * given["steps_per_generation"] == rollout
    assert given["save_steps"] == updates_an_epoch


def test_a_problem_of_gsm8k_has_messages_and_its_number():
    row = {"question": "How much? ", "answer": "300 + 1,100 is 1,400.\n#### 1,400"}
    [problem] = example("gsm8k").as_problems([row])
    assert problem["answer"] == "1400"
    assert problem["prompt"][0]["content"].startswith("How much?\n") and "\\boxed{}" in problem["prompt"][0]["content"]


def test_the_notebooks_cells_are_python_whose_names_exist():
    assert len(cells()) == 6
    for code in cells():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hclm_rl"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, each.name) for each in node.names)


def test_the_notebook_holds_no_output():
    assert not any(cell.get("outputs") for cell in json.loads(NOTEBOOK.read_text())["cells"])


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    why = "it is not installed: pip install nbclient ipykernel matplotlib"
    nbclient = pytest.importorskip("nbclient", reason=why)
    nbformat = pytest.importorskip("nbformat", reason=why)
    for package in ("ipykernel", "matplotlib"):
        pytest.importorskip(package, reason=why)
    for name, value in {"STEPS": "3", "SAMPLES": "4", "PROMPTS": "4", "TMPDIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [each for cell in notebook.cells for each in cell.get("outputs", ())]
    pictures = [each for each in outputs if "image/png" in each.get("data", {})]
    assert len(pictures) == 2  # the forces, the curves
