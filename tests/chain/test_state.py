"""What links remember survives a checkpoint bit for bit."""

import math
import struct

import pytest
import torch

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
