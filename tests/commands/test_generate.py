"""`hclm-rl generate`: every method runs from its recipe, whatever the batch; a mistake is a sentence."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoTokenizer

from hclm_rl.commands import cli
from hclm_rl.commands.decoders import DECODERS, adapted, within
from hclm_rl.commands.generate import GenerateArguments, run, summary_of
from hclm_rl.decoding.diff_adapt import Probe, save_probe
from hclm_rl.recipe.arguments import settings_by
from hclm_rl.recipe.parser import RecipeParser
from hclm_rl.testbed.policy import load_policy, policy_path

ROOT = Path(__file__).parents[2]
RECIPES = {file.stem: file for file in sorted((ROOT / "recipes/generate").glob("*.yaml"))}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the methods read that is not shipped: a large model, a probe, a vector."""
    folder = tmp_path_factory.mktemp("files")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_probe(Probe(64), folder / "probe.safetensors")
        save_file({"vector": torch.randn(64)}, folder / "vector.safetensors")
    return {
        "large": policy_path("coins_noisy"),
        "probe": str(folder / "probe.safetensors"),
        "vector": str(folder / "vector.safetensors"),
    }


def test_every_method_has_a_recipe_that_parses_and_says_what_it_is():
    assert set(RECIPES) == {*DECODERS, "plain_generate"}
    for name, file in RECIPES.items():
        header = file.read_text().split("\ntask:")[0]
        assert f"#   python recipes/generate.py --config recipes/generate/{name}.yaml" in header
        assert "# Numbers" in header
        [options] = settings_by(RecipeParser([GenerateArguments], prog="hclm-rl generate"), ["--config", str(file)])
        assert options.output_dir == f"runs/generate/{name}"
        assert [*(options.decoding or {"plain_generate": None})] == [name]


def responses(name: str, files: dict[str, str], out: Path, batch: int = 8) -> tuple[list[dict], dict]:
    decoding = yaml.safe_load(RECIPES[name].read_text()).get("decoding")
    if decoding:
        decoding[name].update({key: path for key, path in files.items() if key in decoding[name]})
        if name == "power_sampling":
            decoding[name].update(moves=1, blocks=2)
    options = GenerateArguments(
        model_name_or_path="testbed", task="coins", task_kwargs={"prompts": 1, "eval_prompts": 2}, decoding=decoding,
        samples=3, max_new_tokens=6, batch=batch, output_dir=str(out),
    )  # fmt: skip
    summary = run(options)
    rows = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert json.loads((out / "summary.json").read_text()) == summary
    return rows, summary


REPORTED = {
    "power_sampling": {"moves_accepted"},
    "model_switching": {"large_tokens", "compute_saved"},
    "diff_adapt": {"easy_questions", "normal_questions", "hard_questions"},
    "activation_steering": {"relative_strength"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_method_runs_and_its_responses_do_not_depend_on_the_batch(name: str, files: dict[str, str], tmp_path: Path):
    rows, summary = responses(name, files, tmp_path)
    assert len(rows) == 6 and all(1 <= row["tokens"] <= 6 for row in rows)
    assert REPORTED.get(name, set()) <= summary.keys()
    assert summary["pass@1"] == sum(row["is_right"] for row in rows) / 6
    assert summary["tokens_drawn"] >= sum(row["tokens"] for row in rows)
    assert responses(name, files, tmp_path, batch=2)[0] == [
        {**row, "entropy": pytest.approx(row["entropy"], abs=1e-5)} for row in rows
    ]


CHAT = "{% for each in messages %}{{ each['content'] }} {% endfor %}{% if add_generation_prompt %}> {% endif %}"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped policy with a chat template: what is said, and the `>` before an answer."""
    folder = tmp_path_factory.mktemp("chat")
    model, tokenizer = load_policy()
    tokenizer.chat_template = CHAT
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return folder


def asked_in_a_file(folder: Path, prompts: list) -> str:
    file = folder / "problems.jsonl"
    file.write_text("".join(json.dumps({"prompt": each, "answer": "7"}) + "\n" for each in prompts))
    return str(file)


def test_messages_go_through_the_chat_template(chat_model: Path, tmp_path: Path):
    spoken = [{"role": "system", "content": "2 3 5 : 20"}, {"role": "user", "content": "! 1 2 4"}]
    options = {"model_name_or_path": str(chat_model), "samples": 4, "max_new_tokens": 6, "output_dir": str(tmp_path)}

    def said(prompts: list, **more) -> list[str]:
        run(GenerateArguments(task=asked_in_a_file(tmp_path, prompts), **options, **more))
        rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
        assert [row["prompt"] for row in rows] == [prompt for prompt in prompts for _ in range(4)]
        return [row["response"] for row in rows]

    plain = said(["2 3 5 : 20 ! 1 2 4 >"])
    assert said([spoken]) == plain != said(["2 3 5 : 20 ! 1 2 4"])
    assert said(["2 3 5 : 20 ! 1 2 4"], chat=True) == plain
    # beside messages, text is what the user says, as in hclm-rl eval
    assert said([spoken, "2 3 5 : 20 ! 1 2 4"])[:4] == plain


def test_a_template_of_a_method_is_put_around_what_is_said_last():
    assert within("Short: {prompt}", "2 + 2") == "Short: 2 + 2"
    spoken = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2"}]
    assert within("Short: {prompt}", spoken) == [spoken[0], {"role": "user", "content": "Short: 2 + 2"}]
    assert spoken[1]["content"] == "2 + 2"


def test_messages_that_no_template_takes_are_a_sentence(chat_model: Path, tmp_path: Path, capsys):
    line = ["generate", "--task", asked_in_a_file(tmp_path, [[{"role": "user", "content": "1 2"}]])]
    line += ["--output_dir", str(tmp_path), "--model_name_or_path"]
    assert cli.main([*line, "testbed"]) == 2
    assert "has no chat template, which messages and `chat: true` need" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    shutil.copytree(chat_model, tmp_path / "refuses")
    tokenizer.save_pretrained(tmp_path / "refuses")
    assert cli.main([*line, str(tmp_path / "refuses")]) == 2
    assert "the chat template refuses the prompt [{'role': 'user'" in (err := capsys.readouterr().err)
    assert "no such role" in err and "Traceback" not in err


def test_temperature_0_takes_the_likeliest_word(tmp_path: Path):
    line = ["generate", "--config", str(RECIPES["plain_generate"]), "--output_dir", str(tmp_path), "--problems", "1"]
    assert cli.main([*line, "--samples", "3", "--max_new_tokens", "4", "--temperature", "0"]) == 0
    rows = [json.loads(row) for row in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert len({row["response"] for row in rows}) == 1


def vectors(folder: Path) -> dict[str, str]:
    """Files that are no vector of the shipped policy, whose states have 64 numbers."""
    save_file({"vector": torch.zeros(8)}, folder / "short")
    save_file({"vector": torch.zeros(2, 64)}, folder / "two")
    save_file({"vector": torch.full((64,), math.nan)}, folder / "nan")
    (folder / "text").write_text("no such file")
    return {
        "short": "must have 64 finite numbers, as the states of this model, got shape (8,)",
        "two": "must have 64 finite numbers, as the states of this model, got shape (2, 64)",
        "nan": "got shape (64,) with some that are not finite",
        "text": "is no safetensors file",
    }


def test_a_file_of_another_model_is_a_sentence(files: dict[str, str], tmp_path: Path, capsys):
    line = ["generate", "--config", str(RECIPES["plain_generate"]), "--problems", "1", "--output_dir", str(tmp_path)]
    for name, sentence in vectors(tmp_path).items():
        given = json.dumps({"activation_steering": {"vector": str(tmp_path / name)}})
        assert cli.main([*line, "--decoding", given]) == 2
        assert sentence in (err := capsys.readouterr().err) and "Traceback" not in err
    # a temperature that the kinds' own would pass over in silence
    adapt = {"diff_adapt": {"probe": files["probe"], "correct_below": 0.1, "entropy_above": 0.2}}
    assert cli.main([*line, "--decoding", json.dumps(adapt), "--temperature", "0.5"]) == 2
    assert "diff_adapt takes the temperature of each question by its kind, got 0.5" in capsys.readouterr().err


def test_the_summary_is_that_of_its_rows():
    rows = [
        {"number": 0, "is_right": True, "entropy": 0.5, "tokens": 2, "is_truncated": False},
        {"number": 0, "is_right": False, "entropy": 1.0, "tokens": 6, "is_truncated": True},
    ]
    # pass@2 of one right among two is 1; (0.5 * 2 + 1 * 6) / 8
    assert summary_of(rows, 2) == {
        "pass@1": 0.5,
        "pass@2": 1.0,
        "token_entropy": 0.875,
        "length": 4.0,
        "truncated": 0.5,
    }


def test_a_kind_may_have_a_template_over_the_papers_budget():
    found = adapted({"correct_below": 0.1, "entropy_above": 0.2, "easy": {"template": "Short: {prompt}"}})
    assert (found.easy.template, found.easy.temperature, found.easy.share) == ("Short: {prompt}", 0.5, 0.4)
    with pytest.raises(ValueError, match=r"diff_adapt: hard has no hyper-parameter 'shares'"):
        adapted({"correct_below": 0.1, "entropy_above": 0.2, "hard": {"shares": 0.1}})


@pytest.mark.parametrize(
    "line, sentence",
    [
        (["--decoding", "eminf"], "decoding: unknown name 'eminf'; it must be one of activation_steering,"),
        (["--decoding", '{"edt": {"theta": -1}}'], "edt: theta must be at least 0 and finite, got -1.0"),
        (["--decoding", '{"edt": {"tau": 1}}'], "edt has no hyper-parameter 'tau'"),
        (["--decoding", "stable_entropy"], "stable_entropy needs mean, deviation; got nothing"),
        (["--decoding", "model_switching"], "model_switching needs large, the folder or name of the large model"),
        (
            ["--decoding", '{"diff_adapt": {"probe": "none", "correct_below": 0.1, "entropy_above": 0.2}}'],
            "no probe at",
        ),
        (["--decoding", '{"activation_steering": {"vector": "none"}}'], "no vector at 'none'"),
        (["--decoding", "power_sampling", "--temperature", "0.5"], "power_sampling needs temperature 1, got 0.5"),
        (["--samples", "0"], "samples must be at least 1, got 0"),
        (["--task", "coin"], "no task 'coin'"),
        (["--decodng", "edt"], "unknown key 'decodng' on the command line"),
    ],
)
def test_a_mistake_is_one_sentence(line: list[str], sentence: str, capsys: pytest.CaptureFixture):
    assert cli.main(["generate", "--config", str(RECIPES["plain_generate"]), *line]) == 2
    err = capsys.readouterr().err
    assert sentence in err and "hclm-rl generate: " in err and "Traceback" not in err
