"""What a step costs as it grows, counted: numbers sent between processes, multiplications, elements made."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hclm_rl import known_terms
from hclm_rl.recipe.config import find_term

from ..term_batches import Step, first_stage, of_head, rollout, second_stage, token_batch
from ..tiny import make

WIDTH = 64  # D


def step_of(responses: int, tokens: int, width: int) -> Step:
    """No padding, groups of 4, a vocabulary of 11."""
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(11, (responses, tokens), generator=source)
    head, old = torch.randn(11, width, generator=source), torch.randn(responses, tokens, width, generator=source)
    hidden = old + 0.3 * torch.randn(responses, tokens, width, generator=source)
    (old_logps, old_entropy), (logps, entropy) = of_head(old, head, ids), of_head(hidden, head, ids)
    return Step(
        ids=ids,
        mask=torch.ones(responses, tokens).bool(),
        old_logps=old_logps,
        old_entropy=old_entropy,
        old_hidden=old,
        logps=logps,
        entropy=entropy,
        hidden=hidden,
        head=head,
        rewards=(torch.arange(responses) % 5).float() / 4,
        group_size=4,
    )


# of so many responses alone it compares each with each; the default is 10,000
CAPPED = {"spectrum": {"most_responses": 8}}


def whole_step(name: str, step: Step) -> None:
    """Both stages of a term at its defaults, and the backward pass of its loss; a small model's step of it."""
    term, memory = find_term(name)(**CAPPED.get(name, {})), {}
    first = first_stage(term, rollout(step), memory)
    batch = token_batch(step)
    outcome = second_stage(term, batch, first, memory)
    losses = [loss.sum() for loss in outcome.losses.values() if loss.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()


# ---- communication


@pytest.fixture(scope="module")
def wide(policy: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny policy, 64 wide: D x D is far more than the numbers that any term logs."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(policy, hidden_size=WIDTH, head_dim=WIDTH // 2)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    return str(folder)


def sent_in_a_step(wide: str, terms: list, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Numbers that one optimiser step hands to accelerate's reduce and gather."""
    sent: Counter[str] = Counter()
    for name in ("reduce", "gather"):
        stock = getattr(Accelerator, name)

        def counted(self: Any, tensor: Any, *args: Any, _stock: Any = stock, _name: str = name, **kwargs: Any) -> Any:
            sent[_name] += sum(each.numel() for each in tree_leaves(tensor))
            return _stock(self, tensor, *args, **kwargs)

        monkeypatch.setattr(Accelerator, name, counted)
    make(wide, out, terms=terms, fixed=True, loss_type="dapo", max_steps=1).train()
    monkeypatch.undo()
    return sent.total()


# and how many numbers a token: of three columns the force logs quantiles over the tokens of all processes
COVARIANCES = {"log_det": 0, "variance": 0, "von_neumann": 0, "information_force": 3}
OWN_NUMBERS = 64  # counts, the term's scalars and those of its metrics
TOKENS = 8 * 7  # slots of a step at most


@pytest.mark.parametrize("term", COVARIANCES)
def test_a_covariance_sends_at_most_its_own_numbers(
    term: str, wide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # the second moments are D x D, the means D; clip_cov asks for the same pass and has none
    without = sent_in_a_step(wide, ["clip_cov"], tmp_path / "without", monkeypatch)
    sent = sent_in_a_step(wide, [term], tmp_path / "with", monkeypatch) - without
    beside = OWN_NUMBERS + COVARIANCES[term] * TOKENS
    assert sent + OWN_NUMBERS >= WIDTH**2
    assert sent <= WIDTH**2 + WIDTH + beside


# ---- multiplications


def adds(out: Sequence[int], a: Sequence[int], b: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """A product that is added in place: a multiplication and an addition each."""
    return 2 * a[0] * a[1] * b[1]


def solves(a: Sequence[int], b: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """A triangle against `b`: half of a product."""
    return a[-1] * math.prod(b)


def factors(a: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return a[-1] ** 3 // 3


# what torch's counter takes for nothing
ALSO = {
    torch.ops.aten.addmm_: adds,
    torch.ops.aten.linalg_solve_triangular: solves,
    torch.ops.aten.linalg_cholesky_ex: factors,
}


def test_log_det_takes_less_than_two_and_a_half_products():
    step, d = step_of(64, 32, 256), 256
    with FlopCounterMode(display=False, custom_mapping=ALSO) as counter:
        whole_step("log_det", step)
    product = 2 * step.ids.numel() * d * d
    # the covariance: one triangle by blocks of 64, (1 + 64 / 256) / 2; the force: two triangles of leaves of 32,
    # 1 + 32 / 256; the factor: 256 ** 3 / 3 of 2 x 2,048 x 256 ** 2 is 1 / 48; together 1.77
    assert counter.get_total_flops() == pytest.approx(1.77 * product, rel=0.02)
    assert counter.get_total_flops() < 2.5 * product


# ---- growth with the tokens


class Made(TorchDispatchMode):
    """How many elements all operations have made: what they take where each takes the same for an element."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements += sum(each.numel() for each in tree_leaves(out) if isinstance(each, torch.Tensor))
        return out


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """b of the least-squares line log cost = a + b log size."""
    x, y = ([math.log(each) for each in values] for values in (sizes, costs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return top / sum((a - mean_x) ** 2 for a in x)


def test_the_exponent_of_a_square_is_two():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    return [step_of(responses, 16, 4) for responses in (32, 64, 128, 256)]


@pytest.mark.parametrize("term", known_terms())
def test_the_cost_is_linear_in_the_tokens(term: str, steps: list[Step]):
    costs = []
    for step in steps:
        with Made() as made:
            whole_step(term, step)
        costs.append(made.elements)
    if costs[0] < 200:  # nothing but a few numbers, whatever the size
        assert costs[-1] < 400
        return
    assert 0.9 < exponent([step.ids.numel() for step in steps], costs) < 1.1, costs
