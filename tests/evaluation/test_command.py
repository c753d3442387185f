"""`hclm-rl eval`, from the command line to the page."""

import base64
import csv
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hclm_rl.commands import cli
from hclm_rl.evaluation import generate
from hclm_rl.evaluation.evaluate import judged, over_limits
from hclm_rl.evaluation.generate import Response
from hclm_rl.evaluation.tasks import Problem
from hclm_rl.responses.limits import Unjudged
from hclm_rl.testbed.policy import policy_path

LINE = ["eval", "testbed", "--task", "coins", "--samples", "8", "--problems", "6", "--batch", "32"]


@pytest.fixture
def sharpened(tmp_path: Path) -> str:
    """The shipped policy with its logits doubled: a policy of temperature 1/2."""
    folder = tmp_path / "sharpened"
    shutil.copytree(policy_path(), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data *= 2
    model.save_pretrained(folder)
    return str(folder)


def test_one_model(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main([*LINE, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"pass@1", "pass@2", "pass@4", "pass@8"} <= report["estimates"]["model"].keys()
    assert report["problems"] == 6 and "verdict" not in report and "base" not in report["estimates"]
    per_problem = report["per_problem"]["model"]
    accuracy = sum(each["right"] for each in per_problem) / 48
    assert report["estimates"]["model"]["pass@1"]["mean"] == pytest.approx(accuracy)
    assert f"{accuracy:.3f} [" in out and "6 problems of coins, 8 responses each" in out


def numbers_on(page: str) -> list[dict[str, str]]:
    """The rows of the CSV that the page holds."""
    [data] = re.findall(r'href="data:text/csv;base64,([^"]+)"', page)
    return list(csv.DictReader(io.StringIO(base64.b64decode(data).decode())))


def test_a_model_beside_its_base_and_a_second_call_that_generates_nothing(
    sharpened: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    line = ["eval", sharpened, "--base", "testbed", *LINE[2:], "--out", str(tmp_path / "out")]
    assert cli.main(line) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert f"Verdict on the answers: {report['verdict']['kind']}" in out and report["verdict"]["of"] == "answers"
    change = {name: value["mean"] for name, value in report["estimates"]["change"].items()}
    assert change["token_entropy"] < -0.1  # at half the temperature
    parts = report["answer_entropy_change"]
    assert parts["sharpening"]["mean"] + parts["diversity"]["mean"] == pytest.approx(change["answer_entropy"])
    support = report["support"]
    assert support["kept"] + support["gained"] + support["lost"] + support["neither"] == 6
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 1 and "McNemar" in page and "answer collapse" in page
    for outside in ("<link", "<script", "src=", "@import", "url(http"):
        assert outside not in page
    assert re.search(r"Made 20\d\d-\d\d-\d\dT.*\bpython 3\.\d+.*\btrl \d", page)
    said = {(row["model"], row["quantity"]): row for row in numbers_on(page)}
    for role, name in (("base", "pass@1"), ("trained", "length"), ("change", "pass@8")):
        there = report["estimates"]["model" if role == "trained" else role][name]
        assert [float(said[role, name][key]) for key in ("mean", "lower", "upper")] == [
            pytest.approx(there[key]) for key in ("mean", "lower", "upper")
        ]

    monkeypatch.setitem(generate.GENERATORS, "transformers", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    assert cli.main(line) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_power_sampling_says_what_it_took(tmp_path: Path, capsys: pytest.CaptureFixture):
    line = ["eval", "testbed", "--task", "coins", "--samples", "4", "--problems", "3", "--out", str(tmp_path)]
    assert cli.main([*line, "--power", "2", "--power_moves", "2", "--power_blocks", "2"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sampling"]["power"] == {"alpha": 2.0, "moves": 2, "blocks": 2, "stops_at_end": True}
    [cache] = (tmp_path / "responses").glob("*.jsonl")
    responses = [each for row in cache.read_text().splitlines() for each in json.loads(row)["responses"]]
    assert len(responses) == 12 and all(each["drawn"] >= each["tokens"] for each in responses)
    drawn, kept = (sum(each[name] for each in responses) for name in ("drawn", "tokens"))
    moved = sum(each["accepted"] for each in responses) / 12
    wanted = f"drew {drawn / kept:.1f} tokens for each that was kept ({drawn} in all), and {moved:.0%} of the moves"
    assert wanted in capsys.readouterr().err
    assert cli.main([*line, "--power", "2", "--temperature", "0.5"]) == 2
    assert "power sampling needs temperature 1 and top_p 1" in capsys.readouterr().err
    assert cli.main([*line, "--power", "0"]) == 2
    assert "alpha must be more than 0 and finite, got 0.0" in capsys.readouterr().err


def test_broken_problems_are_named_and_the_rest_is_evaluated(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    pytest.importorskip("math_verify")
    lines = [{"prompt": "1 2 3", "answer": "4"}, {"prompt": "1 " * 3000, "answer": "4"}, {"prompt": "5", "answer": "?"}]
    (tmp_path / "p.jsonl").write_text("\n".join([*map(json.dumps, lines), "{"]))
    line = ["eval", policy, "--base", "testbed", "--task", str(tmp_path / "p.jsonl"), "--samples", "2"]
    assert cli.main([*line, "--max_new_tokens", "4", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    too_long = f"line 2: 3000 prompt and 4 response tokens are more than the context of '{policy}', 2048"
    assert report["skipped"] == {
        "number": 3,
        "why": [
            "line 3: the answer '?' does not parse as mathematics",
            "line 4: is not valid JSON (Expecting property name enclosed in double quotes at character 1)",
            too_long,
        ],
    }
    [note] = report["notes"]
    assert note.startswith(f"'{policy}' and 'testbed' have different tokenizers") and report["problems"] == 1
    err = capsys.readouterr().err
    assert too_long in err and note in err
    assert too_long.replace("'", "&#39;") in (tmp_path / "report.html").read_text()
    [*_, masked] = report["verdict"]["signals"]
    assert masked["is_given"] is None
    assert report["estimates"]["model"]["pass@1"]["lower"] is None  # one problem has no interval


def test_a_prompt_that_the_chat_template_refuses_is_left_out(policy: str, tmp_path: Path):
    pytest.importorskip("math_verify")
    shutil.copytree(policy, tmp_path / "model")
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }} {% endfor %}"
    )
    (tmp_path / "model/chat_template.jinja").write_text(template)
    good = [{"role": "user", "content": "3 4"}]
    lines = [{"prompt": good, "answer": "4"}, {"prompt": [{"role": "system", "content": "1"}, *good], "answer": "4"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    line = ["eval", str(tmp_path / "model"), "--task", str(tmp_path / "p.jsonl"), "--samples", "2"]
    assert cli.main([*line, "--max_new_tokens", "4", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["problems"] == 1
    assert report["skipped"]["why"] == ["line 2: the chat template refuses it: no system role"]


def test_a_prompt_that_a_model_cannot_encode_is_left_out(tmp_path: Path):
    pytest.importorskip("math_verify")
    lines = [{"prompt": "3 : 4", "answer": "4"}, {"prompt": "three", "answer": "4"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    line = ["eval", "testbed", "--task", str(tmp_path / "p.jsonl"), "--samples", "2", "--max_new_tokens", "4"]
    assert cli.main([*line, "--out", str(tmp_path)]) == 0
    [why] = json.loads((tmp_path / "report.json").read_text())["skipped"]["why"]
    assert why.startswith("line 2: the tokenizer of 'testbed' cannot encode the prompt")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["eval"], "the following arguments are required"),
        ([*LINE, "--samples", "x"], "argument --samples: invalid int value: 'x'"),
        ([*LINE, "--samples", "0"], "samples must be at least 1, got 0"),
        ([*LINE, "--problems", "0"], "the number of problems must be at least 1, got 0"),
        ([*LINE, "--task_kwargs", "{"], "task_kwargs is JSON"),
        ([*LINE, "--task_kwargs", "[]"], "task_kwargs must be a mapping, got []"),
        ([*LINE, "--chat"], "the tokenizer of 'testbed' has no chat template"),
        ([*LINE, "--max_new_tokens", "400"], "coins has no problem that can be evaluated; the first one, row 0: "),
        (["eval", "./nowhere", "--task", "coins"], "the tokenizer of './nowhere' could not be loaded"),
        (["eval", "testbed", "--task", "coinz"], "no task 'coinz'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    line: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"hclm-rl: {sentence}") and err.count("\n") == 1


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    for name in [name for name in sys.modules if name.startswith("hclm_rl.evaluation.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert cli.main(LINE) == 2
    assert capsys.readouterr().err == "hclm-rl: hclm-rl eval needs scipy: pip install 'hclm-rl[eval]'\n"


def test_responses_over_the_limits_are_counted():
    bomb = Response(text="bomb", tokens=1, entropy=None, is_truncated=False)
    plain = Response(text="1", tokens=1, entropy=None, is_truncated=False)
    problem = Problem(
        id="row 0", prompt="?", judge=lambda text: (Unjudged(text) if text == "bomb" else text, text == "1")
    )
    found = [judged(problem, [bomb, plain, bomb]), judged(problem, [plain] * 3)]
    assert over_limits({"model": found, "base": [found[1]]}, {"model": "mine", "base": "theirs"}) == [
        "'mine': 2 of 6 responses went over the limits of judging "
        "and count as wrong, each distinct text as an answer of its own."
    ]
    assert found[0].answers == ("bomb", "1", "bomb") and found[0].is_right == (False, True, False)
