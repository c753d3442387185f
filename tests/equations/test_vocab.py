"""Functionals of the next-token distribution against TRL's own fused head, and against the whole logits."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from hclm_rl.equations import vocab
from hclm_rl.equations.vocab import (
    Head,
    OnePass,
    entropy_by_head,
    over_rows,
    over_vocab,
    slope_along,
    slope_by_head,
    slope_of_rows,
)

from ..counted import Counted

VOCABULARY, WIDTH = 97, 16


def shannon(logps: Tensor) -> Tensor:
    return -(logps.exp() * logps).sum(dim=-1)


def probability_of_the_first(logps: Tensor) -> Tensor:
    return logps[:, 0].exp()


@pytest.mark.parametrize(
    "factors, head_factors",
    [
        ({}, {}),
        ({"final_logit_softcapping": 3.0}, {"softcap": 3.0}),
        ({"logit_scale": 0.25}, {"scale": 0.25}),
        ({"logits_scaling": 8.0, "final_logit_softcapping": 3.0}, {"scale": 1 / 8, "softcap": 3.0}),
    ],
    ids=["plain", "softcap", "scale", "both"],
)
def test_the_entropy_is_trls(factors, head_factors):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        **factors,
    )
    model = LlamaForCausalLM(config)
    # larger than usual, so that positions differ; a factor on the logits is made good here
    torch.nn.init.normal_(model.lm_head.weight, std=0.25 / head_factors.get("scale", 1.0))
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    ids = torch.randint(VOCABULARY, (3, 9))
    pull = torch.randn(3, 8)  # any upstream gradient

    entropy = model(input_ids=ids, labels=ids, fused_lm_head=True).entropy
    (entropy * pull).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    head = Head(weight=model.lm_head.weight, temperature=0.7, **head_factors)
    ours = over_vocab(shannon, hidden, head, rows_at_once=5)
    (ours * pull).sum().backward()
    assert ours.std() > 0.05  # or the agreement would say little
    # another order of summation in float32: four units in the last place of an entropy in [4, 8) nats, and sixteen of
    # the largest gradient
    torch.testing.assert_close(ours, entropy, atol=2e-6, rtol=0)
    for name, parameter in model.named_parameters():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-6 * largest, rtol=0)


def whole(
    functional, hidden: Tensor, weight: Tensor, bias: Tensor, softcap: float, scale: float, temperature: float
) -> Tensor:
    """From the whole logits at once, as the equation is written."""
    logits = softcap * torch.tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature
    return functional(logits.log_softmax(-1).flatten(0, 1)).view(hidden.shape[:2])


@pytest.mark.parametrize("functional", [shannon, probability_of_the_first])
def test_bias_softcap_scale_and_temperature_with_their_gradients(functional):
    source = torch.Generator()
    shapes = [(2, 3, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)]
    grads = []
    for route in ("chunks", "whole"):
        source.manual_seed(0)
        hidden, weight, bias = (torch.randn(*shape, generator=source).requires_grad_() for shape in shapes)
        if route == "chunks":
            head = Head(weight=weight, bias=bias, temperature=1.3, softcap=5.0, scale=0.4)
            values = over_vocab(functional, hidden, head, rows_at_once=4)
        else:
            values = whole(functional, hidden, weight, bias, softcap=5.0, scale=0.4, temperature=1.3)
        values.square().sum().backward()
        grads.append((values.detach(), hidden.grad, weight.grad, bias.grad))
    for chunked, plain in zip(*grads, strict=True):
        torch.testing.assert_close(chunked, plain)


def test_chunk_sizes_agree():
    source = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 5, WIDTH, generator=source), torch.randn(VOCABULARY, WIDTH, generator=source)
    for rows_at_once in (1, 4, 15, 16, 256):
        with torch.no_grad():
            values = over_vocab(shannon, hidden, Head(weight=weight), rows_at_once)
        by_position = torch.stack([shannon((h @ weight.T).log_softmax(-1)) for h in hidden.flatten(0, 1)]).view(3, 5)
        torch.testing.assert_close(values, by_position)
        assert not values.requires_grad


def test_uniform_and_certain_distributions():
    # no state: log V; a state that sets one logit 200 above: 0
    weight = torch.eye(VOCABULARY)[:, :WIDTH].contiguous()
    hidden = torch.zeros(1, 2, WIDTH)
    hidden[0, 1, 3] = 200.0
    assert over_vocab(shannon, hidden, Head(weight=weight))[0].tolist() == pytest.approx([math.log(VOCABULARY), 0.0])


def test_half_precision_states_give_float32_values():
    weight, hidden = torch.randn(VOCABULARY, WIDTH).bfloat16(), torch.zeros(1, 1, WIDTH).bfloat16()
    value = over_vocab(shannon, hidden, Head(weight=weight))
    # in bfloat16 log 97 = 4.5747 would be 4.5625
    assert value.dtype == torch.float32 and value.item() == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_a_head_in_float32_takes_half_precision_states():
    # TRL's cast_lm_head_to_fp32: the states are cast up, not the head down
    source = torch.Generator().manual_seed(3)
    weight, states = torch.randn(9, 4, generator=source), torch.randn(2, 3, 4, generator=source).bfloat16()
    head, ids = Head(weight=weight, softcap=5.0), torch.zeros(2, 3).long()
    expected = over_vocab(lambda logps: logps[:, 0], states.float(), head)
    assert torch.equal(over_vocab(lambda logps: logps[:, 0], states, head), expected)
    assert torch.equal(slope_along(states, states, ids, head), slope_along(states.float(), states.float(), ids, head))


def test_no_rows_at_all():
    assert over_vocab(shannon, torch.zeros(2, 0, WIDTH), Head(weight=torch.ones(VOCABULARY, WIDTH))).shape == (2, 0)


@pytest.mark.parametrize("head_factors", [{}, {"softcap": 3.0, "scale": 0.5, "temperature": 0.7}])
def test_slopes_are_directional_derivatives_through_the_head(head_factors):
    generator = torch.Generator().manual_seed(0)
    hidden, direction = torch.randn(2, 2, 5, WIDTH, generator=generator).unbind()
    weight, bias = torch.randn(VOCABULARY, WIDTH, generator=generator), torch.randn(VOCABULARY, generator=generator)
    ids, head = torch.randint(VOCABULARY, (2, 5), generator=generator), Head(weight=weight, bias=bias, **head_factors)

    def own_logps(x: Tensor) -> Tensor:
        return head.logps(x.reshape(-1, WIDTH)).view(2, 5, VOCABULARY).gather(2, ids.unsqueeze(2)).squeeze(2)

    _, expected = torch.autograd.functional.jvp(own_logps, hidden, direction)
    torch.testing.assert_close(slope_along(direction, hidden, ids, head, rows_at_once=3), expected)


def test_what_the_mask_leaves_out_reaches_neither_values_nor_gradients():
    source = torch.Generator().manual_seed(0)
    weight, states = torch.randn(VOCABULARY, WIDTH, generator=source), torch.randn(2, 3, WIDTH, generator=source)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    hidden = torch.where(mask.unsqueeze(2), states, math.nan).requires_grad_()
    values = over_vocab(shannon, hidden, Head(weight=weight), rows_at_once=2, mask=mask)
    torch.testing.assert_close(values, torch.where(mask, over_vocab(shannon, states, Head(weight=weight)), 0))
    values.sum().backward()
    assert hidden.grad.isfinite().all() and torch.equal((hidden.grad != 0).any(dim=2), mask)
    nothing = over_vocab(shannon, hidden, Head(weight=weight), mask=torch.zeros_like(mask))
    nothing.sum().backward()
    assert torch.equal(nothing, torch.zeros(2, 3))


HEADS = [{}, {"softcap": 2.0}, {"scale": 0.5, "temperature": 0.7}, {"softcap": 3.0, "scale": 2.0, "temperature": 1.3}]


def tiny_head(**factors: float) -> tuple[Head, Tensor, Tensor, Tensor]:
    """(head of 11 words and width 4 with a bias, states (3, 5, 4), tokens, mask)."""
    source = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(11, 4, generator=source), torch.randn(11, generator=source)
    states, ids = torch.randn(3, 5, 4, generator=source), torch.randint(11, (3, 5), generator=source)
    return Head(weight=weight, bias=bias, **factors), states, ids, torch.rand(3, 5, generator=source) > 0.3


def logps_by_hand(weight: Tensor, states: Tensor, head: Head) -> Tensor:
    """log softmax(softcap tanh(scale (z W^T + b) / softcap) / temperature), in float64."""
    assert head.bias is not None
    logits = head.scale * (states.double() @ weight.T + head.bias.double())
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return (logits / head.temperature).log_softmax(dim=-1)


@pytest.mark.parametrize("factors", HEADS)
def test_the_entropys_gradient_by_the_head_is_autograds(factors: dict[str, float]):
    head, states, _, mask = tiny_head(**factors)
    weight = head.weight.double().requires_grad_()
    logps = logps_by_hand(weight, states[mask], head)
    [expected] = torch.autograd.grad(-(logps.exp() * logps).sum(), weight)
    found = entropy_by_head(states, head, mask, rows_at_once=4)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factors", HEADS)
def test_a_tokens_slope_by_the_head_is_autograds(factors: dict[str, float]):
    head, states, ids, mask = tiny_head(**factors)
    direction = torch.randn(11, 4, generator=torch.Generator().manual_seed(2))

    def logps(weight: Tensor) -> Tensor:
        return logps_by_hand(weight, states, head).gather(2, ids.unsqueeze(2)).squeeze(2)

    _, expected = torch.autograd.functional.jvp(logps, head.weight.double(), direction.double())
    found = slope_by_head(direction, states, ids, head, mask, rows_at_once=4)
    torch.testing.assert_close(found.double()[mask], expected[mask], rtol=0, atol=1e-6)
    assert (found[~mask] == 0).all()


def test_states_that_are_not_finite_and_words_that_cannot_be_leave_the_gradient_alone():
    head, states, _, mask = tiny_head()
    spoilt, bad = states.clone(), mask.nonzero()[0]
    spoilt[bad[0], bad[1], 2] = math.nan
    without = mask.clone()
    without[bad[0], bad[1]] = False
    torch.testing.assert_close(entropy_by_head(spoilt, head, mask), entropy_by_head(states, head, without))
    assert head.bias is not None
    barred = Head(weight=head.weight, bias=head.bias.clone().index_fill(0, torch.tensor([3]), -math.inf))
    assert entropy_by_head(states, barred, mask).isfinite().all() and not entropy_by_head(states, barred, mask)[3].any()


@pytest.mark.parametrize("bias", [False, True])
def test_under_autocast_the_entropy_is_trls_in_bfloat16(bias: bool):
    # float32 weights, autocast in bfloat16: TRL's head makes its product in bfloat16 and all else in float32
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY))
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    ids = torch.randint(VOCABULARY, (3, 9))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(input_ids=ids, labels=ids, fused_lm_head=True).entropy
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    head = Head(weight=model.lm_head.weight, bias=model.lm_head.bias, temperature=0.7, dtype=torch.bfloat16)
    with torch.no_grad():
        ours = over_vocab(shannon, hidden, head)
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
    exact = over_vocab(shannon, hidden.float(), Head(weight=head.weight, bias=head.bias, temperature=0.7))
    assert (ours - exact).abs().max() > 2e-3  # or the dtype of the product would make no difference


def test_gradients_of_chunks_add_up_in_the_dtype_of_the_weights():
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=source).requires_grad_()
    hidden = torch.randn(1, 64, WIDTH, generator=source)
    grads = []
    for size in (64, 1):
        over_vocab(shannon, hidden, Head(weight=weight, dtype=torch.bfloat16), rows_at_once=size).sum().backward()
        grads.append(weight.grad)
        weight.grad = None
    # one row's gradient is rounded to 2^-9 of itself; summed in bfloat16 64 of them would be off by 2 % of the largest
    torch.testing.assert_close(grads[0], grads[1], atol=5e-3 * grads[0].abs().max().item(), rtol=0)


def test_chunks_are_so_many_bytes(monkeypatch: pytest.MonkeyPatch):
    with FakeTensorMode():
        sizes = [Head(weight=torch.empty(152_064, 1, device=kind)).rows_at_once for kind in ("cuda", "cpu")]
    assert sizes == [441, 165]  # 256 MiB / (4 x 152,064), and 96 MiB
    width, count, vocabulary = 8, 400, 500
    monkeypatch.setitem(vocab.CHUNK_BYTES, "cpu", 20 * 4 * vocabulary)  # 20 rows
    source = torch.Generator().manual_seed(0)
    head = Head(weight=torch.randn(vocabulary, width, generator=source))
    rows = torch.randn(count, width, generator=source)
    with torch.no_grad(), Counted() as seen:
        values = over_rows(shannon, rows, head)
    assert seen.calls["mm"] + seen.calls["linear"] + seen.calls["addmm"] == count / 20
    # logits, scaled, divided, log-softmax, p and p log p: a few copies of a chunk; of the whole, 20 times that
    assert seen.peak < 6 * vocab.CHUNK_BYTES["cpu"] + 4 * count * 4
    torch.testing.assert_close(values, shannon((rows @ head.weight.T).log_softmax(-1)))


def test_functionals_of_one_pass_share_its_logits():
    source = torch.Generator().manual_seed(0)
    head = Head(weight=torch.randn(VOCABULARY, WIDTH, generator=source))
    hidden, mask = torch.randn(2, 5, WIDTH, generator=source), torch.ones(2, 5).bool()
    mask[1, 3:] = False

    def two(logps: Tensor) -> Tensor:
        return torch.stack([logps[:, 0], logps[:, 1]], dim=1)

    read = OnePass(lambda f: over_vocab(f, hidden, head, mask=mask), [shannon, two, probability_of_the_first])
    with torch.no_grad(), Counted() as seen:
        found = [read(each) for each in (probability_of_the_first, two, shannon, shannon)]
    assert seen.calls["mm"] + seen.calls["linear"] + seen.calls["addmm"] == 1
    for each, values in zip((probability_of_the_first, two, shannon), found, strict=False):
        assert torch.equal(values, over_vocab(each, hidden, head, mask=mask))
    assert found[1].shape == (2, 5, 2)
    other = read(lambda logps: logps[:, 2])  # of nobody who said so before
    assert torch.equal(other, over_vocab(lambda logps: logps[:, 2], hidden, head, mask=mask))


def test_directions_that_a_function_makes_are_those_of_all_rows():
    source = torch.Generator().manual_seed(0)
    head, rows = Head(weight=torch.randn(9, 4, generator=source)), torch.randn(7, 4, generator=source)
    ids, sizes = torch.randint(9, (7,), generator=source), []

    def direction(some: Tensor) -> Tensor:
        sizes.append(len(some))
        return some.square()

    ours = slope_of_rows(direction, rows, ids, head, rows_at_once=3)
    torch.testing.assert_close(ours, slope_of_rows(rows.square(), rows, ids, head))
    assert sizes == [3, 3, 1]
    assert slope_of_rows(direction, rows[:0], ids[:0], head).shape == (0,)


def test_states_go_to_the_heads_device_and_values_come_back():
    # `device_map` leaves the head on another GPU than the last layer's states; no device is needed to say so
    with FakeTensorMode(), torch.no_grad():
        head = Head(weight=torch.empty(9, 4, device="cuda:1"), bias=torch.empty(9, device="cuda:1"))
        hidden, ids = torch.empty(2, 3, 4, device="cuda:0"), torch.empty(2, 3, dtype=torch.long, device="cuda:0")
        assert over_vocab(shannon, hidden, head).device == torch.device("cuda:0")
        assert slope_along(hidden, hidden, ids, head).device == torch.device("cuda:0")
