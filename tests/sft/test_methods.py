"""The methods: the cards' worked examples, what they refuse."""

import math

import pytest
import torch
from torch import Tensor

from hclm_rl.sft.config import build_method
from hclm_rl.sft.curio_sft import CurioSft
from hclm_rl.sft.em_ft import EmFt
from hclm_rl.sft.entropy_sft import EntropySft
from hclm_rl.sft.method import SftBatch, SftMethod
from hclm_rl.sft.mix_ce import MixCe


def batch(logps: Tensor, entropy: Tensor | None = None, columns: dict[str, Tensor] | None = None) -> SftBatch:
    """One text whose labels all count, alone in its step."""
    return SftBatch(
        mask=torch.ones_like(logps, dtype=torch.bool).unsqueeze(0),
        logps=logps.unsqueeze(0),
        entropy=(torch.zeros_like(logps) if entropy is None else entropy).unsqueeze(0),
        tokens=float(len(logps)),
        tokens_here=float(len(logps)),
        columns={name: value.unsqueeze(0) for name, value in (columns or {}).items()},
    )


def loss(method: SftMethod, of: SftBatch) -> Tensor:
    return method(of).losses.sum() / of.tokens


def close(got: Tensor, wanted: list | float, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, torch.tensor(wanted), atol=atol, rtol=0)


def test_mix_ce_as_on_its_card():
    logps = torch.tensor([-0.1, -1.0, -3.0], requires_grad=True)
    found = loss(MixCe(eta=0.5), batch(logps))
    close(found.detach(), 0.784621)
    [slope] = torch.autograd.grad(found, logps)
    close(slope, [-0.317473, -0.227980, -0.174965])
    close(loss(MixCe(eta=1.0), batch(logps)).detach(), 1.366667)


@pytest.mark.parametrize("ratio, wanted, kept", [(0.8, 0.95, [0, 1, 2, 3]), (0.4, 1.25, [1, 2])])
def test_entropy_sft_as_on_its_card(ratio: float, wanted: float, kept: list[int]):
    logps = torch.tensor([-0.1, -2.0, -0.5, -1.2, -0.05], requires_grad=True)
    of = batch(logps, torch.tensor([0.2, 1.0, 0.1, 1.4, 0.3]))
    found = loss(EntropySft(ratio=ratio, coef=0.8), of)
    close(found.detach(), wanted)
    [slope] = torch.autograd.grad(found, logps)
    assert slope.nonzero().flatten().tolist() == kept


def test_entropy_sft_keeps_the_first_of_equal_labels():
    logps = torch.full((60,), -0.5).requires_grad_()
    loss(EntropySft(ratio=0.5), batch(logps)).backward()
    assert logps.grad is not None and logps.grad.nonzero().flatten().tolist() == list(range(30))


def test_a_share_that_floating_point_misses_by_a_hair_is_meant():
    assert EntropySft(ratio=0.29).kept(100) == 29  # 0.29 * 100 = 28.999999999999996


TEACHERS = [[2.0, 1.5, 1.0, 0.5, 0.0], [4.0, 1.0, 0.0, 0.0, -1.0], [12.0, 1.0, 0.0, 0.0, 0.0]]
STUDENTS = [[2.2, 1.3, 1.0, 0.4, 0.0], [4.5, 1.0, 0.0, 0.0, -1.0], [12.0, 1.0, 0.0, 0.0, 0.0]]
LABELS = torch.tensor([1, 0, 0])


def test_curio_sft_as_on_its_card():
    method = CurioSft()
    close(method.temperatures(torch.tensor([*TEACHERS, [3.0, 1.0, 0.5, 0.0, -0.5]])), [1.5, 1.1, 1.1, 1.160111])
    found = method.of_teacher(torch.tensor(TEACHERS), LABELS)
    close(found["softened"], [-1.384653, -0.121074, -0.000100])
    logps = torch.tensor(STUDENTS).log_softmax(-1)[torch.arange(3), LABELS].requires_grad_()
    close(logps.detach(), [-1.585047, -0.054964, -0.000035])
    total = loss(method, batch(logps, columns=found))
    close(total.detach(), 0.554103)
    close(3 * torch.autograd.grad(total, logps)[0], [-1.200394, -0.933889, -0.999935], atol=2e-6)
    close(loss(CurioSft(alpha=0.0), batch(logps, columns=found)).detach(), 0.546682)


@pytest.mark.parametrize(
    "wild", [{"hottest": 1e300}, {"coldest": 1e-300, "gate": 1e300}, {"most_rise": 1e300}, {"kappa": 1e300}]
)
def test_huge_values_leave_a_temperature(wild: dict):
    found = CurioSft(**wild).of_teacher(torch.tensor(TEACHERS), LABELS)
    assert all(value.isfinite().all() for value in found.values())


def test_without_the_gate_a_certain_token_would_be_softened_most():
    assert CurioSft(gate=0.0).temperatures(torch.tensor(TEACHERS[2:])).tolist() == [1.5]


def test_the_entropy_that_decides_is_that_of_the_largest_logits():
    # of two equal words and three of almost no weight: log 2 over the top two whatever the others
    logits = torch.tensor([[0.0, 0.0, -5.0, -5.0, -5.0]])
    assert CurioSft(top=2).temperatures(logits).tolist() == [1.5]  # log 2 cannot rise: the upper bound
    assert 1.1 < CurioSft(top=5, most_rise=0.01).temperatures(logits).item() < 1.5


def test_em_ft_as_on_its_card():
    z = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.9, 0.05, 0.05]]).log().requires_grad_()
    entropy = torch.distributions.Categorical(logits=z).entropy()
    close(entropy.detach(), [0.801819, 1.029653, 0.394398])
    total = loss(EmFt(), batch(torch.zeros(3), entropy))
    close(total.detach(), 2.225869)
    close(torch.autograd.grad(total, z, retain_graph=True)[0][0], [-0.311601, 0.161524, 0.150077])
    close(loss(EmFt(reduction="mean"), batch(torch.zeros(3), entropy)).detach(), 0.741956)


def test_off_the_mask_nothing_counts():
    logps, entropy = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[0.5, 0.6, math.nan]])
    columns = {"softened": torch.tensor([[-1.0, -1.0, math.nan]]), "temperature": torch.ones(1, 3)}
    of = SftBatch(
        mask=torch.tensor([[True, True, False]]),
        logps=logps, entropy=entropy, tokens=2.0, tokens_here=2.0, columns=columns,
    )  # fmt: skip
    for method in (MixCe(), EntropySft(), CurioSft(), EmFt()):
        found = method(of)
        assert found.losses[0, 2] == 0 and found.losses.isfinite().all(), method
        assert all(value.isfinite() for value in found.metrics.values()), method


@pytest.mark.parametrize(
    "entry, message",
    [
        ("mixce", r"sft_method: unknown name 'mixce'; it must be one of curio_sft, em_ft, entropy_sft, mix_ce"),
        ({"mix_ce": {"eat": 0.5}}, r"mix_ce has no hyper-parameter 'eat'; the nearest are eta"),
        ({"mix_ce": {"eta": "1e-1"}}, r"mix_ce: eta must be float, got str '1e-1'; YAML reads 1e-6 as text"),
        ({"mix_ce": {"eta": 2}}, r"mix_ce: eta must be in \[0, 1\], got 2\.0"),
        ({"entropy_sft": {"ratio": 0}}, r"entropy_sft: ratio must be in \(0, 1\], got 0\.0"),
        ({"entropy_sft": {"coef": math.inf}}, r"entropy_sft: coef must be finite, got inf"),
        ({"curio_sft": {"coldest": 2.0}}, r"curio_sft: 0 < coldest <= hottest must hold, got 2\.0 and 1\.5"),
        ({"curio_sft": {"sync_every": 0}}, r"top must be at least 2 and sync_every at least 1, got 512 and 0"),
        ({"em_ft": {"reduction": "max"}}, r"em_ft: reduction must be one of 'sum', 'mean', got str 'max'"),
        ({"em_ft": {}, "mix_ce": {}}, r"sft_method is a name or one \{name: \{hyper-parameter: value\}\}, got"),
        ('{"mix_ce": ', r"sft_method on the command line is a name or JSON"),
        ({"mix_ce": [1]}, r"sft_method: the hyper-parameters of mix_ce are a mapping of names to values, got \[1\]"),
    ],
)
def test_a_mistake_is_one_sentence(entry, message: str):
    with pytest.raises(ValueError, match=message):
        build_method(entry)


def test_names_json_and_objects_are_the_same():
    assert build_method("mix_ce") == build_method('{"mix_ce": {}}') == build_method(MixCe()) == MixCe()
    assert build_method(None) is None
