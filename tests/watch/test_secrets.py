"""Tokens and keys are found wherever a recipe or a command line may hold them."""

import pytest

from hclm_rl.watch.secrets import HIDDEN, hide, hide_in_line, hide_in_yaml, is_secret, secrets_in

RECIPE = """\
# the token hf_abcdefg is mine
hub_token: hf_abcdefg  # keep
run_name: of-hf_abcdefg
env:
  WANDB_API_KEY: "k1234567"
  N: 3
entropy_terms:
  - forking_tokens: {share: 0.2}
  - my.Judge: {api_key: zzzzzzzz, ratio: 0.1}
model_init_kwargs:
  token: |
    over
    two lines
seed: 1
"""


def test_a_recipe_keeps_all_but_its_secrets():
    assert hide_in_yaml(RECIPE) == (
        "# the token <hidden> is mine\nhub_token: <hidden>  # keep\nrun_name: of-<hidden>\n"
        "env:\n  WANDB_API_KEY: <hidden>\n  N: <hidden>\n"
        "entropy_terms:\n  - forking_tokens: {share: 0.2}\n  - my.Judge: {api_key: <hidden>, ratio: 0.1}\n"
        "model_init_kwargs:\n  token: <hidden>\nseed: 1\n"
    )


def test_a_recipe_that_cannot_be_read_is_not_shown():
    assert "hf_abcdefg" not in hide_in_yaml(RECIPE + "beta: {")


def test_a_recipe_without_secrets_stays_as_it_is():
    text = "# what it is\ntask: coins\nentropy_terms: [&a {kl_cov: {}}, *a]\nhub_token:\n"
    assert hide_in_yaml(text) == text


@pytest.mark.parametrize(
    ("line", "hidden"),
    [
        (["--hub_token", "hf_abcdefg", "--seed", "3"], ["--hub_token", HIDDEN, "--seed", "3"]),
        (["--hub-token=hf_abcdefg"], [f"--hub-token={HIDDEN}"]),
        (["--hub_token", "ab", "--run_name", "abba"], ["--hub_token", HIDDEN, "--run_name", "abba"]),  # ab: too short
        (
            ["--model_init_kwargs", '{"token": "hf_abcdefg", "a": 1}', "--run_name", "x-hf_abcdefg"],
            ["--model_init_kwargs", '{"token": "<hidden>", "a": 1}', "--run_name", "x-<hidden>"],
        ),
        (['--task_kwargs={"api_key": "k"}'], ['--task_kwargs={"api_key": "<hidden>"}']),
        (["--seed", "1"], ["--seed", "1"]),
    ],
)
def test_a_command_line_likewise(line: list[str], hidden: list[str]):
    assert hide_in_line(line) == hidden


def test_values_of_a_summary():
    given = {"terms": [{"my.Judge": {"api_key": "k", "n": 1}}], "env": {"A": {"B": 2}}, "hub_token": None, "tokens": 3}
    hidden = {"terms": [{"my.Judge": {"api_key": HIDDEN, "n": 1}}], "env": {"A": {"B": HIDDEN}}}
    assert hide(given) == {**hidden, "hub_token": None, "tokens": 3}
    assert list(secrets_in(given)) == ["k", "2"]
    assert not is_secret("forking_tokens") and not is_secret("num_tokens") and is_secret("WANDB_API_KEY")
