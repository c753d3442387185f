"""Other libraries' logs, as they write them, become the same entries."""

import importlib.util
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from hclm_rl.watch.logs import read_entries, renamed, rows_of

ENTROPIES = (0.961, 0.9, 0.85)


def pairs(entries: list[dict]) -> list[tuple[int, float]]:
    return [(int(str(each["step"])), float(str(each["entropy"]))) for each in entries if "entropy" in each]


EXPECTED = list(enumerate(ENTROPIES, start=1))
CONSOLE = "\n".join(
    [
        "2026-01-01 INFO starting",
        "\x1b[36m(TaskRunner pid=12)\x1b[0m step:1 - global_seqlen/min:100 - actor/entropy:0.961 - actor/lr:1e-06 - "
        "critic/rewards/mean:0.5 - response_length/clip_ratio:0.0",
        "Training Progress:   1%|          | 1/100",
        "step:2 - actor/entropy:np.float64(0.9) - actor/grad_norm:nan - critic/rewards/mean:-0.25",
        "step:3 - actor/pg_loss:-1.2e-05 - actor/entropy:0.85",
    ]
)
CONFIG = "{'actor_rollout_ref': {'model': 'a, b'},\n 'data': {}}\n"  # as Python prints it
RAY = "2026-01-01 10:00:00,123\tINFO worker.py:1832 -- Started a local Ray instance.\n"
LINES = "".join(json.dumps({"step": i, "entropy": h}) + "\n" for i, h in EXPECTED)
TEXTS = {
    "log.jsonl": "".join(json.dumps({"step": i, "entropy": h}) + "\n" for i, h in EXPECTED) + '{"step": 4, "entr',
    "trainer_state.json": json.dumps(
        {
            "max_steps": 50,
            "log_history": [{"step": i, "entropy": h} for i, h in EXPECTED] + [{"step": 3, "eval_loss": 1}],
        },
        indent=2,
    ),
    "console.log": CONSOLE,
    "a console that begins with a comma.log": RAY + RAY + CONSOLE,
    "a console that begins with a mapping.log": CONFIG + CONSOLE,
    "a console that begins with JSON.log": '{"config": 1}\n' + CONSOLE,
    "from the middle of a line on.jsonl": '"entropy": 7.0, "reward": 0.5}\n' + LINES,
    "with a byte order mark.jsonl": "\ufeff" + LINES,
    "with lines that are none.jsonl": LINES.replace(
        "\n", '\n{"step": 9, "entr\n[1, 2]\n{"a": ' + "[" * 10**5 + '\n{"a": 1' + "0" * 5000 + "}\n"
    ),
    "with a byte order mark.csv": "\ufeffstep,entropy\n1,0.961\n2,0.9\n3,0.85\n",
    "of long texts.csv": "step,text,entropy\n1," + "x" * 200_000 + ",0.961\n2,,0.9\n3,,0.85\n",
    "wandb.csv": '"Step","a run - train/entropy","a run - train/entropy__MIN","a run - train/entropy__MAX"\n'
    + "".join(f'"{i}","{h}","0","9"\n' for i, h in EXPECTED),
    "wandb.jsonl": "".join(
        json.dumps({"_step": 7 * i, "train/global_step": i, "train/entropy": h, "_timestamp": 1.0}) + "\n"
        for i, h in EXPECTED
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_log(tmp_path: Path, name: str):
    (tmp_path / name).write_text(TEXTS[name], encoding="utf-8")
    assert pairs(read_entries(tmp_path / name)) == EXPECTED


def test_what_else_stands_in_verls_lines():
    first, second, _ = renamed(rows_of(CONSOLE.splitlines(keepends=True)))
    assert (float(str(first["reward"])), float(str(first["learning_rate"]))) == (0.5, 1e-6)
    assert float(str(second["reward"])) == -0.25 and second["actor/grad_norm"] == "nan"


def test_the_last_step_of_a_trainer_state_goes_with_every_entry(tmp_path: Path):
    (tmp_path / "trainer_state.json").write_text(TEXTS["trainer_state.json"])
    assert {entry["max_steps"] for entry in read_entries(tmp_path)} == {50}


def test_bytes_that_are_no_text_are_passed_over(tmp_path: Path):
    (tmp_path / "console.log").write_bytes(b"\xff\xfe a, b\n" + CONSOLE.encode())
    assert pairs(read_entries(tmp_path / "console.log")) == EXPECTED


def test_names_of_a_csv_that_are_not_known_are_told_all_the_same():
    rows = list(rows_of(["iteration,H\n", "1,0.5\n"]))
    assert rows == [{"iteration": "1", "H": "0.5"}]


def test_the_curves_of_several_runs_are_not_mixed(tmp_path: Path):
    file = tmp_path / "export.csv"
    head = '"Step","a - train/entropy","a - train/entropy__MIN","b - train/entropy","b - train/entropy__MAX"\n'
    file.write_text(head + "".join(f"{i},{h},0,{h + 1},9\n" for i, h in EXPECTED))
    with pytest.raises(ValueError, match="the curves of several runs: name one with --run, of a, b"):
        read_entries(file)
    assert pairs(read_entries(file, run="a")) == EXPECTED
    assert pairs(read_entries(file, run="b")) == [(i, pytest.approx(h + 1)) for i, h in EXPECTED]
    with pytest.raises(ValueError, match="the curves of no run 'c': name one with --run, of a, b"):
        read_entries(file, run="c")


def test_a_name_of_ones_own():
    rows = [{"iteration": 1, "H": 0.5, "entropy": 9.0}]
    assert next(renamed(rows, {"entropy": ["H"], "step": ["iteration"]})) | {"step": 1, "entropy": 0.5} == next(
        renamed(rows, {"entropy": ["H"], "step": ["iteration"]})
    )


def test_a_database_of_trackios(tmp_path: Path):
    file = tmp_path / "my project #1?" / "50%20.db"  # what an address would read as its own
    file.parent.mkdir()
    with closing(sqlite3.connect(file)) as database, database:  # the inner one commits
        database.execute(
            "CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_id TEXT, timestamp TEXT, run_name TEXT, step INTEGER, "
            "metrics TEXT)"
        )
        for run, shift in (("older", 1.0), ("newer", 0.0)):
            for i, h in EXPECTED:
                metrics = json.dumps({"train/entropy": h + shift, "train/global_step": i})
                database.execute(
                    "INSERT INTO metrics (run_id, timestamp, run_name, step, metrics) VALUES ('x', '', ?, ?, ?)",
                    (run, i - 1, metrics),
                )
    assert pairs(read_entries(file)) == EXPECTED  # the latest; the step is the trainer's, trackio's counts from 0
    assert pairs(read_entries(file, run="older")) == [(i, h + 1.0) for i, h in EXPECTED]
    with pytest.raises(ValueError, match=r"50%20\.db has no run 'other'; it has older, newer"):
        read_entries(file, run="other")
    (tmp_path / "no.db").write_text("nothing")
    with pytest.raises(ValueError, match="is no database of trackio's"):
        read_entries(tmp_path / "no.db")


def test_a_folder_is_searched_for_its_log(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no log\.jsonl, no trainer_state\.json and no events"):
        read_entries(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(TEXTS["trainer_state.json"])
    assert pairs(read_entries(tmp_path)) == EXPECTED
    with pytest.raises(ValueError, match="no log at"):
        read_entries(tmp_path / "nothing.jsonl")


def test_tensorboard_is_named_where_it_is_missing(tmp_path: Path):
    if importlib.util.find_spec("tensorboard"):
        pytest.skip("it is installed")
    file = tmp_path / "events.out.tfevents.1.host"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="needs TensorBoard's reader: pip install tensorboard"):
        read_entries(file)


def test_a_tensorboard_event_file(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for i, h in EXPECTED:
            writer.add_scalar("train/entropy", h, i)
    assert pairs(read_entries(tmp_path)) == [(i, pytest.approx(h)) for i, h in EXPECTED]


def test_a_run_that_went_on_has_several_event_files(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    for part, suffix in ((EXPECTED[:2], ".before"), (EXPECTED[2:], ".after")):
        with SummaryWriter(str(tmp_path), filename_suffix=suffix) as writer:
            for i, h in part:
                writer.add_scalar("train/entropy", h, i)
    assert pairs(read_entries(tmp_path)) == [(i, pytest.approx(h)) for i, h in EXPECTED]
    first, last = sorted(tmp_path.iterdir(), key=lambda path: path.name.endswith(".after"))
    assert len(pairs(read_entries(first))) == 2 and len(pairs(read_entries(last))) == 1
