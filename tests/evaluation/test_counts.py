"""`hclm-rl eval --counts`: from anyone's counts or sample files to curves with bands, support and a verdict."""

import json
import math
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from hclm_rl.commands import cli
from hclm_rl.evaluation.counted import compare_counts, curve_of
from hclm_rl.evaluation.counts import Counts, Reading, read_counts
from hclm_rl.evaluation.statistics import Support, simultaneous_band

# of DeepScaleR's 1,060 problems with 128 responses each (the slow test below): answered right at least once by base
# and trained, by the base alone, by the trained alone, by neither
KEPT, LOST, GAINED, NEITHER = 911, 33, 12, 104


def lines(path: Path, entries: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture
def derived(tmp_path: Path) -> list[Path]:
    """Counts with the real ones' support and about their pass@1: a problem that both answer has 89 -> 100 of 128."""
    base = [89] * KEPT + [2] * LOST + [0] * GAINED + [0] * NEITHER
    trained = [100] * KEPT + [0] * LOST + [2] * GAINED + [0] * NEITHER
    return [
        lines(tmp_path / f"{name}.jsonl", ({"id": f"p{i}", "n": 128, "c": c} for i, c in enumerate(counts)))
        for name, counts in (("base", base), ("trained", trained))
    ]


def test_a_verdict_from_counts_alone(derived: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["eval", "--counts", *map(str, derived), "--out", str(tmp_path / "out")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "sharpened: yes (pass@1 +0.074" in out  # (911 x 11 - 33 x 2 + 12 x 2) / (1060 x 128) = .0735
    # exact binomial: 2 sum_(i <= 12) C(45, i) / 2^45
    p = 2 * sum(math.comb(45, i) for i in range(13)) / 2**45
    assert f"support loss: yes (of the problems 33 lost, 12 gained, McNemar p = {p:.2g})" in out
    unknown = "not judged (which answers were given is not known, only how many were right)"
    assert f"answer collapse: {unknown}" in out and f"masked collapse: {unknown}" in out
    assert "Verdict on the answers: warning, and whether they collapsed is not known" in out
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["verdict"]["of"] == "answers" and report["verdict"]["kind"] == "warning"
    assert report["support"]["lost"] == [f"p{i}" for i in range(KEPT, KEPT + LOST)]
    assert len(report["support"]["gained"]) == GAINED
    last = report["estimates"]["change"]["pass@128"]
    assert last["mean"] == pytest.approx((GAINED - LOST) / 1060) and last["upper"] < 0
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<svg") == 1 and "for all k at once" in page and "The answers: warning" in page
    assert 'download="eval.csv"' in page and "Made 20" in page


def test_counts_need_neither_torch_nor_a_model(derived: list[Path], tmp_path: Path):
    line = ["eval", "--counts", *map(str, derived), "--out", str(tmp_path)]
    code = f"import sys; from hclm_rl.commands.cli import main; main({line!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_band_holds_all_means_at_once():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, 4000))
    low, high = simultaneous_band(rows, resamples=4000)
    # three independent normal means: P(all |z| < q) = (2 Phi(q) - 1)^3 = .95, q = Phi^-1((1 + .95^(1/3)) / 2) = 2.388
    q = statistics.NormalDist().inv_cdf((1 + 0.95 ** (1 / 3)) / 2)
    np.testing.assert_allclose((high - low) / 2, q * rows.std(axis=1) / math.sqrt(4000), rtol=0.05)
    # the same row three times is one mean: q = 1.96
    low, high = simultaneous_band(np.tile(rows[:1], (3, 1)), resamples=4000)
    np.testing.assert_allclose((high - low) / 2, 1.96 * rows[0].std() / math.sqrt(4000), rtol=0.05)


def test_the_band_of_problems_that_are_alike_is_a_point_and_of_one_problem_unknown():
    varied = np.array([0.0, 1.0] * 50)
    low, high = simultaneous_band(np.stack([np.full(100, 0.3), varied]), resamples=500)
    assert low[0] == high[0] == pytest.approx(0.3) and high[1] - low[1] > 0.1
    assert np.isnan(simultaneous_band(np.array([[0.5]]))).all()


def lm_eval(doc: int, answer: object, **more: object) -> dict:
    return {"doc_id": doc, "doc": {}, "target": "4", "resps": [["x"]], "filtered_resps": [answer], **more}


def test_sample_files_of_lm_eval_are_told_by_their_keys(tmp_path: Path):
    found = read_counts(
        lines(
            tmp_path / "samples.jsonl",
            [
                lm_eval(0, "4", metrics=["exact_match"], exact_match=1.0),
                lm_eval(0, "5", metrics=["exact_match"], exact_match=0.0),
                lm_eval(1, ["4", "4", "5", "4"], metrics=["exact_match"], exact_match=0.75),  # four samples at once
                # a question with choices, whose filtered_resps are one a choice: one response
                {**lm_eval(2, None), "filtered_resps": [["-1.5", "False"], ["-0.5", "True"]], "acc": 1.0}
                | {"metrics": ["exact_match"], "exact_match": 1.0},
            ],
        )
    )
    assert found.form == "lm-eval" and found.problems == ("0", "1", "2")
    assert found.n.tolist() == [2, 4, 1] and found.c.tolist() == [1, 3, 1]


def test_of_several_filters_and_metrics_one_is_named(tmp_path: Path):
    of_filters = [
        lm_eval(0, answer, filter=name, metrics=["exact_match", "f1"], exact_match=float(answer == "4"), f1=0.5)
        for name, answer in (("strict-match", "5"), ("flexible-extract", "4"))
    ]
    path = lines(tmp_path / "samples.jsonl", of_filters)
    with pytest.raises(ValueError, match=r"the metrics exact_match, f1: name one with --metric"):
        read_counts(path)
    with pytest.raises(ValueError, match=r"several filters \(flexible-extract, strict-match\): name one with --filter"):
        read_counts(path, Reading(metric="exact_match"))
    assert read_counts(path, Reading(metric="exact_match", filter="flexible-extract")).c.tolist() == [1]
    with pytest.raises(ValueError, match="no line of the filter 'loose', only of "):
        read_counts(path, Reading(metric="exact_match", filter="loose"))


def test_sample_files_of_verl_are_told_by_their_keys(tmp_path: Path):
    def verl(prompt: str, score: float, **more: object) -> dict:
        return {"input": prompt, "output": "x", "gts": "4", "score": score, "step": 10, **more}

    plain = lines(tmp_path / "10.jsonl", [verl("a", 1.0), verl("b", 0.1), verl("a", 0.0), verl("b", 0.0)])
    found = read_counts(plain)
    assert found.problems == ("a", "b") and found.n.tolist() == [2, 2] and found.c.tolist() == [1, 0]
    assert read_counts(plain, Reading(right_at=0.1)).c.tolist() == [1, 1]
    # acc, where the reward function gives it: a shaped score of .5 is right here
    assert read_counts(lines(tmp_path / "20.jsonl", [verl("a", 0.5, acc=True)])).c.tolist() == [1]


def test_problems_are_paired_by_name_and_what_one_file_lacks_is_said():
    n = np.array([4, 4, 4])
    base = Counts(name="base", form="counts", problems=("a", "b", "c"), n=n, c=np.array([4, 0, 1]))
    trained = Counts(name="trained", form="counts", problems=("c", "d", "a"), n=n, c=np.array([0, 4, 4]))
    found = compare_counts(base, trained)
    assert found.base.problems == ("a", "c") and found.trained.c.tolist() == [4, 0]
    assert isinstance(found.support, Support) and (found.support.lost, found.support.gained) == (1, 0)
    assert [note.split(":")[0] for note in found.notes] == [
        f"1 of 3 problems of '{name}' are left out" for name in ("base", "trained")
    ]


def test_pass_at_k_ends_at_the_fewest_responses_and_unequal_numbers_judge_no_support():
    base = Counts(name="b", form="counts", problems=("a", "b"), n=np.array([4, 8]), c=np.array([2, 4]))
    found = compare_counts(base, base)
    assert found.most == 4 and found.support == "the numbers of responses differ, from 4 to 8"
    # unbiased: 1 - C(2, 2) / C(4, 2) = 5/6 and 1 - C(4, 2) / C(8, 2) = 11/14
    np.testing.assert_allclose(curve_of(base, 4)[1], [5 / 6, 11 / 14])
    [_, lost, *_] = found.verdict.signals
    assert lost.is_given is None and lost.because == found.support
    assert found.verdict.said.startswith("the answers: healthy, as far as they were judged")


GOOD = {"id": "a", "n": 2, "c": 1}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "has no line: give one JSON object a line, such as"),
        ("{", "line 1 is not valid JSON"),
        ("[1]", "line 1 must be a JSON object such as"),
        ('{"id": "a", "right": 1}', "line 1 has the keys id, right, known are counts: id, n, c; lm-eval: doc_id"),
        (
            '{"id": "a", "n": 2, "c": 3}',
            "line 1: n must be a whole number from 1 to 1000000 and c one from 0 to n, got n=2, c=3",
        ),
        ('{"id": "a", "n": 2, "c": true}', "got n=2, c=True"),
        ('{"id": "a", "n": 0, "c": 0}', "got n=0, c=0"),
        ('{"id": "a", "n": 1' + "0" * 20 + ', "c": 0}', "n must be a whole number from 1 to 1000000"),
        ('{"id": "a", "n": 1' + "0" * 5000 + ', "c": 0}', "line 1 cannot be read as JSON (Exceeds the limit"),
        ('{"id": ' + "[" * 10**5, "line 1 cannot be read as JSON (maximum recursion depth exceeded"),
        ('{"id": null, "n": 2, "c": 1}', "a problem is named by text or a whole number, got None"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD), "line 2: the problem 'a' stands in an earlier line too"),
        (json.dumps(GOOD) + '\n{"input": "a", "output": "", "score": 1}', "line 2 has the keys of verl, lines before"),
        ('{"input": "a", "output": "", "score": "1"}', "'score' must be a number, true or false, got '1'"),
        ('{"doc_id": 1, "filtered_resps": ["4"]}', "has the metrics none: name one with --metric"),
        ('{"doc_id": 1, "filtered_resps": [["4", "5"]], "acc": 0.3}', "'acc' must be the share of its 2 responses"),
    ],
)
def test_a_file_that_cannot_be_counted_is_one_sentence(
    content: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    bad, good = tmp_path / "bad.jsonl", lines(tmp_path / "good.jsonl", [GOOD])
    bad.write_text(content)
    assert cli.main(["eval", "--counts", str(good), str(bad), "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"hclm-rl: '{bad}'") and sentence in err and err.count("\n") == 1


def test_a_byte_order_mark_is_no_part_of_a_file_of_counts(tmp_path: Path):
    path = lines(tmp_path / "counts.jsonl", [GOOD])
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert read_counts(path).c.tolist() == [1]


@pytest.mark.parametrize("bound", ["nan", "inf"])
def test_nothing_is_right_from_a_bound_on_that_is_no_number(bound: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    good = str(lines(tmp_path / "good.jsonl", [GOOD]))
    assert cli.main(["eval", "--counts", good, good, "--right_at", bound]) == 2
    assert capsys.readouterr().err == f"hclm-rl: right_at must be a finite number, got {bound}\n"


def test_files_without_a_common_problem_or_missing_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture):
    one, other = (lines(tmp_path / f"{name}.jsonl", [{**GOOD, "id": name}]) for name in "ab")
    assert cli.main(["eval", "--counts", str(one), str(other)]) == 2
    assert "have no problem in common: their first ones are 'a' and 'b'" in capsys.readouterr().err
    assert cli.main(["eval", "--counts", str(one), str(tmp_path / "none.jsonl")]) == 2
    err = capsys.readouterr().err
    assert "none.jsonl' could not be read: " in err and err.count("\n") == 1
    assert cli.main(["eval", "--counts", str(one)]) == 2
    assert "argument --counts: expected 2 arguments" in capsys.readouterr().err


@pytest.mark.slow
def test_real_counts_of_a_base_and_its_trained_self(tmp_path: Path):
    """DeepScaleR's counts from the package index (MIT), which are not shipped; skipped without a network."""
    fetch = [
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-binary",
        ":all:",
        "passk-inference==0.3.1",
        "-d",
        str(tmp_path),
    ]
    if subprocess.run([sys.executable, *fetch], capture_output=True).returncode:
        pytest.skip("the package index cannot be reached")
    with tarfile.open(next(tmp_path.glob("passk_inference-0.3.1.tar.gz"))) as packed:
        packed.extractall(tmp_path, filter="data")
    folder = tmp_path / "passk_inference-0.3.1/examples/deepscaler32k"
    base, trained = (read_counts(folder / f"{name}.jsonl") for name in ("base", "rl"))
    found = compare_counts(base, trained)
    support = found.support
    assert isinstance(support, Support)
    assert (support.kept, support.lost, support.gained, support.neither) == (KEPT, LOST, GAINED, NEITHER)
    assert found.verdict.given == ["sharpened", "support loss"]
    known = json.loads((folder / "expected.json").read_text())
    for role, name in (("base", "base_pass_at_k"), ("trained", "rl_pass_at_k"), ("change", "mean")):
        ours = [value.mean for value in found.curves[role]]
        np.testing.assert_allclose(ours, [known[name][k - 1] for k in (1, 2, 4, 8, 16, 32, 64, 128)], atol=1e-12)
    # the band over all 128 k at once beside the other package's: another bootstrap, so within 3 % of its width
    every = [
        np.array([[1 - math.comb(128 - c, k) / math.comb(128, k) for c in of.c.tolist()] for k in known["ks"]])
        for of in (base, trained)
    ]
    low, high = simultaneous_band(every[1] - every[0], resamples=4000)
    np.testing.assert_allclose(high - low, np.array(known["upper"]) - known["lower"], rtol=0.03)
