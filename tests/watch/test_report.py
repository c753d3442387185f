"""The page and what it reads: whole runs, seeds, and runs that broke off."""

import base64
import csv
import html
import io
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from hclm_rl.watch.meanings import meanings
from hclm_rl.watch.report import read_run, write_report
from hclm_rl.watch.report.bars import bar_series
from hclm_rl.watch.report.command import main, named
from hclm_rl.watch.report.figures import shown_range, smoothed
from hclm_rl.watch.report.hover import strips
from hclm_rl.watch.report.levels import levels_of
from hclm_rl.watch.report.meant import meanings_of
from hclm_rl.watch.report.ranked import ranked
from hclm_rl.watch.report.runs import Run, read_log
from hclm_rl.watch.report.sections import agreement, curves, stretches
from hclm_rl.watch.report.table import at_equal_steps, changes, compare, value_of
from hclm_rl.watch.report.text import TURNS
from hclm_rl.watch.report.tokens import Scale, scales_of, spread, to_follow, tokens
from hclm_rl.watch.trace import file_of

from ..synthetic_run import HOSTILE, write_full_run, write_trace

MEANS = {"token_entropy": 0.4, "pass@1": 0.5, "distinct_correct": 12.0}
ERRORS = {"token_entropy": 0.01, "pass@1": 0.02, "distinct_correct": 0.5}


def summary(**after: float) -> dict:
    measured = {"prompts": 3, "samples": 8, "standard_errors": ERRORS}
    return {
        "algorithm": "grpo",
        "model": "testbed",
        "terms": [{"entropy_bonus": {"coef": 0.1}}],
        "seed": 1,
        "steps": 20,
        "before": {**measured, "means": MEANS},
        "after": {**measured, "means": MEANS | after},
        "seconds": {"all": 9.0, "training": 7.0},
        "versions": {"trl": "1.16.0"},
    }


def write_run(folder: Path, **after: float) -> Path:
    folder.mkdir(parents=True)
    entries = [{"step": s, "max_steps": 20, "entropy": 0.4 - s / 100, "reward": s / 20} for s in range(5, 25, 5)]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "summary.json").write_text(json.dumps(summary(**after)))
    (folder / "recipe.yaml").write_text("# <script>alert('& more')</script>\ntask: coins\n")
    return folder


def test_the_page_stands_alone_and_holds_table_curves_and_recipe(tmp_path: Path):
    runs = {"plain": write_run(tmp_path / "plain", token_entropy=0.1), "controlled": write_run(tmp_path / "controlled")}
    page = write_report(runs, tmp_path / "new" / "report.html")
    text = page.read_text()
    assert page == tmp_path / "new" / "report.html"
    assert "0.100 ± 0.010" in text and "12.00 ± 0.50" in text  # after, plain; before
    assert "3 prompts, 8 responses each" in text and "standard error over prompts" in text
    assert text.count("<svg") == 2
    assert "&lt;script&gt;alert(&#39;&amp; more&#39;)" in text and "<script" not in text
    assert text.count("task: coins") == 1  # the same recipe of both runs, once
    for outside in ("<link", "src=", "@import", "url(http"):
        assert outside not in text


def test_a_log_cut_in_the_middle_of_a_line_is_shown_up_to_there(tmp_path: Path):
    folder = write_run(tmp_path / "plain")
    log = folder / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-20] + b"\xff")  # of four lines, the last loses its end
    (folder / "summary.json").unlink()
    run = read_run("plain", folder)
    assert run.curve("reward") == ([5, 10, 15], [0.25, 0.5, 0.75])
    assert run.problems == [
        "log.jsonl breaks off after step 15: line 4 is incomplete.",
        "summary.json is missing: the run has not ended.",
    ]
    text = write_report({"plain": folder}, tmp_path / "report.html").read_text()
    assert "log.jsonl breaks off after step 15" in text
    assert text.count("<svg") == 1  # the curves up to step 15; nothing was measured


@pytest.mark.parametrize(("make", "state"), [(True, "is empty"), (False, "does not exist")])
def test_a_folder_without_a_run_is_one_sentence_beside_the_other_run(make: bool, state: str, tmp_path: Path):
    nothing = tmp_path / "nothing"
    if make:
        nothing.mkdir()
    whole = write_run(tmp_path / "whole", token_entropy=0.1)
    text = write_report({"nothing": nothing, "whole": whole}, tmp_path / "report.html").read_text()
    assert text.count('class="problem"') == 1
    assert f"The folder {nothing} {state}: there is nothing to show." in text
    assert "0.100 ± 0.010" in text and text.count("<svg") == 2


def test_nothing_logged_yet_is_said(tmp_path: Path):
    (tmp_path / "log.jsonl").touch()
    assert read_log(tmp_path / "log.jsonl") == ([], "log.jsonl is empty: the run has not logged a step.")
    assert read_log(tmp_path / "other.jsonl") == ([], "other.jsonl is missing: the run has not logged a step.")


def test_no_run_at_all_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="at least one run folder"):
        write_report({}, tmp_path / "report.html")


def test_seeds_of_one_name_make_one_column_with_their_spread(tmp_path: Path):
    runs = [
        Run(name=f"plain, seed {seed}", folder=tmp_path, summary=summary(token_entropy=entropy))
        for seed, entropy in ((1, 0.1), (2, 0.2), (3, 0.6))
    ]
    table = compare(runs)
    assert table is not None and table.columns == ["before", "plain, after"]
    label, values = table.rows[0]
    # mean (0.1 + 0.2 + 0.6) / 3; deviations -0.2, -0.1, 0.3, so variance (0.04 + 0.01 + 0.09) / 2 = 0.07
    assert (label, values[1]) == ("token entropy (nats)", "0.300 ± 0.265")
    assert "standard deviation over 3 seeds" in table.caption
    # from 0.4 to 0.3; success and diversity are as before
    said = "token entropy \u22120.10 nats, pass@1 +0.0 points, distinct right answers per prompt +0.00"
    assert changes(runs) == [("plain", said)]


def run_of(name: str, folder: Path, values: list[float], **more) -> Run:
    log = [{"step": step, "entropy": value, "reward": 0.5} for step, value in enumerate(values, start=1)]
    return Run(name=name, folder=folder, log=log, **more)


def test_runs_of_different_length_are_compared_at_the_last_step_of_both(tmp_path: Path):
    long, short = run_of("long", tmp_path, [1.0] * 18 + [0.6, 0.2] + [0.0] * 20), run_of("short", tmp_path, [0.5] * 20)
    table = at_equal_steps([long, short])
    assert table is not None and table.columns == ["long", "short"]
    # the last tenth up to step 20 is steps 19 and 20
    assert table.rows == [("token entropy (nats)", ["0.400", "0.500"]), ("mean reward", ["0.500", "0.500"])]
    lengths = "long to step 40, short to step 20"
    assert table.caption == (
        f"Training prompts, mean over steps 19 to 20. The runs are not equally long ({lengths}): compared is what all "
        "of them have."
    )
    assert at_equal_steps([long]) is None and at_equal_steps([long, run_of("none", tmp_path, [])]) is None


def test_targets_and_floors_are_drawn_on_the_entropy(tmp_path: Path):
    terms = [
        {"entropy_bonus": {"coef": {"kind": "step_to_target", "target": 0.25}}},
        {"force_reweight": {"floor": 0.5}},
        {"force_reweight": {"floor": 0.1, "unit": "nats"}},
        "clip_cov",
    ]
    settings = {"use_adaptive_entropy": True, "entropy_target": 0.3}
    about = {"terms": terms, "settings": settings}
    run = run_of("mine", tmp_path, [0.75, 0.5, 0.5, 0.25], about=about)
    # the start is the mean of the first five logged steps: 0.5
    assert [(level.nats, level.label) for level in levels_of(run)] == [
        (0.25, "target of entropy_bonus, 0.25"),
        (0.25, "floor of force_reweight, 0.5 of the start"),
        (0.1, "floor of force_reweight, 0.1"),
        (0.3, "TRL's target 0.3"),
    ]
    section = curves([run])
    assert section is not None and "Dashed: target of entropy_bonus, 0.25; floor of force_reweight" in section.caption
    assert [line.get_ydata()[0] for line in section.figure.axes[0].lines[-4:]] == [0.25, 0.25, 0.1, 0.3]


def test_the_page_has_contents_and_its_numbers_as_csv(tmp_path: Path):
    folders = {name: write_run(tmp_path / name) for name in ("a", "b")}
    text = write_report(folders, tmp_path / "page.html").read_text()
    for anchor in ("before-and-after", "equal-steps", "training", "runs"):
        assert f'href="#{anchor}"' in text and f'id="{anchor}"' in text
    [data] = re.findall(r'href="data:text/csv;base64,([^"]+)"', text)
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(data).decode())))
    first = read_run("a", folders["a"]).log[0]
    assert rows[0] == {"run": "a", "step": str(first["step"]), "quantity": "entropy", "value": str(first["entropy"])}
    assert {row["quantity"] for row in rows} >= {"entropy", "reward"}


def test_what_a_quantity_means_stands_below_its_curve_in_the_words_of_the_command_line(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    log = [{"step": s, "entropy": 0.4, "mine/coef": s / 9, "mine/affected": 0.5, "unknown": 1.0} for s in (1, 2, 3)]
    (folder / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in log))
    text = write_report({"a": folder}, tmp_path / "page.html").read_text()
    assert text.count("<summary>What these quantities mean</summary>") == 2  # a section each: training, terms
    [(_, entropy)] = meanings("entropy")
    told = entropy.told.replace("`", "")
    assert f"<dt><code>entropy</code> (nats)</dt><dd>{told}</dd>" in html.unescape(text)
    assert "<dt><code>mine/affected</code> (share)</dt><dd>of the response tokens that the link changed" in text
    assert "<code>reward</code>" not in text  # nobody logged it


def test_a_quantity_that_may_be_of_several_terms_is_told_of_each():
    assert [each.by for each in meanings_of("log_det/value")] == [""]
    of_several = meanings_of("mine/value")
    assert 1 < len(of_several) <= 3 and all(each.by for each in of_several)
    assert meanings_of("nobody/knows_this") == []


def test_the_page_says_when_a_run_began_and_at_which_commit(tmp_path: Path):
    folders = {name: write_run(tmp_path / name) for name in ("a", "b", "c")}
    for name in ("a", "b"):
        about = {"started": "2026-01-02T03:04:05+00:00", "ended": None, "commit": "c0ffee, with changes"}
        (folders[name] / "run.json").write_text(json.dumps(about))
    text = write_report(folders, tmp_path / "page.html").read_text()
    assert (
        text.count("<td>2026-01-02T03:04:05+00:00</td>") == 2
        and text.count("a and b: commit c0ffee, with changes") == 1
    )


def test_the_page_links_to_the_trackers_run_and_runs_no_script(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    trackers = {"wandb": "https://wandb.ai/me/p/runs/1?a=1&b=2", "trackio": "javascript:alert(1)", "other": 3}
    (folder / "run.json").write_text(json.dumps({"started": "-", "trackers": trackers}))
    text = write_report({"a": folder}, tmp_path / "page.html").read_text()
    assert '<a href="https://wandb.ai/me/p/runs/1?a=1&amp;b=2">in wandb</a>' in text and "javascript" not in text
    (folder / "run.json").write_text(json.dumps({"started": "-", "trackers": "https://nowhere"}))
    assert "nowhere" not in write_report({"a": folder}, tmp_path / "page.html").read_text()


def test_a_recipe_says_what_the_command_line_put_in_its_place(tmp_path: Path):
    folders = {name: write_run(tmp_path / name) for name in ("a", "b")}
    (folders["a"] / "summary.json").write_text(json.dumps({**summary(), "overrides": "--max_steps 4"}))
    text = write_report(folders, tmp_path / "page.html").read_text()
    assert text.count("in place of it:") == 1 and "a in place of it: <code>--max_steps 4</code>" in text


def test_only_seeds_make_one_column(tmp_path: Path):
    names = ("target=0.15,delta=0.01/seed-11", "target=0.35,delta=0.01/seed-11", "a, b, seed 1", "a, b, seed 2")
    runs = [Run(name=name, folder=tmp_path, summary=summary()) for name in names]
    table = compare(runs)
    assert table is not None
    after = [name for name in table.columns if name.endswith(", after")]
    assert after == [f"{name}, after" for name in (*names[:2], "a, b")]


def test_columns_that_were_measured_differently_say_so(tmp_path: Path):
    eight, one = summary(), summary()
    eight["after"] = {**eight["after"], "samples": 64}
    one["after"] = {**one["after"], "prompts": 1, "standard_errors": dict.fromkeys(MEANS, math.nan)}
    runs = [
        Run(name="a, seed 1", folder=tmp_path, summary=eight),
        Run(name="a, seed 2", folder=tmp_path, summary=summary()),
        Run(name="b", folder=tmp_path, summary=one),
    ]
    table = compare(runs)
    assert table is not None
    assert "a, after: 3 prompts, 8 or 64 responses each, ± standard deviation over 2 seeds" in table.caption
    assert "b, after: 1 prompt, 8 responses each, ± standard error over prompts" in table.caption
    assert all("±" not in values[-1] for _, values in table.rows)


def test_a_measure_that_only_a_later_seed_has_brings_its_own_error(tmp_path: Path):
    first, second = summary(), summary()
    for when in ("before", "after"):
        less = {name: value for name, value in first[when]["means"].items() if name != "pass@1"}
        first[when] = {**first[when], "means": less, "standard_errors": less}
    runs = [Run(name=f"a, seed {i}", folder=tmp_path, summary=each) for i, each in ((1, first), (2, second))]
    value = value_of(runs, "after", "pass@1")
    expected = second["after"]
    assert (value.mean, value.error) == (expected["means"]["pass@1"], expected["standard_errors"]["pass@1"])


def test_runs_that_started_differently_keep_their_own_before(tmp_path: Path):
    other = summary(token_entropy=0.1)
    other["before"] = {**other["before"], "means": MEANS | {"token_entropy": 0.9}}
    runs = [Run(name="a", folder=tmp_path, summary=summary()), Run(name="b", folder=tmp_path, summary=other)]
    table = compare(runs)
    assert table is not None and table.columns == ["a, before", "b, before", "a, after", "b, after"]
    assert table.rows[0][1] == [f"{x} ± 0.010" for x in ("0.400", "0.900", "0.400", "0.100")]


def test_smoothing_is_a_centred_mean_that_shrinks_at_the_ends():
    # width 3: (0 + 3) / 2, (0 + 3 + 6) / 3, (3 + 6 + 3) / 3, (6 + 3) / 2
    assert smoothed([0.0, 3.0, 6.0, 3.0], width=3) == [1.5, 3.0, 4.0, 4.5]
    assert smoothed([0.0, 300.0, 6.0, 3.0], width=3, middle=statistics.median) == [150.0, 6.0, 6.0, 4.5]


def test_the_scale_leaves_out_the_outermost_values_but_no_mean():
    values = [-500.0, *range(48), 500.0]
    assert shown_range(values, [3.0, 47.5], outer=0.02) == (0.0, 47.5)  # 1 of 50 on either side


def logged(values: list[float]) -> Run:
    return Run(name="a", folder=Path(), log=[{"step": i + 1, "collapse/state": v} for i, v in enumerate(values)])


def test_neighbours_in_one_state_are_one_band_up_to_the_next():
    # 0.4 and 1.6: a state averaged over the steps between two log entries; 7: beyond the last
    run = logged([0.0, 0.4, 1.0, 1.6, 2.0, 7.0])
    assert stretches(run) == [(0, 1, 3), (1, 3, 4), (2, 4, 6), (4, 6, 6)]


def test_agreement_of_predictions_in_words():
    # signs agree in three of four; deviations (-1.5, -.5, .5, 1.5) and (-2, 0, 0, 2): 6 / sqrt(5 * 8) = 0.949
    said = agreement([(-1.0, -2.0), (0.0, 0.0), (1.0, 0.0), (2.0, 2.0)])
    assert said == "same sign in 75 % of 4 logged steps, correlation 0.95"
    assert agreement([(1.0, 1.0), (1.0, -1.0)]) == "same sign in 50 % of 2 logged steps"


def test_bars_before_are_one_if_all_started_alike(tmp_path: Path):
    other = summary()
    other["before"] = {**other["before"], "means": MEANS | {"token_entropy": 0.9}}
    alike = [Run(name=name, folder=tmp_path, summary=summary()) for name in ("a", "b")]
    assert [label for label, *_ in bar_series(alike)] == ["before", "a, after", "b, after"]
    unlike = [alike[0], Run(name="b", folder=tmp_path, summary=other)]
    assert [label for label, *_ in bar_series(unlike)] == ["a, before", "b, before", "a, after", "b, after"]


def test_a_run_that_was_not_measured_has_no_column_and_no_bars(tmp_path: Path):
    runs = [Run(name="a", folder=tmp_path, summary=summary()), Run(name="broken", folder=tmp_path)]
    table = compare(runs)
    assert table is not None and table.columns == ["before", "a, after"]
    assert [label for label, *_ in bar_series(runs)] == ["before", "a, after"]
    assert compare(runs[1:]) is None and not bar_series(runs[1:])


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text between them."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def headings(page: Page) -> list[str]:
    text = "\n".join(page.text)
    titles = ["During training", "Alarms", "Entropy terms", "Information force", "Predicted and realised", "Spectra"]
    return [title for title in [*titles, "Completions"] if f"\n{title}" in text]


def test_a_full_run_of_500_steps_in_under_ten_seconds(tmp_path: Path):
    folder = write_full_run(tmp_path / "run", steps=500)
    began = time.process_time()
    page = Page(write_report({"run": folder}, tmp_path / "report.html", png=True))
    assert time.process_time() - began < 10
    assert len(headings(page)) == 7
    names = ["alarms", "forces", "predictions", "spectra", "terms", "training"]
    assert sorted(file.name for file in tmp_path.glob("*.png")) == [f"report-{name}.png" for name in names]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.glob("*.png"))


def test_what_no_run_logged_is_left_out(tmp_path: Path):
    page = Page(write_report({"plain": write_run(tmp_path / "plain")}, tmp_path / "report.html"))
    assert headings(page) == ["During training"]
    assert not any(tag == "input" for tag, _ in page.tags)


def test_tokens_are_escaped_and_keep_their_numbers(tmp_path: Path):
    folder = write_full_run(tmp_path / "run", steps=40)
    page = Page(write_report({"run": folder}, tmp_path / "report.html"))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img"})
    tokens = [attributes for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert len(tokens) == 3 * 8 * 20  # steps, responses, tokens
    assert all(set(attributes) == {"title", "style"} for attributes in tokens)  # no token became an attribute
    hovers = [attributes["title"].splitlines()[0] for attributes in tokens[:20]]
    # every third token of the synthetic trace is hostile, in turn by its position
    assert [hovers[3 * i] for i in range(6)] == [f"{HOSTILE[i]!r}, id {3 * i}, position {3 * i}" for i in range(6)]
    row = pq.read_table(file_of(folder, 1)).to_pylist()[0]
    assert f"entropy {row['entropy']:.4g}" in tokens[0]["title"].splitlines()
    assert "<script>alert(1)</script>" in page.text and "What is <b>it</b>?" in page.text
    labels = [attributes.get("id") for tag, attributes in page.tags if tag == "input"]
    assert labels == ["colour0", "colour1", "colour2"]  # entropy, weight, influence


def test_colours_of_a_signed_quantity_and_of_a_weight():
    signed = Scale(column="x", label="x", white=0.0, reach=2.0)
    # full colour is a quarter of white: 255 + 0.75 (213 - 255) = 223.5, (94: 134.25), (0: 63.75); and 64, 149, 197
    assert [signed.colour(value) for value in (-9.0, 0.0, 2.0, None)] == ["#e08640", "#ffffff", "#4095c5", "#fff"]
    rows = [{"entropy": 0.0, "weight": 1.0, "a/b": 7.0}, {"entropy": 2.0, "weight": 0.5, "a/b": 7.0}]
    scales = scales_of(rows)
    assert [(scale.column, scale.white, scale.reach) for scale in scales] == [("entropy", 0, 2), ("weight", 1, 0.5)]
    assert [value for _, value in scales[0].legend()] == ["0", "\u2265 2"]
    assert [value for _, value in scales[1].legend()] == ["\u2264 0.5", "1", "\u2265 1.5"]


def test_steps_shown_are_the_ends_and_the_middle():
    assert spread([1, 2]) == [1, 2] and spread([1, 5, 20, 30, 90]) == [1, 20, 90]


def test_the_steps_of_a_prompt_that_came_again_are_shown():
    # "b" was asked at 10, 30 and 40; its first, middle and last steps are these three
    assert to_follow({10: {"a", "b"}, 20: {"c"}, 30: {"b"}, 40: {"b", "d"}, 50: {"e"}}) == [10, 30, 40]
    # asked twice: 20 and 50, and of the first, middle and last step the first one that is not yet there
    assert to_follow({10: {"a"}, 20: {"b"}, 30: {"c"}, 40: {"d"}, 50: {"b"}}) == [10, 20, 50]
    assert to_follow({10: {"a"}, 20: {"b"}, 30: {"c"}, 40: {"d"}, 50: {"e"}}) == [10, 30, 50]
    assert to_follow({10: {"a"}, 20: set()}) == [10, 20]


def test_a_prompt_is_followed_from_step_to_step(tmp_path: Path):
    folder = write_full_run(tmp_path / "run", steps=40)
    for step in (1, 20, 40):
        table = pq.read_table(file_of(folder, step))
        # the first prompt is another one at every step, the second the same at 20 and 40
        texts = [f"first at {step}" if n == 0 else "again" if step > 1 else "once" for n in table["prompt"].to_pylist()]
        at = table.column_names.index("prompt_text")
        pq.write_table(table.set_column(at, "prompt_text", [texts]), file_of(folder, step))
    shown = tokens([read_run("run", folder)])
    assert shown is not None and shown.is_followed
    at = {step: [(p.text, p.elsewhere) for p in prompts] for step, [(_, prompts)] in shown.steps}
    assert at[20] == [("again", [(40, "prompt-0-40-1")]), ("first at 20", [])]
    assert at[40] == [("again", [(20, "prompt-0-20-1")]), ("first at 40", [])]
    text = write_report({"run": folder}, tmp_path / "report.html").read_text()
    assert '<a href="#prompt-0-40-1">step 40</a>' in text and 'id="prompt-0-40-1"' in text


def test_tokens_stand_in_the_order_of_a_quantity():
    rows = [{"x": value, "token": f"t{value}", "position": 0, "reward": 1.0} for value in range(30)]
    rows.append({"x": None, "token": "none", "position": 0, "reward": 1.0})
    found = ranked({"a": {1: rows[:20]}, "b": {7: rows[20:]}}, "x")
    # 30 have a value, 12 at either end are shown: 29 to 18, and 11 to 0; six between
    assert [row[0] for row in found.rows] == [str(n) for n in (*range(29, 17, -1), *range(11, -1, -1))]
    assert found.left_out == 6 and found.rows[0] == ("29", "'t29'", "b", 7, 0, "1")
    assert ranked({"a": {1: rows[:20]}}, "x").left_out == 0


def test_a_curve_says_its_values_at_a_step(tmp_path: Path):
    runs = [read_run(name, write_run(tmp_path / str(i))) for i, name in enumerate(["plain", "a <b>"])]
    section = curves(runs)
    assert section is not None
    # write_run logs steps 5, 10, 15, 20 with entropy .4 - step / 100 and reward step / 20: two panels of four strips
    svg = section.svg()
    assert svg.count('class="at"') == 8 and svg.endswith("</svg>\n")
    assert svg.count(">step 10</tspan>") == 2 and svg.count(">plain 0.3</tspan>") == 1
    assert svg.count(">a &lt;b&gt; 0.5</tspan>") == 1 and "<b>" not in svg
    shown = section.numbers()
    assert shown is not None and shown.steps == [5, 10, 15, 20]
    assert shown.rows[0] == ("token entropy (nats)", "plain", ["0.35", "0.3", "0.25", "0.2"])
    assert shown.rows[3] == ("mean reward", "a <b>", ["0.25", "0.5", "0.75", "1"])


def test_the_numbers_of_a_curve_end_where_its_run_does(tmp_path: Path):
    long, short = run_of("long", tmp_path, [1.0, 0.5, 0.25, 0.2]), run_of("short", tmp_path, [0.75, 0.5])
    for step in (1, 3):  # of the long run's rewards two are logged
        del long.log[step]["reward"]
    section = curves([long, short])
    shown = section and section.numbers()
    assert shown and shown.rows == [
        ("token entropy (nats)", "long", ["1", "0.5", "0.25", "0.2"]),
        ("token entropy (nats)", "short", ["0.75", "0.5", "", ""]),
        ("mean reward", "long", ["0.5", "0.5", "0.5", "0.5"]),
        ("mean reward", "short", ["0.5", "0.5", "", ""]),
    ]


def test_a_strip_lies_over_its_step():
    figure = Figure(figsize=(10, 5))  # 720 x 360 points
    axes = figure.add_axes((0.1, 0.2, 0.5, 0.6))
    axes.plot([0, 10], [1.0, 2.0], label="run")
    axes.set_xlim(0, 10)
    first, last = strips(axes, 720, 360)
    # the panel goes from 72 to 432 across and, from the top, from 72 to 288; half way between the steps is 252
    assert '<rect class="strip" x="72.0" y="72.0" width="180.0" height="216.0"/>' in first
    assert '<rect class="strip" x="252.0" y="72.0" width="180.0" height="216.0"/>' in last
    assert '<line x1="432.0" x2="432.0" y1="72.0" y2="288.0"/>' in last and ">run 2</tspan>" in last


def test_a_trace_cut_off_is_one_sentence_beside_the_other_steps(tmp_path: Path):
    folder = write_full_run(tmp_path / "run", steps=40)
    file = file_of(folder, 20)
    file.write_bytes(file.read_bytes()[:-30])
    text = write_report({"run": folder}, tmp_path / "report.html").read_text()
    assert "The trace of step 20 is incomplete and left out." in text
    assert "Step 40</h3>" in text and "Step 20</h3>" not in text


def test_a_run_of_another_version_is_shown_as_far_as_it_goes(tmp_path: Path):
    folder = write_run(tmp_path / "old")
    old = summary() | {"after": {"pass@1": 0.5}, "seconds": 12.0}
    (folder / "summary.json").write_text(json.dumps(old))
    log = folder / "log.jsonl"
    log.write_text('{"global_step": 1, "entropy": 0.3}\n' + log.read_text())
    page = write_report({"old": folder}, tmp_path / "report.html").read_text()
    assert "log.jsonl is of another version: 1 of its lines name no step and are left out." in page
    assert "summary.json is of another version: after, seconds cannot be read and are left out." in page
    assert "0.400 ± 0.010" in page and page.count("<svg") == 2  # before, and the curves
    (folder / "summary.json").write_text("[]")
    assert read_run("old", folder).problems[1] == "summary.json is not a summary of a run."


def test_not_a_number_in_the_log_is_a_gap(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 25, "entropy": NaN, "reward": Infinity}\n')
    assert read_run("run", folder).curve("reward")[0] == [5, 10, 15, 20]


def test_runs_are_called_by_the_end_of_their_path_that_tells_them_apart(tmp_path: Path):
    for name in ("x/plain", "y/plain", "y/other", "z=1"):
        (tmp_path / name).mkdir(parents=True)
    given = [str(tmp_path / name) for name in ("x/plain", "y/plain", "y/other", "z=1")]
    assert list(named(given)) == ["x/plain", "y/plain", "other", "z=1"]
    assert named([f"plain, seed 1={given[0]}", given[2]]) == {
        "plain, seed 1": tmp_path / "x/plain",
        "other": tmp_path / "y/other",
    }
    assert list(named(given[:1])) == ["plain"]
    with pytest.raises(ValueError, match="two runs are called 'a'"):
        named([f"a={given[0]}", f"a={given[1]}"])


def test_the_command_writes_beside_the_first_run_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = write_run(tmp_path / "plain")
    assert main([str(tmp_path / "typo"), str(folder), "--png"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert {file.name for file in folder.glob("*.png")} == {"report-measured.png", "report-training.png"}
    assert not (tmp_path / "typo").exists()
    with pytest.raises(ValueError, match=r"no run at .*typo: RUN is the output_dir of a run"):
        main([str(tmp_path / "typo")])


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def in_browser(page: Path, *flags: str) -> subprocess.CompletedProcess:
    """The page opened from disk without a network; what the console says goes to stderr."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", *flags]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on the PATH")
def test_the_page_renders_in_a_browser_without_network(tmp_path: Path):
    from matplotlib.image import imread

    folder = write_full_run(tmp_path / "run", steps=500)
    page = write_report({"run": folder}, tmp_path / "report.html")
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("<body>", "<body><script>missing()</script><img src='nothing.png'>"))
    said = in_browser(broken, "--dump-dom").stderr
    assert "CONSOLE" in said and "missing is not defined" in said  # an error would be seen
    shown = in_browser(page, "--dump-dom")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    assert shown.stdout.count("<svg") == 6 and "Completions" in shown.stdout
    colours = []
    for checked in range(3):
        chosen = tmp_path / f"chosen{checked}.html"
        text = page.read_text().replace(" checked>", ">")
        text = text.replace(f'id="colour{checked}"', f'id="colour{checked}" checked')
        # the buttons and the legends change with the choice too: without them, only the tokens can differ
        chosen.write_text(text.replace("<body>", "<body><style>.choice, .legend { visibility: hidden; }</style>"))
        in_browser(chosen, "--window-size=1200,5000", f"--screenshot={tmp_path / 'page.png'}")
        image = imread(tmp_path / "page.png")
        assert image.shape[:2] == (5000, 1200)
        assert (image[:, :, :3].min(axis=2) < 0.9).mean() > 0.02  # not blank
        colours.append(image)
    assert (colours[0] != colours[1]).any() and (colours[1] != colours[2]).any()  # the choice recolours the tokens


def test_the_bands_have_the_detectors_words_in_its_order():
    from hclm_rl.watch.collapse import STATES as WORDS
    from hclm_rl.watch.report.sections import STATES

    assert tuple(word for word, _ in STATES) == WORDS


BREAKS_OUT = "</script><img src=x onerror='document.title=1'>"
TURNED = "\u202etfel ot thgir\u202c\u2066\x1b[31m"


def write_hostile_run(folder: Path) -> Path:
    """Every text of a run that a stranger or a model may have written, in a folder of its own."""
    write_run(folder)
    told = json.loads((folder / "summary.json").read_text())
    told |= {"model": BREAKS_OUT, "algorithm": TURNED, "terms": [{BREAKS_OUT: {"api_key": "k-1234567"}}]}
    told |= {"overrides": f"--run_name '{BREAKS_OUT}' --hub_token hf_abcdefg", "versions": {BREAKS_OUT: TURNED}}
    (folder / "summary.json").write_text(json.dumps(told))
    (folder / "recipe.yaml").write_text(f"# {BREAKS_OUT} {TURNED[:-5]}\nhub_token: hf_abcdefg  # hf_abcdefg\n")
    write_trace(folder, 1, random.Random(0), said=[BREAKS_OUT, TURNED])
    return folder


def test_nothing_that_a_run_says_becomes_markup_turns_the_page_or_tells_a_token(tmp_path: Path):
    runs = {f"--> {BREAKS_OUT} $x_": write_hostile_run(tmp_path / "a"), TURNED: write_hostile_run(tmp_path / "b")}
    text = write_report(runs, tmp_path / "report.html").read_text()
    assert "<img" not in text and "<script" not in text and "onerror='" not in text
    assert "&lt;/script&gt;&lt;img src=x" in text  # it is there, as text
    assert not TURNS & set(text) and "\x1b" not in text
    assert "\\u202etfel ot thgir\\u202c\\u2066\\u001b[31m" in text
    assert "hf_abcdefg" not in text and "k-1234567" not in text


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on the PATH")
def test_a_hostile_page_runs_nothing_in_a_browser(tmp_path: Path):
    page = write_report({BREAKS_OUT: write_hostile_run(tmp_path / "a")}, tmp_path / "report.html")
    seen = in_browser(page, "--dump-dom")
    assert "<title>1</title>" not in seen.stdout and "<img" not in seen.stdout and "CONSOLE" not in seen.stderr
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("<body>", f"<body>{BREAKS_OUT}"))
    assert "<title>1</title>" in in_browser(broken, "--dump-dom").stdout  # it would be seen
