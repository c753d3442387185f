"""The gradient of functionals of rows of logits: one pass where one does, one place for the head's, and its bounds."""

import pytest
import torch
from torch import Tensor

from hclm_rl.commands.sizes import CHUNKS, CHUNKS_WITH_GRADIENT
from hclm_rl.equations import vocab
from hclm_rl.equations.flow import mean_discriminator
from hclm_rl.equations.vocab import Head, entropy_by_head, over_rows, slope_by_head, slope_of_rows
from hclm_rl.terms.lp_reg import kl_of_filtered, log_kept_mass
from hclm_rl.terms.siren import nucleus_entropy

from ..counted import Counted

VOCABULARY, WIDTH, COUNT, SIZE = 400, 8, 120, 10  # words, of a state, rows, rows of a chunk
CHUNK = SIZE * VOCABULARY * 4  # bytes of a chunk's log-probs
PRODUCTS = ("mm", "addmm", "addmm_", "linear")


def shannon(logps: Tensor) -> Tensor:
    return -(logps.exp() * logps).sum(dim=-1)


def two(logps: Tensor) -> Tensor:
    return torch.stack([logps[:, 0].exp(), shannon(logps)], dim=1)


def first(logps: Tensor) -> Tensor:
    return logps[:, 0]  # a view


def plain_sum(logps: Tensor) -> Tensor:
    return logps.sum(dim=1)  # whose gradient is a view of one number


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vocab.CHUNK_BYTES, "cpu", CHUNK)


def given(is_trained: bool) -> tuple[Tensor, Head]:
    source = torch.Generator().manual_seed(0)
    rows = torch.randn(COUNT, WIDTH, generator=source).requires_grad_()
    weight, bias = torch.randn(VOCABULARY, WIDTH, generator=source), torch.randn(VOCABULARY, generator=source)
    head = Head(weight=weight.requires_grad_(is_trained), bias=bias.requires_grad_(is_trained), softcap=6.0)
    return rows, head


def pull_of(values: Tensor) -> Tensor:
    return torch.linspace(-1, 2, values.numel()).view(values.shape)


def products(seen: Counted) -> int:
    return sum(seen.calls[name] for name in PRODUCTS)


@pytest.mark.parametrize("is_trained", [False, True], ids=["fixed head", "trained head"])
@pytest.mark.parametrize("functional", [shannon, two, first, plain_sum])
def test_gradients_are_those_of_the_whole_logits(functional, is_trained: bool):
    rows, head = given(is_trained)
    assert head.bias is not None
    with Counted() as seen:
        values = over_rows(functional, rows, head)
        (values * pull_of(values)).sum().backward()
    # logits and the gradient by the rows; with K values a row, or a trained head, the logits again, and then the head's
    is_one_pass = functional is not two and not is_trained
    assert products(seen) == COUNT / SIZE * (2 if is_one_pass else 4 if is_trained else 3)
    leaves = [each for each in (rows, head.weight, head.bias) if each.requires_grad]
    logits = 6.0 * torch.tanh((rows @ head.weight.T + head.bias) / 6.0)
    whole = functional(logits.log_softmax(dim=-1))
    torch.testing.assert_close(values, whole)
    for leaf, expected in zip(leaves, torch.autograd.grad((whole * pull_of(whole)).sum(), leaves), strict=True):
        largest = expected.abs().max().item()
        assert largest > 1e-2
        # another order of summation in float32: of the sum, 1 - V p cancels
        torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=4e-6 * largest)


@pytest.mark.parametrize("functional", [shannon, first])
@pytest.mark.parametrize("is_trained", [False, True], ids=["fixed head", "trained head"])
def test_some_copies_of_a_chunk_are_held_and_one_gradient_of_the_head(functional, is_trained: bool):
    rows, head = given(is_trained)
    states = COUNT * WIDTH * 4
    with Counted() as seen:
        over_rows(functional, rows, head).sum().backward()
    of_head = (WIDTH + 1) * VOCABULARY * 4 if is_trained else 0
    # the whole logits would be COUNT / SIZE = 12 copies, of which the usual way holds some
    assert seen.peak < 8 * CHUNK + 1.2 * of_head + 3 * states


@pytest.mark.parametrize(
    "functional",
    [
        mean_discriminator,
        lambda logps: nucleus_entropy(logps, 0.8),
        lambda logps: log_kept_mass(logps, 0.05),
        lambda logps: kl_of_filtered(logps, 0.05),
        lambda logps: logps.topk(5, dim=1).values.mean(dim=1),
    ],
    ids=["discriminator", "nucleus", "kept mass", "filtered", "likeliest"],
)
def test_the_doctors_page_knows_how_many_copies_the_terms_functionals_make(functional):
    rows, head = given(True)
    with torch.no_grad(), Counted() as seen:
        over_rows(functional, rows, head)
    assert seen.peak < CHUNKS * CHUNK
    with Counted() as seen:
        over_rows(functional, rows, head).sum().backward()
    assert seen.peak < CHUNKS_WITH_GRADIENT * CHUNK + 1.2 * (WIDTH + 1) * VOCABULARY * 4 + 3 * COUNT * WIDTH * 4


def test_a_gradient_beside_the_log_probs_is_refused_and_not_lost():
    for is_trained in (False, True):
        rows, head = given(is_trained)
        slope = torch.ones(VOCABULARY, requires_grad=True)
        with pytest.raises(ValueError, match="a tensor that needs a gradient"):
            over_rows(lambda logps: (logps * (2 * slope)).sum(dim=1), rows, head).sum().backward()  # noqa: B023
        over_rows(lambda logps: (logps * slope.detach()).sum(dim=1), rows, head).sum().backward()  # noqa: B023


@pytest.mark.parametrize("is_trained", [False, True], ids=["fixed head", "trained head"])
def test_a_second_derivative_is_refused_and_not_lost(is_trained: bool):
    rows, head = given(is_trained)
    values = over_rows(shannon, rows, head)
    with pytest.raises(ValueError, match="no second derivative"):
        torch.autograd.grad(values.sum(), rows, create_graph=True)
    assert torch.autograd.grad(values.sum(), rows)[0].any()


@pytest.mark.parametrize("is_trained", [False, True], ids=["fixed head", "trained head"])
def test_of_what_does_not_move_the_gradient_is_zero(is_trained: bool):
    rows, head = given(is_trained)
    places = over_rows(lambda logps: logps.argmax(dim=1).float(), rows, head)
    (places + over_rows(shannon, rows, head) * 0).sum().backward()
    assert rows.grad is not None and not rows.grad.any()


def test_in_float16_a_gradient_that_the_loss_scales_up_is_not_lost():
    rows, head = given(False)
    head = Head(weight=head.weight, dtype=torch.float16)

    def tiny(logps: Tensor) -> Tensor:
        return 1e-9 * shannon(logps)  # below the smallest float16, 6e-8

    (2**30 * over_rows(tiny, rows, head).sum()).backward()
    values = shannon((rows @ head.weight.T).log_softmax(dim=-1)).sum()
    [expected] = torch.autograd.grad(values * 2**30 * 1e-9, rows)
    torch.testing.assert_close(rows.grad, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_the_backward_pass_makes_the_chunks_under_the_forwards_autocast():
    kinds = []

    def noting(logps: Tensor) -> Tensor:
        kinds.append(torch.is_autocast_enabled("cpu"))
        return shannon(logps)

    rows, head = given(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = over_rows(noting, rows, head)
    values.sum().backward()
    assert kinds == [True] * (2 * COUNT // SIZE)
    kinds.clear()
    values = over_rows(noting, rows, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values.sum().backward()
    assert kinds == [False] * (2 * COUNT // SIZE)


def test_gradients_by_the_head_hold_a_few_copies_of_a_chunk_beside_themselves():
    rows, head = given(False)
    ids = torch.arange(COUNT)
    of_head = WIDTH * VOCABULARY * 4
    with Counted() as seen:
        found = entropy_by_head(rows.detach(), Head(weight=head.weight))
    assert seen.peak < of_head + 5 * CHUNK and products(seen) == 2 * COUNT / SIZE
    for slope in (
        lambda: slope_by_head(found, rows.detach(), ids, Head(weight=head.weight)),
        lambda: slope_of_rows(rows.detach(), rows.detach(), ids, Head(weight=head.weight)),
    ):
        with Counted() as seen:
            slope()
        assert seen.peak < 5 * CHUNK and products(seen) == 2 * COUNT / SIZE


def test_without_gradient_the_values_alone_are_left():
    rows, head = given(True)
    with torch.no_grad(), Counted() as seen:
        values = over_rows(first, rows, head)
    assert not values.requires_grad and seen.held <= values.numel() * 4
    assert seen.peak < 5 * CHUNK + 4 * COUNT + 1000
