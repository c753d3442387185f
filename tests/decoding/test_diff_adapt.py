"""DiffAdapt: the rule of the labels, a probe that learns what can be learnt, the file it is kept in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hclm_rl.decoding.diff_adapt import DiffAdapt, Probe, Strategy, fit_probe, load_probe, save_probe

SETTINGS = DiffAdapt(correct_below=0.3, entropy_above=0.5)


@pytest.mark.parametrize(
    "correct, entropy, kind",
    [(0.9, 0.8, "easy"), (0.9, 0.2, "normal"), (0.1, 0.8, "hard"), (0.1, 0.2, "hard"), (0.3, 0.5, "normal")],
)
def test_the_label_of_a_question(correct: float, entropy: float, kind: str):
    assert SETTINGS.label(correct, entropy) == kind


def test_the_budgets_are_the_papers():
    found = {kind: SETTINGS.strategy(kind) for kind in ("easy", "normal", "hard")}
    assert {kind: (each.temperature, each.share) for kind, each in found.items()} == {
        "easy": (0.5, 0.4),
        "normal": (0.8, 1.0),
        "hard": (0.4, 0.5),
    }


def test_a_probe_tells_three_clouds_apart_and_comes_back_from_its_file(tmp_path: Path):
    source = torch.Generator().manual_seed(0)
    centres = torch.tensor([[3.0, 0.0], [0.0, 3.0], [-3.0, -3.0]])
    kinds = ["easy", "normal", "hard"] * 40
    states = 100 + centres.repeat(40, 1) + 0.5 * torch.randn(120, 2, generator=source)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    probe = fit_probe(states[:60], kinds[:60], steps=100)
    assert torch.equal(torch.random.get_rng_state(), before)
    # six deviations apart: not one of the others in sixty is on a wrong side
    assert probe.kinds(states[60:]) == kinds[60:]
    save_probe(probe, tmp_path / "probe.safetensors")
    assert torch.equal(load_probe(tmp_path / "probe.safetensors")(states), probe(states))


def test_what_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"correct_below must be in \[0, 1\], got 2\.0"):
        DiffAdapt(correct_below=2.0, entropy_above=0.5)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0\.0"):
        Strategy(share=0.0)
    with pytest.raises(ValueError, match=r"template must hold \{prompt\}, got 'Answer\.'"):
        Strategy(template="Answer.")
    with pytest.raises(ValueError, match=r"a probe needs one state a question and at least one, got 2 and 1"):
        fit_probe(torch.zeros(2, 3), ["easy"])
    with pytest.raises(ValueError, match=r"no probe at '.*none': fit one first"):
        load_probe(tmp_path / "none")
    save_file({"u": torch.zeros(2)}, tmp_path / "vector")
    with pytest.raises(ValueError, match=r"'.*vector' is no probe: it has u"):
        load_probe(tmp_path / "vector")
    (tmp_path / "text").write_text("no such file")
    with pytest.raises(ValueError, match=r"'.*text' is no probe: "):
        load_probe(tmp_path / "text")
    with pytest.raises(ValueError, match=r"the probe reads states of 8 numbers, and this model's have 16: fit one for"):
        Probe(8).kinds(torch.zeros(1, 16))
