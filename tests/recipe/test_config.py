"""Every wrong entry of a recipe ends in one sentence with the culprit and what is allowed, before a model is loaded."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from trl import TrlParser

from hclm_rl import (
    Chain,
    Constant,
    Cosine,
    GRPOConfig,
    Linear,
    Link,
    RLOOConfig,
    StepToTarget,
    Term,
    build_chain,
    known_terms,
)
from hclm_rl.chain.coefficients import Schedule
from hclm_rl.recipe.config import find_term
from hclm_rl.terms.clip_cov import ClipCov
from hclm_rl.terms.entropy_bonus import EntropyBonus
from hclm_rl.terms.forking_tokens import ForkingTokens
from hclm_rl.terms.kl_cov import KlCov
from hclm_rl.terms.qae import Qae

HERE = __name__
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none"}


@dataclass(frozen=True, kw_only=True)
class Floor(Term):
    """A term of a user's own."""

    level: float
    patience: int = 3
    cap: float | None = None
    other: Optional[float] = None  # noqa: UP045  the older spelling of the same
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Wide(Term):
    """Fields of the kinds that no term of the library has."""

    anything: Any = None
    pair: tuple[int, str] = (1, "a")
    pairs: tuple[tuple[float, float], ...] = ()
    either: tuple[float, ...] | tuple[str, ...] = ()
    table: dict[str, float] = field(default_factory=dict)
    read: Callable[[str], int] = len


class Undecorated(Term):
    """Forgot @dataclass, so its fields would be none."""

    level: float = 0.1


class Stranger:
    """No term."""


def from_config(config_class: type, tmp_path: Path) -> Callable[[object], Chain]:
    def build(entries: object) -> Chain:
        config = config_class(output_dir=str(tmp_path), entropy_terms=entries, **QUIET)
        try:
            return build_chain(config.entropy_terms)
        except ValueError:
            pytest.fail("the config let it pass")

    return build


@pytest.fixture(params=["build_chain", "GRPOConfig", "RLOOConfig"])
def build(request, tmp_path) -> Callable[[object], Chain]:
    """The ways in which entries come: all must say the same."""
    classes = {"GRPOConfig": GRPOConfig, "RLOOConfig": RLOOConfig}
    return build_chain if request.param == "build_chain" else from_config(classes[request.param], tmp_path)


def the_link(name: str, term: Term, coef: object = None) -> Link:
    return Link(name=name, term=term, coef=Constant(coefficient=1.0) if coef is None else coef)


@pytest.mark.parametrize(
    "entries, links",
    [
        ([f"{HERE}.Wide"], [the_link("Wide", Wide())]),
        (
            [
                {
                    f"{HERE}.Wide": {
                        "anything": 3,
                        "pair": [2, "b"],
                        "pairs": [[1, 2]],
                        "either": ["a"],
                        "table": {"a": 1},
                    }
                }
            ],
            [the_link("Wide", Wide(anything=3, pair=(2, "b"), pairs=([1, 2],), either=("a",), table={"a": 1}))],
        ),
        (None, []),
        ([], []),
        (["qae"], [the_link("qae", Qae())]),
        ([{"qae": None}], [the_link("qae", Qae())]),  # YAML's `- qae:`
        ([{"clip_cov": {"ratio": 0.002, "lower": 1}}], [the_link("clip_cov", ClipCov(ratio=0.002, lower=1.0))]),
        ('[{"kl_cov": {"beta": 0.5, "name": "pull"}}]', [the_link("pull", KlCov(beta=0.5))]),
        ([Qae(quantile_k=0.6)], [the_link("qae", Qae(quantile_k=0.6))]),
        ([the_link("mine", Qae())], [the_link("mine", Qae())]),
        (["entropy_bonus"], [the_link("entropy_bonus", EntropyBonus(), Constant(coefficient=0.005))]),
        ([{"qae": {"coef": 0}}], [the_link("qae", Qae(), Constant(coefficient=0.0))]),
        (
            [{"qae": {"coef": {"kind": "linear", "start": 1, "end": 0.5}}}],
            [the_link("qae", Qae(), Linear(start=1.0, end=0.5))],
        ),
        (
            [{"qae": {"coef": {"kind": "cosine", "start": 1, "end": 0, "warmup": 0.1}}}],
            [the_link("qae", Qae(), Cosine(start=1.0, end=0.0, warmup=0.1))],
        ),
        (
            [{"entropy_bonus": {"coef": {"kind": "step_to_target", "target": 0.2, "rule": "paper"}}}],
            [the_link("entropy_bonus", EntropyBonus(), StepToTarget(target=0.2, rule="paper"))],
        ),
        ([{"qae": {"coef": Constant(coefficient=0.3)}}], [the_link("qae", Qae(), Constant(coefficient=0.3))]),
        (["qae", {"qae": {"name": "again"}}], [the_link("qae", Qae()), the_link("again", Qae())]),
        ([{f"{HERE}.Floor": {"level": 1}}], [the_link("Floor", Floor(level=1))]),
        (
            [{f"{HERE}.Floor": {"level": 1.0, "cap": None, "other": 0.5, "weights": [0.5, 1]}}],
            [the_link("Floor", Floor(level=1.0, other=0.5, weights=(0.5, 1)))],
        ),
    ],
)
def test_what_a_recipe_may_say(build, entries, links):
    assert build(entries) == Chain(tuple(links))


WRONG = [
    (["clipcov"], "unknown entropy term 'clipcov'; the nearest are clip_cov, "),
    (["kl_cof"], "unknown entropy term 'kl_cof'; the nearest are kl_cov, "),
    (["entropy_bonsu"], "the nearest are entropy_bonus, entropy_flow, entropy_balanced; `hclm-rl methods` lists all; "),
    (["nonsense"], "; a term of your own is named by its dotted path"),
    ([{"clip_cov": {"ration": 0.1}}], "clip_cov has no hyper-parameter 'ration'; the nearest are ratio, "),
    ([{"clip_cov": {"ration": 0.1}}], "; `hclm-rl methods clip_cov` shows all"),
    ([{"entropy_bonus": {"coeff": 0.1}}], "no hyper-parameter 'coeff'; the nearest are coef, by_difficulty, name; "),
    ([{"canon": {"coeff": 0.1}}], "canon has no hyper-parameter 'coeff'; the nearest are coef, "),
    ([{"canon": {"nam": "c"}}], "canon has no hyper-parameter 'nam'; the nearest are name, "),
    ([{"clip_cov": {"needs_scores": False}}], "clip_cov has no hyper-parameter 'needs_scores'; "),
    ([{"clip_cov": {"ratio": 2.0}}], "clip_cov: ratio must be in (0, 1], got 2.0"),
    ([{"kl_cov": {"beta": -1}}], "kl_cov: beta must be >= 0, got -1.0"),
    ([{"clip_cov": {"ratio": "1e-6"}}], "ratio must be float, got str '1e-6'; YAML reads 1e-6 as text, write 1.0e-6"),
    ([{f"{HERE}.Floor": {"level": 1.0, "cap": "1e-6"}}], "cap must be float | None, got str '1e-6'; YAML reads"),
    ([{"clip_cov": {"lower": 10**400}}], "clip_cov: int too large to convert to float"),
    ([{"clip_cov": {"ratio": True}}], "clip_cov: ratio must be float, got bool True"),
    ([{"information_force": {"spectrum_every": 2.5}}], "information_force: spectrum_every must be int, got float 2.5"),
    ([{"information_force": {"spectrum_every": True}}], "information_force: spectrum_every must be int, got bool True"),
    ([{"log_det": {"removes_radial": 1}}], "log_det: removes_radial must be bool, got int 1"),
    ([{"clip_cov": {"statistics": "batch"}}], "statistics must be one of 'step', 'micro_batch', got str 'batch'"),
    ([{f"{HERE}.Floor": {"level": 1.0, "weights": [1.0, "a"]}}], "weights must be tuple[float, ...], got list [1.0, "),
    ([{f"{HERE}.Floor": {"patience": 1}}], f"{HERE}.Floor needs level; got patience"),
    ([{f"{HERE}.Wide": {"pair": ["b", 2]}}], "pair must be tuple[int, str], got list ['b', 2]"),
    ([{f"{HERE}.Wide": {"pair": [2]}}], "pair must be tuple[int, str], got list [2]"),
    ([{f"{HERE}.Wide": {"either": [1.0, "a"]}}], "either must be tuple[float, ...] | tuple[str, ...], got list [1.0, "),
    ([{f"{HERE}.Wide": {"table": [1]}}], "table must be dict[str, float], got list [1]"),
    ([{f"{HERE}.Wide": {"read": 3}}], "read must be "),
    ([f"{HERE}.Floor"], f"{HERE}.Floor needs level; got nothing"),
    (["qae", "qae"], "two entropy terms are called 'qae'; give one of them another name, as in `- qae: {name: qae_2}`"),
    ([{"qae": {"name": "a/b"}}], "the name of an entropy term must be text without '/', got 'a/b'"),
    ([{"qae": {"name": 3}}], "qae: name must be text without '/', got 3"),
    ([{"qae": 0.4}], "qae: its hyper-parameters are a mapping, as in {coef: 0.5}, got 0.4"),
    ([{"qae": {}, "kl_cov": {}}], "an entry of entropy_terms is a name or one {name: {hyper-parameter: value}}, got "),
    ([{"qae": None, "quantile_k": 0.4}], "hyper-parameters are indented below the name, and each term "),
    ([{5: {}}], "an entry of entropy_terms is a name or one {name: {hyper-parameter: value}}, got {5: {}}"),
    ([{"clip_cov": {True: 0.1}}], "clip_cov has no hyper-parameter 'True'; the nearest are "),  # YAML's `on: 0.1`
    ([5], "an entry of entropy_terms is a name or one {name: {hyper-parameter: value}}, got 5"),
    ("[{'qae': {}}]", "entropy_terms on the command line is JSON, as in '[{\"clip_cov\": {}}]'; "),
    ("qae", "entropy_terms on the command line is JSON"),
    ('{"qae": {}}', "entropy_terms is a list, one entry a term, got dict {'qae': {}}"),
    ({"qae": {}}, "entropy_terms is a list, one entry a term, got dict {'qae': {}}"),
    (["nowhere.at.all.Floor"], "no entropy term at 'nowhere.at.all.Floor': No module named 'nowhere'"),
    ([f"{HERE}.Flor"], f"no entropy term at '{HERE}.Flor': "),
    ([f"{HERE}.Stranger"], f"'{HERE}.Stranger' is not an entropy term: it must be a frozen dataclass that subclasses "),
    ([f"{HERE}.Undecorated"], f"'{HERE}.Undecorated' is not an entropy term: it must be a frozen dataclass that "),
    ([f"{HERE}.find_term"], f"'{HERE}.find_term' is not an entropy term"),
    ([{"qae": {"coef": "1e-3"}}], "qae: coef: coef must be a number, got the string '1e-3': PyYAML reads"),
    ([{"qae": {"coef": True}}], "qae: coef: coef must be a number, got True"),
    ([{"qae": {"coef": math.nan}}], "qae: coef: coef must be finite, got nan"),
    ([{"qae": {"coef": {"kind": "linar"}}}], "qae: coef: coef needs a known kind, got 'linar'; known: linear, "),
    ([{"qae": {"coef": {"start": 1.0}}}], "qae: coef: coef needs a known kind, got None"),
    ([{"qae": {"coef": {"kind": "linear", "start": 1}}}], "qae: coef: a linear coef needs end; got {'start': 1}"),
    ([{"qae": {"coef": {"kind": "linear", "stat": 1}}}], "qae: coef: a linear coef has no 'stat'; it has: start, "),
    ([{"qae": {"coef": {"kind": "constant", "coefficient": "1e-6"}}}], "coefficient must be a number, got the "),
]  # fmt: skip


@pytest.mark.parametrize("entries, sentence", WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_what_a_recipe_may_not_say(build, entries, sentence):
    with pytest.raises(ValueError) as error:
        build(entries)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "theirs, key", [({"entropy_coef": 0.01}, "entropy_coef"), ({"use_adaptive_entropy": True}, "use_adaptive_entropy")]
)
def test_two_controls_of_one_entropy(theirs, key, tmp_path):
    with pytest.raises(ValueError) as error:
        GRPOConfig(output_dir=str(tmp_path), entropy_terms=["qae"], **theirs, **QUIET)
    assert str(error.value) == (
        f"TRL's {key} beside entropy_terms: the two would fight over one entropy; drop {key} and add the term "
        "`entropy_bonus` (its coef is a number, or {kind: step_to_target, target: ...} for the adaptive one)"
    )
    assert GRPOConfig(output_dir=str(tmp_path), **theirs, **QUIET).entropy_terms is None


def test_trls_mask_of_certain_tokens_goes_with_other_terms_only(tmp_path):
    with pytest.raises(ValueError, match="top_entropy_quantile beside forking_tokens selects tokens twice"):
        GRPOConfig(output_dir=str(tmp_path), entropy_terms=["forking_tokens"], top_entropy_quantile=0.2, **QUIET)
    GRPOConfig(output_dir=str(tmp_path), entropy_terms=["qae"], top_entropy_quantile=0.2, **QUIET)


RECIPE = """
use_cpu: true
bf16: false
report_to: none
entropy_terms:
  - clip_cov: {ratio: 2.0e-3}
  - entropy_bonus:
      coef: {kind: step_to_target, target: 0.2}
  - qae
"""
IN_RECIPE = (
    the_link("clip_cov", ClipCov(ratio=0.002)),
    the_link("entropy_bonus", EntropyBonus(), StepToTarget(target=0.2)),
    the_link("qae", Qae()),
)


def parsed(config_class: type, tmp_path: Path, recipe: str, *words: str) -> Chain:
    (tmp_path / "recipe.yaml").write_text(f"output_dir: {tmp_path}\n{recipe}")
    (config,) = TrlParser([config_class]).parse_args_and_config(["--config", str(tmp_path / "recipe.yaml"), *words])
    return build_chain(config.entropy_terms)


@pytest.mark.parametrize("config_class", [GRPOConfig, RLOOConfig])
def test_from_a_yaml_file_and_from_the_command_line(config_class, tmp_path):
    assert parsed(config_class, tmp_path, RECIPE) == Chain(IN_RECIPE)
    words = ("--entropy_terms", '[{"kl_cov": {"beta": 0.5}}, "qae"]')
    assert parsed(config_class, tmp_path, RECIPE, *words).links == (the_link("kl_cov", KlCov(beta=0.5)), IN_RECIPE[2])
    assert parsed(config_class, tmp_path, "use_cpu: true\nbf16: false") == Chain()


@pytest.mark.parametrize("config_class", [GRPOConfig, RLOOConfig])
def test_mistakes_in_yaml_and_on_the_command_line(config_class, tmp_path):
    with pytest.raises(ValueError, match="YAML reads 1e-6 as text"):
        parsed(config_class, tmp_path, RECIPE.replace("2.0e-3", "1e-6"))
    with pytest.raises(ValueError, match="is JSON"):
        parsed(config_class, tmp_path, RECIPE, "--entropy_terms", "clip_cov")


@pytest.mark.parametrize("config_class", [GRPOConfig, RLOOConfig])
@pytest.mark.parametrize(
    "entries",
    [
        None,
        ["qae", {"clip_cov": {"ratio": 0.5}}],
        '[{"clip_cov": {"ratio": 0.5}}]',
        [ClipCov(ratio=0.5), ForkingTokens()],
        [Link(name="x", term=Floor(level=0.1, weights=(1.0, 2.0)), coef=Cosine(start=1.0, end=0.0))],
        [{"entropy_bonus": {"coef": StepToTarget(target=0.3)}}],
    ],
)
def test_a_config_is_written_as_a_recipe_that_means_the_same(config_class, entries, tmp_path):
    config = config_class(output_dir=str(tmp_path), entropy_terms=entries, **QUIET)
    written = json.loads(config.to_json_string())["entropy_terms"]
    assert written == json.loads(json.dumps(config.to_dict()["entropy_terms"]))
    assert build_chain(written) == build_chain(entries)


class Jump(Schedule):
    """A coefficient of a user's own, which no recipe has a word for."""

    def value(self, progress: float, state: dict, entropy: float | None = None) -> float:
        return float(progress > 0.5)

    def __repr__(self) -> str:
        return "Jump()"


def test_a_coefficient_of_ones_own_is_written_as_its_repr(tmp_path):
    config = GRPOConfig(output_dir=str(tmp_path), entropy_terms=[{"qae": {"coef": Jump()}}], **QUIET)
    assert json.loads(config.to_json_string())["entropy_terms"] == [{"qae": {"coef": "Jump()"}}]


def test_the_terms_are_the_files():
    assert known_terms() == sorted(known_terms()) and "clip_cov" in known_terms()
    assert find_term("forking_tokens") is ForkingTokens and find_term(f"{HERE}.Floor") is Floor


@dataclass(frozen=True, kw_only=True)
class Mine(Term):
    """A term that checks nothing itself, and whose types nothing checks where it is made."""

    form: Literal["a", "b"] = "a"
    size: float = 1.0
    count: int | None = None
    most: float = math.inf


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"form": "c"}, "form must be one of 'a', 'b', got str 'c'"),
        ({"size": math.inf}, "size must be finite, got inf"),
        ({"size": math.nan}, "size must be finite, got nan"),
        ({"count": 2.5}, "count must be int | None, got float 2.5"),
    ],
)
def test_a_term_made_in_python_is_checked_like_a_recipe(given, sentence):
    for entry, name in (
        (Mine(**given), "Mine"),
        (Link(name="own", term=Mine(**given), coef=Constant(coefficient=1.0)), "own"),
    ):
        with pytest.raises(ValueError) as error:
            build_chain([entry])
        assert str(error.value) == f"{name}: {sentence}"


def test_infinity_is_refused_in_recipes_too_but_where_it_is_the_default():
    with pytest.raises(ValueError, match="epo: alpha must be finite, got inf"):
        build_chain([{"epo": {"alpha": math.inf}}])
    build_chain([{"force_reweight": {"high": math.inf}}, Mine(most=math.inf)])
