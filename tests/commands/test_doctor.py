"""What the doctor says of recipes whose state is known by construction."""

import json
from pathlib import Path

import pytest
import torch

from hclm_rl import build_chain
from hclm_rl.chain.coefficients import coefficient_from
from hclm_rl.commands.cli import main
from hclm_rl.commands.diagnosis import Force
from hclm_rl.commands.doctor import examine
from hclm_rl.commands.mistakes import chain_mistakes, greatest_coef, target_mistakes, token_mistakes
from hclm_rl.commands.page import sentences
from hclm_rl.recipe.arguments import parse

RECIPE = """\
task: coins
task_kwargs: {prompts: 16}
model_name_or_path: testbed
num_generations: 8
per_device_train_batch_size: 32
bf16: false
gradient_checkpointing: false
use_cpu: true
"""


def recipe(folder: Path, terms: str = "[]", more: str = "") -> list[str]:
    file = folder / "recipe.yaml"
    file.write_text(f"{RECIPE}entropy_terms: {terms}\n{more}")
    return ["--config", str(file)]


def of(forces: list[Force], surrogate: str) -> Force:
    [found] = [force for force in forces if force.surrogate == surrogate]
    return found


def test_every_surrogate_and_the_regimes_of_those_in_the_recipe(tmp_path: Path):
    terms = """
  - log_det: {coef: 1.0e-2}
  - variance: {coef: 1.0e-9}
  - coding_rate: {coef: 0.1}"""
    state = torch.get_rng_state()
    found = examine(recipe(tmp_path, terms), prompts=4, steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [force.surrogate for force in found.forces] == [
        "log_det", "diagonal", "variance", "feature_softmax", "coding_rate", "von_neumann",
    ]  # fmt: skip
    strong = of(found.forces, "log_det")  # this one destroys the policy: docs/log.md
    assert strong.regime == "dominant" and strong.coef == 1e-2
    weak = of(found.forces, "variance")
    assert weak.regime == "weak" and weak.is_in_recipe and "variance is weak" in found.verdict
    for force in found.forces:
        # the advice is neither weak nor dominant itself
        if force.recommended_coef is not None and force.regime != "dead":
            assert 1e-2 < force.recommended_coef * force.push / force.gradient <= 0.3
        assert 0 <= force.rho <= 1 and 0 < force.live <= 1
    assert not of(found.forces, "diagonal").is_in_recipe
    assert found.entropy == pytest.approx(0.44, abs=0.1)  # of the warm start, docs/log.md
    assert found.width == 64 and found.mistakes == [] and found.cut_off < 0.1


def test_a_floor_above_all_variances_makes_the_log_det_the_variance(tmp_path: Path):
    found = examine(recipe(tmp_path, "[{log_det: {coef: 1.0, eps_relative: 1000000.0}}]"), prompts=4, steps=2)
    force, variance = of(found.forces, "log_det"), of(found.forces, "variance")
    assert force.live < 1e-4 and force.above_eps == 0.0
    # alive, with the direction of the variance: the step at which it stands still is the same but for the units
    assert force.push > 0 and force.regime != "dead"
    assert force.alignment == pytest.approx(variance.alignment, abs=0.02)
    assert any("acts as the variance does" in told for told in sentences(force))


@pytest.mark.parametrize(
    ("terms", "more", "sentence"),
    [
        ("[kl_cov]", "", "kl_cov does nothing when each rollout is used for one update"),
        ("[{entropy_bonus: {coef: 0.0}}]", "", "entropy_bonus has coef 0 throughout"),
        ("[clip_cov]", "", "clip_cov selects 0.0002 of about"),
        ("[{entropy_bonus: {coef: {kind: step_to_target, target: 3.0}}}]", "", "steers towards 3 nats"),
        ("[log_det]", "per_device_train_batch_size: 8\n", "over about"),
        ("[log_dat]", "", "log_dat"),
        ("[entropy_advantage, tool_bonus]", "", "put 'tool_bonus' before 'entropy_advantage'"),
        ("[{kl_cov: {ratio: 0.2}}]", "num_iterations: 2\n", "'kl_cov': ratio 0.2 is a fraction: it pulls 20 % of all"),
        ("[]", "steps_per_generation: 8\n", "the data has 16 prompts and a generation batch takes 32"),
        ("[]", "max_completion_length: 3\n", "all responses of the dry run were cut off at max_completion_length 3"),
        ("[entropy_bonus]", "entropy_coef: 0.1\n", "TRL's entropy_coef beside entropy_terms"),
    ],
)
def test_mistakes_of_the_recipe(tmp_path: Path, terms: str, more: str, sentence: str):
    settings = recipe(tmp_path, terms)
    text = (tmp_path / "recipe.yaml").read_text()
    if more:
        key = more.split(":")[0]
        text = "".join(line + "\n" for line in text.splitlines() if not line.startswith(key)) + more
        (tmp_path / "recipe.yaml").write_text(text)
    found = examine(settings, prompts=1, steps=1)
    assert any(sentence in mistake for mistake in found.mistakes), found.mistakes
    assert all("\n" not in mistake for mistake in found.mistakes)


@pytest.mark.parametrize("shaper", ["pear", "empg"])
def test_links_that_work_against_each_other(tmp_path: Path, shaper: str):
    _, config, _, _ = parse("grpo", recipe(tmp_path, f"[{shaper}, entropy_bonus]"))
    assert chain_mistakes(build_chain(config.entropy_terms), config) == [
        f"'{shaper}' lowers the entropy of the policy and 'entropy_bonus' raises it: they work against each other; "
        "keep one of the two"
    ]
    _, config, _, _ = parse("grpo", recipe(tmp_path, f"[{shaper}, {{entropy_bonus: {{coef: -0.01}}}}]"))
    assert chain_mistakes(build_chain(config.entropy_terms), config) == []


def test_the_page_and_json(tmp_path: Path, capsys: pytest.CaptureFixture):
    line = [*recipe(tmp_path, "[{log_det: {coef: 1.0e-3}}]"), "--prompts", "2", "--steps", "1"]
    code = main(["doctor", *line, "--try"])
    page = " ".join(capsys.readouterr().out.split())
    assert "von_neumann" in page and "{'loss'" not in page and "The step tried out, and put back" in page
    assert main(["doctor", *line, "--json", "--max_completion_length", "9"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["forces"][0]["surrogate"] == "log_det" and ("nothing to object to" in told["verdict"]) == (code == 0)


def test_the_exit_code_of_a_sick_recipe(tmp_path: Path, capsys: pytest.CaptureFixture):
    line = recipe(tmp_path, "[no_such_term]")
    for written in (line, ["=".join(line)]):
        assert main(["doctor", *written]) == 1
        assert "unknown entropy term 'no_such_term'" in " ".join(capsys.readouterr().out.split())
    assert main(["doctor", "--steps", "0"]) == 2
    assert "--steps must be at least 1" in capsys.readouterr().err


def test_each_term_is_judged_by_its_own_surrogate(tmp_path: Path):
    terms = """
  - variance: {form: diagonal, coef: 0.01}
  - coding_rate: {coef: 0.1}
  - log_det: {coef: 0.25}
  - log_det: {name: more, coef: 0.5}"""
    found = examine(recipe(tmp_path, terms), prompts=2, steps=1)
    own = {force.surrogate: force.coef for force in found.forces if force.is_in_recipe}
    assert own == {"diagonal": 0.01, "log_det": 0.75}
    [note] = [note for note in found.notes if "coding_rate" in note]
    assert note.startswith("coding_rate: the row below is that of the tokens' states at a distortion of 0.5, not of")
    tokens = recipe(tmp_path, "[{coding_rate: {coef: 0.1, rows: tokens}}]")
    assert of(examine(tokens, prompts=2, steps=1).forces, "coding_rate").is_in_recipe


def test_statistics_are_counted_where_they_are_taken():
    terms = ["feature_softmax", "coding_rate", {"information_force": {"surrogate": "feature_softmax"}}]
    assert token_mistakes(build_chain(terms), tokens=10, responses=2, width=64) == []  # row by row, or with a floor
    chain = build_chain(["log_det", {"spectrum": {"rows": "last"}}])
    [of_tokens, of_responses] = token_mistakes(chain, tokens=255, responses=16, width=64)
    assert of_tokens.startswith("log_det takes a covariance of width 64 over about 255 tokens a rollout")
    assert of_responses.startswith("spectrum takes a covariance of width 64 over about 16 responses a rollout")
    assert token_mistakes(chain, tokens=256, responses=256, width=64) == []


def test_tokens_of_a_rollout_for_several_updates(tmp_path: Path):
    # 8 responses an update of some 15 tokens, 4 updates a rollout: 480 tokens for a width of 64
    more = "steps_per_generation: 4\n"
    line = recipe(tmp_path, "[log_det]", more)
    assert examine([*line, "--per_device_train_batch_size", "8"], prompts=1, steps=1).mistakes == []


@pytest.mark.parametrize(
    "more",
    [
        "use_adaptive_entropy: true\n",
        "entropy_coef: 0.01\n",
        "generation_batch_size: 64\n",
        "eval_on_start: true\neval_strategy: steps\neval_steps: 1\n",
        "load_best_model_at_end: true\neval_strategy: steps\nsave_strategy: steps\n",
        "logging_strategy: epoch\n",
        "push_to_hub: true\n",
        "log_completions: true\nlog_completions_hub_repo: nobody/nothing\n",
        "lr_scheduler_type: polynomial\n",
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1.0e-7}\n",
        "lr_scheduler_type: reduce_lr_on_plateau\neval_strategy: steps\neval_steps: 5\n",
    ],
)
def test_valid_recipes_are_examined_and_nothing_leaves_the_machine(
    more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_hub(*_: object, **__: object) -> None:
        raise AssertionError("the doctor asked the Hub for a repository")

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", no_hub)
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_repo", no_hub)
    found = examine(recipe(tmp_path, more=more), prompts=1, steps=1)
    assert found.mistakes == [] and len(found.forces) == 6


@pytest.mark.parametrize("target", [1, 0.5])
def test_a_target_above_the_start(target: float):
    chain = build_chain([{"entropy_bonus": {"coef": {"kind": "step_to_target", "target": target}}}])
    assert target_mistakes(chain, entropy=0.4) == [
        f"entropy_bonus steers towards {target:g} nats and the policy starts at 0.4: it pushes from the first step"
    ]
    assert target_mistakes(chain, entropy=1.1) == []


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"floor": 1.5}, "the entropy above its floor of 0.6 nats and the policy starts at 0.4"),
        ({"floor": 0.5, "unit": "nats"}, "the entropy above its floor of 0.5 nats and the policy starts at 0.4"),
        ({"ceiling": 0.75}, "the entropy below its ceiling of 0.3 nats and the policy starts at 0.4"),
        (
            {"by": "representation", "unit": "nats", "floor": 1, "ceiling": 5},
            "the change of the log-det above its floor of 1 nats and the policy starts at 0",
        ),
        ({"floor": 0.3, "unit": "nats"}, None),
        ({"by": "representation", "unit": "nats", "floor": 0, "ceiling": 5}, None),
        ({}, None),
    ],
)
def test_a_band_that_the_start_lies_outside(settings: dict, sentence: str | None):
    chain = build_chain([{"force_reweight": settings}])
    expected = [] if sentence is None else [f"force_reweight holds {sentence}: it pushes from the first step"]
    assert target_mistakes(chain, entropy=0.4) == expected


def test_the_strongest_that_a_coefficient_gets():
    for spec, expected in (
        (0.3, 0.3),
        ({"kind": "on_collapse", "active": 0.0, "idle": 0.01}, 0.01),
        ({"kind": "proportional_integral", "maximum": 0.0}, -1.0),
        ({"kind": "proportional_integral"}, 1.0),
        ({"kind": "linear", "start": 0.0, "end": -0.2}, -0.2),
    ):
        assert greatest_coef(coefficient_from(spec)) == expected


def test_what_is_all_cut_off_and_masked_trains_nothing_and_is_no_clean_bill(tmp_path: Path, capsys):
    line = recipe(tmp_path, more="max_completion_length: 3\nmask_truncated_completions: true\n")
    assert main(["doctor", *line, "--prompts", "2", "--steps", "1"]) == 1
    page = " ".join(capsys.readouterr().out.split())
    assert "no force could be measured; 1 mistake in the recipe" in page
    assert "mask_truncated_completions leaves them out: nothing is trained: raise max_completion_length" in page


def test_a_recipe_of_fewer_prompts_than_the_dry_run_takes_is_examined(tmp_path: Path):
    line = recipe(tmp_path, more="")
    found = examine([*line, "--task_kwargs", '{"prompts": 4}'], prompts=8, steps=1)
    assert found.mistakes == [] and found.forces


def test_flags_of_the_doctor_are_written_whole(tmp_path: Path, capsys):
    assert main(["doctor", *recipe(tmp_path), "--step", "1"]) == 1
    assert "unknown key 'step' on the command line" in " ".join(capsys.readouterr().out.split())


def test_a_disk_that_fills_up_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hclm_rl.commands.doctor.read_from", full)
    found = examine(recipe(tmp_path), prompts=1, steps=1)
    assert len(found.mistakes) == 1 and "No space left on device" in found.mistakes[0]
