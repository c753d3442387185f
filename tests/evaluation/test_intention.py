"""The state before the first token: the card's numbers, what padding must not change, and a probe that can fail."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize

from hclm_rl.evaluation.intention import (
    Intention,
    auroc,
    default_layers,
    effective_dimension,
    eigenvalues,
    fit_probe,
    intention_entropy,
    intentions,
    option_entropy,
    recoverability,
    variance_dimension,
)
from hclm_rl.testbed.policy import load_policy

X = torch.tensor([[1.0, 2, 0], [3, 1, 1], [2, 4, 0], [6, 5, 1]])
Y = torch.tensor([[0.0, 1], [1, 0], [2, 1], [1, 2]])
LOGITS = torch.tensor([[2.0, 1, 0, -1, -3]])
PROMPTS = ["9 4 8 : 29 ! 8 9 20 >", "3 4 5 : 36 >", "7 3 5 : 35 ! 4 5 7 >"]  # the second is shorter


def test_worked_example_of_the_card():
    assert intention_entropy(LOGITS).item() == pytest.approx(1.401252, abs=1e-6)
    assert intention_entropy(LOGITS, top_k=3).item() == pytest.approx(1.200893, abs=1e-6)
    entropy, mass = option_entropy(LOGITS, torch.tensor([0, 1, 2]))
    assert (entropy.item(), mass.item()) == pytest.approx((1.200893, 0.963760), abs=1e-6)
    assert eigenvalues(X).tolist() == pytest.approx([6.530774, 1.799407, 0.003152], abs=1e-6)
    overall, each = effective_dimension({3: X, 7: Y})
    assert each == pytest.approx({3: 1.513317, 7: 2.0}, abs=1e-6)
    assert eigenvalues(X).sum().item() == pytest.approx(8.333333, abs=1e-6)
    assert eigenvalues(Y).sum().item() == pytest.approx(1.333333, abs=1e-6)
    assert overall == pytest.approx(1.580446, abs=1e-6)
    assert variance_dimension(X) == 2
    scores, labels = torch.tensor([0.9, 0.4, 0.35, 0.8, 0.1]), torch.tensor([1, 0, 1, 1, 0]).bool()
    assert auroc(scores, labels) == pytest.approx(0.833333, abs=1e-6)


def test_words_that_are_ruled_out_and_a_certain_token():
    assert intention_entropy(torch.tensor([[0.0, 0.0, -math.inf]])).item() == pytest.approx(1.0)  # one bit
    assert intention_entropy(torch.tensor([[50.0, -math.inf]])).item() == 0.0


def test_dimension_from_the_gram_matrix_when_there_are_fewer_prompts_than_widths():
    z = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).double()
    centred = z - z.mean(dim=0)
    gram = centred @ centred.T  # d_eff = tr(K)^2 / ||K||_F^2
    _, each = effective_dimension({1: z})
    assert each[1] == pytest.approx((gram.trace() ** 2 / gram.square().sum()).item())
    assert each[1] <= 5
    assert effective_dimension({1: torch.ones(4, 3)})[0] == 0.0  # one point: no dimension, no NaN
    with pytest.raises(ValueError, match="at least 2 prompts, got 1"):
        eigenvalues(torch.ones(1, 3))


def test_auroc_counts_pairs_and_ties_as_half():
    draw = np.random.default_rng(0)
    scores, labels = draw.integers(0, 4, 30), draw.random(30) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    assert auroc(torch.tensor(scores), torch.tensor(labels)) == pytest.approx(np.mean(pairs))
    assert auroc(torch.zeros(4), torch.tensor([True, False, True, False])) == 0.5  # the constant score
    assert math.isnan(auroc(torch.zeros(2), torch.tensor([True, True])))


@pytest.mark.parametrize(("rows", "width"), [(40, 5), (12, 30)])  # the second is solved in the span of the rows
@pytest.mark.parametrize("strength", [1e-4, 1.0, 100.0])
def test_the_probe_is_the_minimum_that_scipy_finds(rows: int, width: int, strength: float):
    draw = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=draw).double()
    labels = torch.rand(rows, generator=draw) < 0.4
    sign = 2 * labels.double().numpy() - 1

    def objective(theta: np.ndarray) -> float:
        margins = sign * (x.numpy() @ theta[:-1] + theta[-1])
        return 0.5 * theta[:-1] @ theta[:-1] + strength * np.logaddexp(0, -margins).sum()

    probe = fit_probe(x, labels, strength)
    ours = objective(np.append(probe.weight.numpy(), probe.bias.item()))
    found = optimize.minimize(objective, np.zeros(width + 1), method="BFGS", options={"gtol": 1e-9})
    assert ours <= found.fun + 1e-8 * (1 + found.fun)


def test_what_the_states_know_is_recovered_and_shuffled_labels_are_not():
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(600, 8, generator=draw)
    # AUROC of x in P(right) = [x + noise > 0] is that of a correlation of 1 / sqrt(1 + 0.25)
    labels = z[:, 0] + 0.5 * torch.randn(600, generator=draw) > 0
    found = recoverability({1: z[:, :4], 2: 5 + 100 * z[:, 4:]}, labels)
    assert found.prompts == (360, 120, 120)
    assert found.auroc > 0.88 and 0.8 < found.low < found.auroc < found.high <= 1
    assert 0.3 < found.shuffled < 0.7
    nothing = recoverability({1: z[:, 1:]}, labels)
    assert 0.35 < nothing.auroc < 0.65 and nothing.low < 0.5 < nothing.high
    assert recoverability({1: z[:, 1:]}, labels) == nothing  # the same seed, the same split and draws


def test_recoverability_of_one_kind_of_label_is_not_a_number():
    found = recoverability({1: torch.randn(20, 3, generator=torch.Generator().manual_seed(0))}, torch.ones(20).bool())
    assert math.isnan(found.auroc) and math.isnan(found.low) and math.isnan(found.shuffled)
    with pytest.raises(ValueError, match="right and wrong labels, got 3 of one kind"):
        fit_probe(torch.ones(3, 2), torch.zeros(3).bool(), 1.0)
    with pytest.raises(ValueError, match="at least 10 prompts and a label each, got 9 and 9"):
        recoverability({1: torch.ones(9, 3)}, torch.ones(9).bool())


@pytest.mark.parametrize("side", ["left", "right"])
def test_states_of_a_batch_are_those_of_each_prompt_alone(side: str):
    model, tokenizer = load_policy()
    model.train()
    tokenizer.padding_side = side
    found = intentions(model, tokenizer, PROMPTS, layers=[1, 2], batch=2)
    assert model.training and found.logits.shape == (3, 46)
    model.eval()
    for i, prompt in enumerate(PROMPTS):
        out = model(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False), output_hidden_states=True)
        torch.testing.assert_close(found.logits[i], out.logits[0, -1].detach(), rtol=1e-4, atol=1e-4)
        for layer in (1, 2):
            alone = out.hidden_states[layer][0, -1].detach()
            torch.testing.assert_close(found.states[layer][i], alone, rtol=1e-4, atol=1e-4)


def test_layers_and_their_default():
    model, tokenizer = load_policy()  # two blocks: two thirds of 2 is 1
    assert default_layers(model) == (1, 2)
    assert isinstance(found := intentions(model, tokenizer, PROMPTS[:1]), Intention) and list(found.states) == [1, 2]
    with pytest.raises(ValueError, match=r"layers must be in \[1, 2\], got \[0, 3\]"):
        intentions(model, tokenizer, PROMPTS, layers=[0, 3])
    with pytest.raises(ValueError, match="at least one prompt"):
        intentions(model, tokenizer, [])


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "eval" / "intention.py"
    spec = importlib.util.spec_from_file_location("eval_intention", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_task_gives_prompts_and_labels(script, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "out.json"
    kwargs = '{"prompts": 1, "eval_prompts": 24}'
    assert script.main(["--task", "coins", "--task_kwargs", kwargs, "--samples", "8", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["testbed"]
    assert "24 prompts" in capsys.readouterr().out
    assert 0 < found["entropy"] < math.log2(3) + 0.5  # one of three coins
    assert found["recoverability"]["prompts"] == [14, 5, 5] and 0 < found["right"] < 1


def test_a_file_of_prompts_without_labels_gets_no_probe(script, tmp_path: Path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    assert script.main(["--prompts", str(file), "--layers", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["testbed"]
    assert list(found["layers"]) == ["2"] and "recoverability" not in found


def test_labels_are_true_or_false_in_every_line_or_in_none(script, tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a\u2028b", "right": True}, {"prompt": "c", "right": False}]
    file.write_bytes(b"\xef\xbb\xbf" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    prompts, labels = script.read_prompts(file)
    assert prompts == ["a\u2028b", "c"] and labels.tolist() == [True, False]
    for bad in ({"right": "false"}, {}):
        file.write_text("\n".join(json.dumps(row) for row in [rows[0], {"prompt": "c"} | bad]))
        with pytest.raises(SystemExit, match='"right" must be true or false, in every line or in none'):
            script.read_prompts(file)
