"""What links remember survives a checkpoint bit for bit."""

import json
import math
import struct

import pytest
import torch
from safetensors.torch import save_file

from hclm_rl import Chain, Constant, Link, StepToTarget
from hclm_rl.chain.state import FILE_NAME, ChainState
from hclm_rl.terms.entropy_bonus import EntropyBonus
from hclm_rl.terms.qae import Qae

CHAIN = Chain(
    (
        Link(name="bonus", term=EntropyBonus(), coef=StepToTarget(target=0.2)),
        Link(name="qae", term=Qae(), coef=Constant(coefficient=1.0)),
    )
)
CPU = torch.device("cpu")


def test_a_fresh_state_has_a_place_for_every_link():
    state = ChainState.fresh(CHAIN)
    assert state.memory == {"bonus": {}, "qae": {}} and state.idle_steps == {"bonus": 0, "qae": 0}
    assert state.controller == {"bonus": {"coefficient": 0.0, "last_entropy": math.inf}, "qae": {}}


def test_a_fresh_state_survives_with_its_infinity(tmp_path):
    ChainState.fresh(CHAIN).save(tmp_path)
    assert ChainState.load(tmp_path, CHAIN, CPU) == ChainState.fresh(CHAIN)


def test_numbers_and_tensors_come_back_bit_for_bit(tmp_path):
    state = ChainState.fresh(CHAIN)
    numbers = [0.1, 1 / 3, 5e-324, -0.0, 1.7976931348623157e308, math.inf, -math.inf]
    whole = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    tensors = {
        "plain": whole,
        "a slice of it": whole[1:],  # shares its storage
        "transposed": whole.T,
        "scalar": torch.tensor(math.pi, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "special": torch.tensor([math.nan, math.inf, -0.0]),
        "half": whole.bfloat16(),
        "counts": torch.arange(5),
        "mask": whole > 0,
        "a/b": whole * 2,  # a key may hold the separator
    }
    state.memory["qae"] |= {"numbers": numbers, "text": "è", "nested": {"a": [1, 2]}, "none": None, **tensors}
    state.controller["bonus"] = {"coefficient": 0.015000000000000001, "last_entropy": 0.3}
    state.idle_steps["qae"] = 49
    state.save(tmp_path)
    loaded = ChainState.load(tmp_path, CHAIN, CPU)
    assert loaded.controller == state.controller and loaded.idle_steps == state.idle_steps
    memory = loaded.memory["qae"]
    assert loaded.memory["bonus"] == {} and memory.keys() == state.memory["qae"].keys()
    assert [struct.pack("d", x) for x in memory["numbers"]] == [struct.pack("d", x) for x in numbers]
    assert (memory["text"], memory["nested"], memory["none"]) == ("è", {"a": [1, 2]}, None)
    for key, tensor in tensors.items():
        assert memory[key].dtype == tensor.dtype and memory[key].shape == tensor.shape
        assert (
            memory[key].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8))
            if tensor.dim()
            else (memory[key].item() == tensor.item())
        )


def test_saving_leaves_the_state_as_it_was(tmp_path):
    state, tensor = ChainState.fresh(CHAIN), torch.ones(2, requires_grad=True)
    state.memory["qae"]["anchor"] = tensor
    state.save(tmp_path)
    assert state.memory["qae"]["anchor"] is tensor
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_other_links_are_refused(tmp_path):
    ChainState.fresh(CHAIN).save(tmp_path)
    other = Chain((Link(name="bonus", term=EntropyBonus(), coef=Constant(coefficient=1.0)),))
    with pytest.raises(ValueError) as error:
        ChainState.load(tmp_path, other, CPU)
    assert str(error.value) == (
        f"{tmp_path} was written with the entropy terms ['bonus', 'qae'], this run has ['bonus']; resume with the same "
        "terms, or start a new run from the checkpoint's weights, or set allow_changed_terms (on the command line "
        "--allow_changed_terms) to go on all the same"
    )
    reordered = Chain(CHAIN.links[::-1])
    assert ChainState.load(tmp_path, reordered, CPU).memory == {"bonus": {}, "qae": {}}


def test_the_state_of_another_coef_is_refused(tmp_path):
    constant = Chain((Link(name="bonus", term=EntropyBonus(), coef=Constant(coefficient=0.1)), CHAIN.links[1]))
    ChainState.fresh(constant).save(tmp_path)
    with pytest.raises(ValueError, match="the state of another coef for 'bonus': it has nothing, this run needs coeff"):
        ChainState.load(tmp_path, CHAIN, CPU)
    ChainState.fresh(CHAIN).save(tmp_path)
    ChainState.load(tmp_path, constant, CPU, allow_changed=True)  # a constant needs no state


def full_state() -> ChainState:
    state = ChainState.fresh(CHAIN)
    state.memory["qae"] |= {"numbers": [0.1, 1 / 3], "anchor": torch.arange(6.0).view(2, 3)}
    state.memory["bonus"]["text"] = "kept"
    state.controller["bonus"] = {"coefficient": 0.015, "last_entropy": 0.3}
    state.idle_steps["qae"] = 49
    return state


def test_a_checkpoint_of_version_1_still_resumes(tmp_path):
    """Two files, as hclm_rl wrote them until it had a manifest."""
    kept = {
        "version": 1,
        "memory": {"bonus": {"text": "kept"}, "qae": {"numbers": [0.1, 1 / 3]}},
        "controller": {"bonus": {"coefficient": 0.015, "last_entropy": 0.3}, "qae": {}},
        "idle_steps": {"bonus": 0, "qae": 49},
    }
    (tmp_path / "entropy_terms.json").write_text(json.dumps(kept, indent=1))
    save_file({"qae/anchor": torch.arange(6.0).view(2, 3)}, tmp_path / "entropy_terms.safetensors")
    loaded, expected = ChainState.load(tmp_path, CHAIN, CPU), full_state()
    anchors = [state.memory["qae"].pop("anchor") for state in (loaded, expected)]
    assert loaded == expected and anchors[0].equal(anchors[1])
    with pytest.raises(ValueError, match=r"\['bonus', 'qae'\], this run has \['bonus'\]"):
        ChainState.load(tmp_path, Chain(CHAIN.links[:1]), CPU)
    full_state().save(tmp_path)  # a run that comes by again leaves the one file
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    ChainState.load(tmp_path, CHAIN, CPU)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"version": 1, "memory": {"bon', "entropy_terms.json is damaged or missing: JSONDecodeError"),
        ("[]", "entropy_terms.json is damaged or missing: TypeError"),
        ('{"version": 7}', "entropy_terms.json is of version 7; this hclm_rl reads versions 1 and 2"),
        ('{"version": 1, "memory": {"bonus": {}, "qae": {}}}', "damaged: its 'controller' does not say a value for ev"),
        (None, "entropy_terms.safetensors is damaged, or of version 1 without its entropy_terms.json"),
    ],
)
def test_a_damaged_or_unknown_file_of_version_1_is_named(content: str | None, sentence: str, tmp_path):
    save_file({}, tmp_path / "entropy_terms.safetensors")
    if content is not None:
        (tmp_path / "entropy_terms.json").write_text(content)
    with pytest.raises(ValueError, match=sentence) as error:
        ChainState.load(tmp_path, CHAIN, CPU)
    assert str(tmp_path) in str(error.value)


def test_a_file_of_a_later_version_is_named(tmp_path):
    save_file({}, tmp_path / FILE_NAME, {"entropy_terms": json.dumps({"version": 3, "sha256": ""})})
    with pytest.raises(ValueError, match=f"{tmp_path}/{FILE_NAME} is of version 3; this hclm_rl reads versions 1 and"):
        ChainState.load(tmp_path, CHAIN, CPU)


def test_a_flipped_bit_is_noticed_and_the_file_named(tmp_path):
    full_state().save(tmp_path)
    file = tmp_path / FILE_NAME
    whole = file.read_bytes()
    assert len(whole) > 500
    for place in range(0, len(whole), 5):  # of every byte takes ten seconds
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=FILE_NAME) as error:
            ChainState.load(tmp_path, CHAIN, CPU)
        assert "\n" not in str(error.value) and ("damaged" in str(error.value) or "of version" in str(error.value))


def test_a_file_that_was_cut_off_is_named(tmp_path):
    full_state().save(tmp_path)
    file = tmp_path / FILE_NAME
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{file} is damaged"):
            ChainState.load(tmp_path, CHAIN, CPU)


def test_a_kill_while_saving_leaves_the_state_before(tmp_path, monkeypatch: pytest.MonkeyPatch):
    full_state().save(tmp_path)
    before = (tmp_path / FILE_NAME).read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("save_file", "settle"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"hclm_rl.chain.state.{name}", killed)
            ChainState.fresh(CHAIN).save(tmp_path)
        assert (tmp_path / FILE_NAME).read_bytes() == before


def links(**changes: Link) -> Chain:
    return Chain(tuple(changes.get(link.name, link) for link in CHAIN.links))


ONE = Constant(coefficient=1.0)


@pytest.mark.parametrize(
    ("chain", "sentence"),
    [
        (
            links(qae=Link(name="qae", term=EntropyBonus(), coef=ONE)),
            "'qae' was the term hclm_rl.terms.qae.Qae and is hclm_rl.terms.entropy_bonus.EntropyBonus",
        ),
        (
            links(qae=Link(name="qae", term=Qae(quantile_k=0.25), coef=ONE)),
            f"quantile_k of 'qae' was {Qae().quantile_k} and is 0.25",
        ),
        (
            links(bonus=Link(name="bonus", term=EntropyBonus(), coef=StepToTarget(target=0.3))),
            "coef of 'bonus' was",
        ),
    ],
)
def test_what_differs_from_the_checkpoints_links_is_named(chain: Chain, sentence: str, tmp_path):
    full_state().save(tmp_path)
    with pytest.raises(ValueError) as error:
        ChainState.load(tmp_path, chain, CPU)
    assert str(error.value).startswith(f"{tmp_path} was written by other terms: {sentence}")
    assert str(error.value).endswith("--allow_changed_terms) to go on all the same")
    loaded = ChainState.load(tmp_path, chain, CPU, allow_changed=True)
    assert len(loaded.changed) == 1 and sentence in loaded.changed[0]
    is_another = isinstance(chain.links[1].term, EntropyBonus)
    assert loaded.memory["bonus"] == {"text": "kept"} and loaded.controller["bonus"]["coefficient"] == 0.015
    assert sorted(loaded.memory["qae"]) == ([] if is_another else ["anchor", "numbers"])
    assert loaded.idle_steps["qae"] == (0 if is_another else 49)


def test_allowed_links_that_come_and_go(tmp_path):
    full_state().save(tmp_path)
    late = Link(name="late", term=Qae(), coef=ONE)
    loaded = ChainState.load(tmp_path, Chain((CHAIN.links[0], late)), CPU, allow_changed=True)
    assert loaded.memory == {"bonus": {"text": "kept"}, "late": {}}
    assert loaded.changed == [
        f"{tmp_path} was written with the entropy terms ['bonus', 'qae'], this run has ['bonus', 'late']"
    ]
    assert ChainState.load(tmp_path, Chain(), CPU, allow_changed=True) == ChainState.fresh(Chain())
