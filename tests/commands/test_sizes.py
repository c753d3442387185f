"""The doctor's page of sizes: numbers worked by hand, and the constants counted operation by operation."""

import itertools
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hclm_rl import known_terms
from hclm_rl.chain.finite import Watch
from hclm_rl.commands.cli import main
from hclm_rl.commands.sizes import (
    DECOMPOSES,
    MODELS,
    PRODUCTS,
    TOKEN_BYTES,
    Cost,
    Model,
    Run,
    cost_of,
    head_products,
    model_of,
    needed,
    what_would_fit,
)
from hclm_rl.recipe.config import build_chain, find_term

from ..counted import Counted
from ..term_batches import Step, always_the_same, first_stage, of_head, one_link, rollout, token_batch

SEVEN = Run(model=MODELS["7b"], gpus=8, responses=512, length=16_384)


def cost(name: str, run: Run = SEVEN) -> Cost:
    return cost_of(build_chain([name]).links[0], run)


def test_the_states_of_a_batch_at_7b():
    # 64 responses a GPU of 2^14 tokens: 2^20; times 3,584 x 4 bytes = 14 x 2^30
    assert SEVEN.tokens == 2**20 and SEVEN.states == 14.0
    assert cost("information_force").kept == 14.0 and cost("clip_cov").kept == cost("feature_softmax").kept == 0.0
    assert cost("information_force", replace(SEVEN, state_bytes=2)).kept == 7.0
    # a micro-batch that holds the whole: the loss's own pass has them
    assert cost("information_force", replace(SEVEN, micro_batch=64)).kept == 0.0
    # of these the moments are taken as the scoring pass goes by
    streamed = ("log_det", "variance", "von_neumann", "coding_rate", "group_log_det", "dqo")
    assert all(cost(name).kept == 0.0 for name in streamed)


def test_what_a_step_computes_and_sends():
    product = 2 * 2**20 * 3584**2  # 26.9 TFLOP
    log_det = cost("log_det")
    assert log_det.flops == pytest.approx(1.5 * product + 3584**3 / 3)
    # the second moments and the mean in float32, and two gathers of a number a token
    assert log_det.sent == pytest.approx(4 * (3584**2 + 3584) / 2**20 + 8)
    assert cost("log_det", replace(SEVEN, gpus=1, responses=64)).sent == 0
    assert cost("entropy_flow").head_flops == 2 * 2**20 * 3584 * 152_064
    assert cost("log_det").pass_flops == 2 * MODELS["7b"].parameters * 2**20 and cost("max_rl").pass_flops == 0
    # 8 a parameter and token with gradient checkpointing; the scoring pass is a quarter of it
    assert SEVEN.flops == 4 * cost("log_det").pass_flops


def test_what_does_not_fit_is_said_with_what_would():
    small = replace(SEVEN, memory=30.0)
    links = build_chain(["information_force"]).links
    total = needed([cost("information_force")], small)
    # 7.62e9 x 16 / 8 bytes = 14.19 GiB; 28 layers x 16,384 x 3,584 x 2 bytes = 3.06 GiB; and 14 GiB of states
    assert total == pytest.approx(14.19 + 3.06 + 14.0 + cost("information_force").peak, abs=0.01) and total > 30
    found = what_would_fit(links, small)
    assert found[0].startswith("the model in bfloat16") and found[0].endswith(f"{total - 7:.1f} GiB")
    assert any(each.startswith("16 GPUs") for each in found)
    assert any(each.startswith("256 responses a generation batch") for each in found)
    assert any(each.startswith("responses of at most 8192 tokens") for each in found)
    assert what_would_fit(links, replace(small, memory=1.0)) == []


def test_a_model_by_its_config(tmp_path: Path):
    config = {
        "hidden_size": 896,
        "vocab_size": 151_936,
        "num_hidden_layers": 24,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = model_of(str(tmp_path))
    assert found[:3] == MODELS["0.5b"][:3] and found.parameters == pytest.approx(MODELS["0.5b"].parameters, rel=2e-3)
    with pytest.raises(ValueError, match=r"must be one of 0\.5b, .* a config\.json or its folder, got '7c'"):
        model_of("7c")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'hidden_size', which the size needs"):
        model_of(str(tmp_path))


def test_the_page(capsys: pytest.CaptureFixture):
    line = ["doctor", "--gpus", "8", "--model-size", "7b", "--responses", "512", "--length", "16384"]
    assert main([*line, "--tflops", "400"]) == 0
    lines = capsys.readouterr().out
    assert "…" not in lines  # of 80 columns nothing is cut
    page = " ".join(lines.split())
    assert "1.05 million tokens a GPU" in page and "information_force" in page and "fits: " in page
    assert main([*line, "--gpu-memory", "24"]) == 1
    assert "will not fit: " in capsys.readouterr().out
    assert main([*line, "--json"]) == 0
    terms = {each["name"]: each for each in json.loads(capsys.readouterr().out)["terms"]}
    assert set(terms) == set(known_terms()) and terms["information_force"]["kept"] == 14.0
    assert main(["doctor", "--model-size", "7b", "--gpus", "0"]) == 2
    assert "--gpus must be positive, got 0" in capsys.readouterr().err


def wide_step(tokens: int = 32, width: int = 4) -> Step:
    """64 responses of so many tokens, none of them padding."""
    source, shape = torch.Generator().manual_seed(0), (64, tokens, width)
    ids = torch.randint(11, shape[:2], generator=source)
    head, old = torch.randn(11, width, generator=source), torch.randn(shape, generator=source)
    hidden = old + 0.3 * torch.randn(shape, generator=source)
    (old_logps, old_entropy), (logps, entropy) = of_head(old, head, ids), of_head(hidden, head, ids)
    return Step(
        ids=ids,
        mask=torch.ones(shape[:2]).bool(),
        old_logps=old_logps,
        old_entropy=old_entropy,
        old_hidden=old,
        logps=logps,
        entropy=entropy,
        hidden=hidden,
        head=head,
        rewards=(torch.arange(64) % 5).float() / 4,
        group_size=4,
    )


def reads_numbers_alone(name: str) -> bool:
    term = find_term(name)()
    reads = (term.needs_hidden, term.needs_vocab, term.needs_vocab_gradient, term.needs_rescoring, term.needs_attention)
    return not any(reads)


# waits of a micro-batch for the device, beside those of the trainer: places are looked up once, or drawn
WAITS = {
    "coding_rate": 3,
    "entropy_balanced": 2,
    "group_log_det": 1,
    "information_force": 0,
    "siren": 1,
    "lp_reg": 2,
    "simko": 2,
}
ONCE = ("log_det", "variance", "von_neumann", "feature_softmax")


SIZES, WIDE = (16, 32, 64, 128), 96  # tokens of 64 responses, and the states' width
# operations on D x D, which do not grow with tokens: (D) -> multiplications and additions
ON_SQUARES = {
    "linalg_cholesky_ex": lambda d: d**3 // 3,
    "cholesky_inverse": lambda d: 2 * d**3 // 3,
    "_linalg_eigh": lambda d: 20 * d**3 // 3,
}


class Operations(FlopCounterMode):
    """Of products of matrices, those into a given place and decompositions included."""

    def __init__(self) -> None:
        aten = torch.ops.aten
        mapping: dict = {aten.addmm_: lambda out, a, b, *_, out_shape=None, **__: 2 * a[0] * a[1] * b[1]}
        for name, count in ON_SQUARES.items():
            mapping[getattr(aten, name)] = lambda s, *_, of=count, out_shape=None, **__: of(s[-1])
        super().__init__(display=False, custom_mapping=mapping)


def both_stages(name: str, step: Step) -> tuple[int, int, int]:
    """(operations of products, numbers written, numbers sent) of a term, its backward pass included."""
    sent: list[int] = []

    def total(x: torch.Tensor) -> torch.Tensor:
        sent.append(x.numel())
        return x

    term, memory = find_term(name)(), {}
    view = rollout(step, total=total)
    with Counted() as seen, Operations() as operations:
        first = first_stage(term, view, memory)
        batch = token_batch(step, columns=first.columns, shared=first.shared)
        out = one_link(term)(batch, {"link": memory}, {"link": 1.0}, always_the_same, first.affected, Watch())
        for loss in out.losses.values():
            if loss.requires_grad:
                loss.sum().backward()
    return operations.get_total_flops(), seen.written, sum(sent)


def exponent(values: tuple[int, ...]) -> float:
    """The slope of log value over log tokens, of what grows with tokens; 1 where nothing does."""
    grown = [after - before for before, after in itertools.pairwise(values)]
    if not any(grown):
        return 1.0  # of pooled states: a matter of responses
    x = [math.log(after - before) for before, after in itertools.pairwise(SIZES)]
    return statistics.linear_regression(x, [math.log(value) for value in grown]).slope


@pytest.mark.parametrize("name", known_terms())
def test_a_terms_cost_is_linear_in_tokens(name: str):
    if find_term(name)().needs_rescoring or find_term(name)().needs_attention:
        pytest.skip("its passes over other texts, or the attention's width, are not the tokens' alone")
    operations, written, sent = zip(*(both_stages(name, wide_step(size, WIDE)) for size in SIZES), strict=True)
    assert 0.9 <= exponent(written) <= 1.1 and 0.9 <= exponent(operations) <= 1.1
    if find_term(name).__name__ in PRODUCTS:  # the second moments, the mean, and some sums
        assert sent[0] == sent[-1] <= WIDE**2 + WIDE + 8


@pytest.mark.parametrize("name", ["log_det", "variance", "von_neumann"])
def test_the_doctors_page_knows_the_products_of_a_term(name: str):
    step, width = wide_step(16, 512), 512
    product = 2 * step.ids.numel() * width**2
    found, kind = both_stages(name, step)[0] / product, find_term(name).__name__
    expected = PRODUCTS[kind] + DECOMPOSES.get(kind, 0.0) * width**3 / product
    # a triangle by blocks of 64 columns is 9/16 of a product, substitution with leaves of 32 is 17/16
    assert expected <= found <= 1.15 * expected
    assert name != "log_det" or found <= 2.5


class WithTheHead(TorchDispatchMode):
    """Multiplications and additions of products in which the vocabulary of 11 is one of the three sides."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = [each for each in args if isinstance(each, torch.Tensor)][-2:]
            sides = (*left.shape, right.size(1))
            self.operations += 2 * math.prod(sides) if 11 in sides else 0
        return func(*args, **(kwargs or {}))


# products of M x D x V in stage 1: the logits; by the head of all tokens logits and G h, of those drawn logits and G
HEAD_PRODUCTS = [
    ({"force_reweight": {}}, 1.0),
    ({"force_reweight": {"by": "representation", "unit": "nats", "floor": -1.0}}, 2.0),
    ({"force_reweight": {"through": "head"}}, 2.25),
    ({"entropy_flow": {}}, 1.0),
    ({"entropy_flow": {"through": "head"}}, 2.25),
    ({"entropy_flow": {"through": "head", "share": 1.0}}, 4.0),
]


@pytest.mark.parametrize(("recipe", "expected"), HEAD_PRODUCTS, ids=[str(recipe) for recipe, _ in HEAD_PRODUCTS])
def test_the_doctors_page_knows_the_products_with_the_head(recipe: dict, expected: float):
    [link] = build_chain([recipe]).links
    # 2,048 tokens, each with an advantage, half of them of either half of the prompts
    step = wide_step()
    view = replace(rollout(step), advantages=torch.ones(64))
    with WithTheHead() as seen:
        first_stage(link.term, view, {})
    assert seen.operations == expected * 2 * 2048 * 4 * 11
    assert head_products(link.term) == expected


def test_what_the_terms_of_the_distribution_add_to_smollm2s_step():
    # 134.5 million parameters, 30 layers; TRL's backward pass makes the logits again
    run = Run(model=Model(576, 49_152, 30, 134.5e6), gpus=1, responses=16, length=512, is_checkpointed=False)
    product = 2 * run.tokens * 576 * 49_152
    links = [build_chain([recipe]).links[0] for recipe, _ in HEAD_PRODUCTS]
    ratios = [1 + cost_of(link, run).head_flops / (run.flops + product) for link in links]
    assert ratios == pytest.approx([1.066, 1.131, 1.148, 1.066, 1.148, 1.262], abs=5e-4)


def test_what_a_term_holds_for_each_token_and_how_often_it_waits():
    step, most, waits = wide_step(), 0.0, {}
    for name in known_terms():
        if find_term(name)().needs_rescoring or find_term(name)().needs_attention:
            continue
        term, view, memory = find_term(name)(), rollout(step), {}
        with Counted() as seen:
            first = first_stage(term, view, memory)
        peak = seen.peak
        batch = token_batch(step, columns=first.columns, shared=first.shared)
        with Counted() as seen:
            one_link(term)(batch, {"link": memory}, {"link": 1.0}, always_the_same, first.affected, Watch())
        waits[name] = seen.waits
        if reads_numbers_alone(name):
            most = max(most, peak / step.ids.numel(), seen.peak / step.ids.numel())
    assert TOKEN_BYTES * 0.8 < most <= TOKEN_BYTES * 1.05 and math.isfinite(most)  # 5 %: what does not grow with tokens
    # a step of M micro-batches waits for none of those that read numbers alone; the finite check is judged once a step
    allowed = WAITS | dict.fromkeys(ONCE, 1)
    assert not {name: count for name, count in waits.items() if count > allowed.get(name, 0)}
