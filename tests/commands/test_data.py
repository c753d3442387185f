"""A user's own data: the file that `hclm-rl eval --task` takes trains too, judged alike; docs/data.md."""

import json
from pathlib import Path

import datasets
import pytest

from hclm_rl.commands import cli
from hclm_rl.commands.data import load_named
from hclm_rl.evaluation.reward import right_answer

from ..tiny import settings

PROBLEMS = [{"prompt": "1 2 3", "answer": 4}, {"prompt": "7 8", "answer": "9"}, {"prompt": "5", "answer": "1/2"}]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(**changes: object) -> list[str]:
    """tests/tiny.py's run, as flags."""
    given = settings(max_steps=1, **changes)
    return [
        part
        for key, value in given.items()
        for part in (f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value))
    ]


def test_the_file_that_is_evaluated_trains(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("math_verify")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "problems.jsonl", PROBLEMS)
    line = ["--model_name_or_path", policy, "--output_dir", "out", *flags()]
    assert cli.main(["grpo", "--dataset_name", "problems.jsonl", *line]) == 0
    first = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])
    assert 0 <= first["rewards/right_answer/mean"] <= 1
    line = ["--samples", "2", "--max_new_tokens", "3", "--out", "judged"]
    assert cli.main(["eval", "out", "--task", "problems.jsonl", *line]) == 0
    assert json.loads((tmp_path / "judged" / "report.json").read_text())["problems"] == 3


def test_right_answers_are_those_of_eval(caplog: pytest.LogCaptureFixture):
    pytest.importorskip("math_verify")
    said = [r"so \boxed{0.5}", [{"role": "assistant", "content": r"\boxed{2/4}"}], r"\boxed{3}", "nothing"]
    assert right_answer(said, answer=["1/2"] * 4) == [1.0, 1.0, 0.0, 0.0]
    # of GSM8K's answers the part behind #### counts; an answer that cannot be read scores no response
    assert right_answer([r"\boxed{72}", r"\boxed{1}"], answer=["48 + 24 #### 72", "see above"]) == [1.0, None]
    assert "right_answer scores no response to a prompt with this answer: the answer 'see above'" in caplog.text


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"prompt": "1"}, "text"], "line 2 is not a JSON object"),
        ([{"question": "1"}], "line 1: 'prompt' must be text, or messages with role and content"),
        ([{"prompt": "1", "answer": [2]}], "line 1: 'answer' must be text or a number, got list"),
        (
            [{"prompt": "1"}, {"prompt": [{"role": "user", "content": "1"}]}],
            "the prompt of line 1 is text and that of line 2 is messages: give all one form",
        ),
        ([{"prompt": "1", "level": 1}, {"prompt": "2", "level": "hard"}], "a column must hold one kind of value"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(rows: list, sentence: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"problems\.jsonl") as error:
        load_named(str(write(tmp_path / "problems.jsonl", rows)), None, False)
    assert sentence in str(error.value)


def test_a_file_that_is_not_there_is_said_in_a_sentence(policy: str, capsys: pytest.CaptureFixture):
    assert cli.main(["grpo", "--dataset_name", "none.jsonl", "--model_name_or_path", policy, *flags()]) == 2
    assert capsys.readouterr().err.endswith(
        "no file at 'none.jsonl': dataset_name is a file, a folder, or a data set of the hub\n"
    )


def test_data_without_answers_needs_a_reward(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    file = write(tmp_path / "problems.jsonl", [{"prompt": "1"}, {"prompt": "2"}])
    line = ["grpo", "--dataset_name", str(file), "--model_name_or_path", policy, "--output_dir", str(tmp_path / "out")]
    assert cli.main([*line, *flags()]) == 2
    assert "or give the data a column 'answer' for right_answer" in capsys.readouterr().err
    # the sentence of docs/data.md about a reward of one's own
    (tmp_path / "my_rewards.py").write_text(
        "def short(completions, **kwargs):\n    return [float(len(text) < 10) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main([*line, *flags(), "--reward_funcs", "my_rewards.short", "--allow_custom_code"]) == 0
    assert "rewards/short/mean" in (tmp_path / "out" / "log.jsonl").read_text()


def test_other_files_and_saved_data_sets_are_read(tmp_path: Path):
    rows = {"prompt": ["1", "2"], "answer": ["3", "4"]}
    made = datasets.Dataset.from_dict(rows)
    made.to_parquet(tmp_path / "a.parquet")
    made.to_csv(tmp_path / "a.csv", quoting=2)  # 2: all but numbers
    made.save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "a.csv", "saved"):
        found = load_named(str(tmp_path / name), None, False)["train"]
        assert [str(each) for each in found["prompt"]] == rows["prompt"] and len(found) == 2, name
    file = write(tmp_path / "p.jsonl", [{"prompt": [{"role": "user", "content": "1"}], "answer": 0.5, "level": 1}])
    [row] = load_named(str(file), None, False)["train"]
    assert row == {"prompt": [{"role": "user", "content": "1"}], "answer": "0.5", "level": 1}
