"""The rollouts by themselves: the worked examples of their sources, whole groups on a toy model, and bad values."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hclm_rl.rollouts
from hclm_rl.recipe.rollout import ROLLOUTS, as_words, build_rollout, name_of
from hclm_rl.rollouts import Asked, Response, RolloutStrategy, Sampler
from hclm_rl.rollouts.arpo import Arpo
from hclm_rl.rollouts.arpo import begins as arpo_begins
from hclm_rl.rollouts.checks import checked
from hclm_rl.rollouts.cure import Cure, candidates
from hclm_rl.rollouts.entropy_balanced import EntropyBalanced, fresh
from hclm_rl.rollouts.entropy_balanced import begins as balanced_begins
from hclm_rl.rollouts.entropy_fork import EntropyFork, most_uncertain
from hclm_rl.rollouts.trees import segment_entropy, shared_credit


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=7,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def asked_of(model: LlamaForCausalLM, responses: int, longest: int = 6) -> Asked:
    tokenizer = SimpleNamespace(all_special_ids=[0, 1], decode=lambda ids: " word" if ids[0] > 2 else "x")
    return Asked(
        prompts=[[2, 3, 4], [5, 6]],
        responses=responses,
        longest=longest,
        sampler=Sampler(model=model, ends=[1], pad=0, longest=longest),
        stream=lambda *names: random.Random(repr(names)),
        raw=["2 3 4", "5 6"],
        encode=lambda text: [int(word) for word in text.split()],
        tokenizer=tokenizer,
    )


# ---- CURE


def test_cures_candidates_are_those_of_its_source():
    texts = ["Let", " x", " however", ",", " so", " the", "<eos>"]
    entropies, special = [2.5, 0.1, 1.8, 0.9, 3.0, 1.2, 2.2], [False] * 6 + [True]
    assert candidates(entropies, texts, special, 2, 2) == [4, 2]
    assert candidates(entropies, texts, special, 20, 2) == [4, 2, 5]
    assert candidates(entropies, texts, special, 20, 1) == [4, 2, 5, 3, 1]
    assert candidates([1.0, 2.0, 3.0], ["7", "+", "<eos>"], [False, False, True], 20, 2) == []


def test_a_group_of_cure_is_originals_and_their_branches(model: LlamaForCausalLM):
    asked = asked_of(model, responses=6)
    responses = checked("cure", Cure(branches=2, top=3)(asked), asked, words=7)
    for start in (0, 6):
        group = responses[start : start + 6]
        originals, branches = group[:2], group[2:]
        assert all(each.is_trained == [True] * len(each.ids) for each in originals)
        for k, branch in enumerate(branches):
            parent = originals[k // 2]
            first = list(branch.is_trained or []).index(True)  # the prefix counts as prompt
            assert branch.ids[:first] == parent.ids[:first] and all(list(branch.is_trained or [])[first:])
            assert first == 0 or parent.ids[first] > 2  # the critical token is no short word, no special one
            assert branch.logps[:first] == parent.logps[:first]
    drawn = sum(map(sum, (each.is_trained or [] for each in responses)))
    assert asked.sampler.counts.drawn == drawn < sum(len(each.ids) for each in responses)
    assert len(asked.notes["fork"]) == 4


def test_the_prefix_is_trained_where_asked(model: LlamaForCausalLM):
    asked = asked_of(model, responses=4)
    assert all(all(each.is_trained or []) for each in Cure(branches=1, top=3, trains_prefix=True)(asked))


# ---- entropy_fork


def test_forks_are_at_the_largest_entropies():
    assert most_uncertain([0.4, 1.9, 0.2, 1.1], 2) == [1, 3]  # the card's
    assert most_uncertain([1.0, 2.0, 2.0], 2) == [1, 2]
    assert EntropyFork(forks=2, branches=2).leaves * 12 == 60  # the paper's 12 trees


def test_a_group_of_entropy_fork_is_trees(model: LlamaForCausalLM):
    asked = asked_of(model, responses=10)
    responses = checked("entropy_fork", EntropyFork(forks=2, branches=2)(asked), asked, words=7)
    assert all(all(each.is_trained or []) for each in responses)
    saved = 0
    for start in range(0, 20, 5):
        root, *leaves = responses[start : start + 5]
        entropies = [-(logps.exp() * logps).sum().item() for logps in steps_of(model, asked.prompts[start // 10], root)]
        places = most_uncertain(entropies, 2)
        for k, leaf in enumerate(leaves):
            at = places[k // 2 % len(places)]
            assert leaf.ids[:at] == root.ids[:at] and leaf.logps[:at] == root.logps[:at]
            saved += at
    # measured in the sampler: what the leaves took over was not drawn
    assert asked.sampler.counts.drawn == sum(len(each.ids) for each in responses) - saved and saved > 0


def steps_of(model: LlamaForCausalLM, prompt: list[int], response: Response) -> list[torch.Tensor]:
    ids = torch.tensor([[*prompt, *response.ids]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].log_softmax(dim=-1)
    return list(logps[len(prompt) - 1 : -1])


# ---- ARPO and AEPO


def entropies_of(*tokens: tuple[float, ...]) -> list[float]:
    return [-sum(p * math.log(p) for p in each) for each in tokens]


def test_the_entropy_of_a_segment_is_that_of_the_source():
    first = entropies_of((0.9, 0.05, 0.03), (0.8, 0.1, 0.05))
    later = entropies_of((0.4, 0.3, 0.2), (0.5, 0.2, 0.1))
    assert segment_entropy(first, 1000, 20, "sum") == pytest.approx(0.131500, abs=1e-6)
    assert segment_entropy(later, 1000, 20, "sum") == pytest.approx(0.282048, abs=1e-6)
    assert segment_entropy(later, 1000, 20, "mean") == pytest.approx(0.141024, abs=1e-6)
    assert segment_entropy(later, 1000, 1, "sum") == pytest.approx(later[0] / math.log(1000))
    assert segment_entropy([], 1000, 20, "mean") == 0


def test_arpo_branches_as_in_the_source():
    change = 0.282048 - 0.131500
    # probability 0.5 + 0.2 * 0.150548 = 0.530110
    assert [arpo_begins(change, u, 0.2, 0.5) for u in (0.52, 0.53, 0.54)] == [True, True, False]


def test_shared_tokens_get_the_mean_of_their_rows():
    advantages = torch.tensor([1.499997, -0.499999, -0.499999, -0.499999])[:, None].repeat(1, 4)
    # rows 0 and 1 share two tokens
    found = shared_credit(advantages, torch.tensor([-1, 0, -1, -1]), torch.tensor([0, 2, 0, 0]))
    expected = torch.tensor([[0.499999] * 2 + [1.499997] * 2, [0.499999] * 2 + [-0.499999] * 2])
    torch.testing.assert_close(found[:2], expected)
    assert torch.equal(found[2:], advantages[2:])


def test_a_branch_of_a_branch_shares_with_both():
    advantages = torch.tensor([3.0, 0.0, -3.0])[:, None].repeat(1, 3)
    # row 1 leaves row 0 after one token, row 2 leaves row 1 after two: token 0 is in all three, token 1 in rows 1 and 2
    found = shared_credit(advantages, torch.tensor([-1, 0, 1]), torch.tensor([0, 1, 2]))
    assert found.tolist() == [[0.0, 3.0, 3.0], [0.0, -1.5, 0.0], [0.0, -1.5, -3.0]]


def test_the_budget_of_the_balanced_rollout_is_that_of_the_source():
    # 12 sigmoid(0.5 (0.9 - 1.7)) = 4.815748
    assert fresh(12, 0.9, 1.7, 0.5) == 5
    assert fresh(12, 50.0, 0.0, 1.0) == 12 and fresh(12, 0.0, 50.0, 1.0) == 1
    assert fresh(8, 0.0, 16.0, 50.0) == 1  # e^800 is no float


@pytest.mark.parametrize(("in_a_row", "probability"), [(0, 0.56), (2, 0.504444), (10, 0.06)])
def test_branches_in_a_row_get_rarer(in_a_row: int, probability: float):
    # gamma dH = 0.06; a branch where u is above 1 - probability
    edge = 1 - probability
    assert balanced_begins(0.3, edge + 1e-4, in_a_row, 0.2, 0.5, 0.05)
    assert not balanced_begins(0.3, edge - 1e-4, in_a_row, 0.2, 0.5, 0.05)
    assert not balanced_begins(9.0, 0.999, 20, 0.2, 0.5, 0.05)


class Echo:
    """Tools that reply `5` to the first two turns of a response."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.copied = 0

    def begin(self, branch, prompt: int) -> None:
        self.begun.append(prompt)
        branch.talk = [0]

    def copy(self, branch) -> None:
        self.copied += 1
        branch.talk = list(branch.parent.talk)

    def reply(self, branches):
        for branch in branches:
            branch.talk[0] += 1
        return [[5] if branch.talk[0] < 3 else None for branch in branches]


@pytest.mark.parametrize("strategy", [Arpo(), Arpo(beam=3), EntropyBalanced(), Arpo(beam=1), Arpo(initial=0.01)])
def test_a_budget_is_spent_exactly(strategy: RolloutStrategy, model: LlamaForCausalLM):
    tools = Echo()
    asked = asked_of(model, responses=8, longest=12)
    asked = Asked(**{**vars(asked), "tools": tools})
    responses = checked("it", strategy(asked), asked, words=7)
    assert len(tools.begun) + tools.copied == len(responses) == 16
    assert tools.copied == (0 if strategy == Arpo(beam=1) else sum(asked.notes["branched"])) and sum(tools.begun) >= 1
    for each in responses:
        written = [t for t, own in enumerate(each.is_trained or []) if not own]
        assert all(each.ids[t] == 5 and each.logps[t] == 0 for t in written) and len(written) <= 2
    own = sum(map(sum, (each.is_trained or [] for each in responses)))
    assert asked.sampler.counts.drawn == own if not tools.copied else asked.sampler.counts.drawn < own


# ---- words and bad values


def test_every_name_of_the_library_is_a_rollout():
    names = [name for name in ROLLOUTS if (Path(hclm_rl.rollouts.__path__[0]) / f"{name}.py").is_file()]
    assert {"arpo", "cure", "entropy_balanced", "entropy_fork"} <= set(names)
    for name in names:
        rollout = build_rollout(name)
        assert rollout is not None and name_of(rollout) == name and build_rollout(as_words(rollout)) == rollout


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"cure": {"branches": 0}}, "cure: branches must be at least 1, got 0"),
        ({"cure": {"top": 0}}, "cure: top must be at least 1, got 0"),
        ({"cure": {"least_characters": -1}}, "cure: least_characters must be at least 0, got -1"),
        ({"cure": {"tops": 3}}, "cure has no hyper-parameter 'tops'; the nearest are top"),
        ({"cure": {"top": 1.5}}, "cure: top must be int, got float 1.5"),
        ({"entropy_fork": {"forks": 0}}, "entropy_fork: forks must be at least 1, got 0"),
        ({"arpo": {"initial": 0.0}}, r"arpo: initial must be in \(0, 1\], got 0.0"),
        ({"arpo": {"threshold": 2.0}}, r"arpo: threshold must be in \[0, 1\], got 2.0"),
        ({"arpo": {"beam": 0}}, "arpo: beam must be at least 1, got 0"),
        ({"arpo": {"reduction": "max"}}, "arpo: reduction must be .*'sum'.*'mean'.*, got str 'max'"),
        ({"arpo": {"weight": float("nan")}}, "arpo: weight must be finite, got nan"),
        ({"entropy_balanced": {"beta": -1.0}}, "entropy_balanced: beta must be at least 0 and finite, got -1.0"),
        ({"entropy_balanced": {"penalty": 1.5}}, r"entropy_balanced: penalty must be in \[0, 1\], got 1.5"),
        ("cures", "rollout: unknown name 'cures'; it must be one of .*cure"),
        (7, "rollout is a name or one {name: {hyper-parameter: value}}, got 7"),
        ({"cure": {}, "arpo": {}}, "rollout is a name or one"),
        ("{cure", "rollout on the command line is a name or JSON"),
        ("os.path.join", "'os.path.join' is not a rollout: it must be a frozen dataclass that subclasses"),
        ("no_such_module.Thing", "no rollout at 'no_such_module.Thing'"),
        (RolloutStrategy(), "rollout is a name or one"),
    ],
)
def test_a_wrong_word_is_one_sentence(entry: object, sentence: str):
    with pytest.raises(ValueError, match=sentence) as caught:
        build_rollout(entry)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "wrong", "sentence"),
    [
        (Arpo, {"weight": math.nan}, "weight must be finite, got nan"),
        (Arpo, {"reduction": "max"}, "reduction must be 'sum' or 'mean', got 'max'"),
        (Arpo, {"attribution": "both"}, "attribution must be 'soft' or 'hard', got 'both'"),
        (EntropyBalanced, {"gamma": math.inf}, "gamma must be at least 0 and finite, got inf"),
        (EntropyBalanced, {"beta": math.nan}, "beta must be at least 0 and finite, got nan"),
        (EntropyBalanced, {"reduction": "max"}, "reduction must be 'sum' or 'mean', got 'max'"),
    ],
)
def test_a_wrong_value_in_python_is_refused_too(kind: type, wrong: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        kind(**wrong)


@pytest.mark.parametrize(
    ("strategy", "responses", "sentence"),
    [
        (Cure(), 6, "cure: num_generations must be a multiple of 1 [+] branches, 4, got 6"),
        (EntropyFork(), 16, "entropy_fork: num_generations must be a multiple of 1 [+] forks x branches, 5, got 16"),
    ],
)
def test_a_group_that_does_not_fit_is_refused(strategy: RolloutStrategy, responses: int, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        strategy.check(responses)


GOOD = Response(ids=[2, 3], logps=[-1.0, -0.5])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (Response(ids=[], logps=[]), "has no token; at least one is needed"),
        (Response(ids=[2] * 7, logps=[-1.0] * 7), "has 7 tokens; at most max_completion_length, 6, are allowed"),
        (Response(ids=[2, 7], logps=[-1.0] * 2), "token 7 is no id of the vocabulary; ids are ints from 0 to 6"),
        (Response(ids=[2, 3.0], logps=[-1.0] * 2), "token 3.0 is no id of the vocabulary"),
        (Response(ids=[2], logps=[-1.0], prompt=[]), "prompt: has no token; at least one is needed"),
        (Response(ids=[2], logps=[-1.0], prompt=[-1]), "prompt: token -1 is no id of the vocabulary"),
        (Response(ids=torch.tensor([2, 3]), logps=[-1.0] * 2), "ids must be a list, got Tensor"),
        (Response(ids=[2, 3], logps=torch.tensor([-1.0, -1.0])), "logps must be a list, got Tensor"),
        (Response(ids=[2], logps=[-1.0], prompt=torch.tensor([2, 3])), "prompt must be a list, got Tensor"),
        (Response(ids=[2], logps=[-1.0], is_trained=torch.tensor([True])), "is_trained must be a list, got Tensor"),
        (Response(ids="23", logps=[-1.0] * 2), "ids must be a list, got str"),
        (Response(ids=[2], logps=[-1.0], columns=[1]), "columns must be a mapping, got list"),
        (Response(ids=[2, 3], logps=None), "has no log-probs; one for each of its 2 tokens is needed"),
        (Response(ids=[2, 3], logps=[-1.0]), "has 1 log-probs for 2 tokens; one for each is needed"),
        (Response(ids=[2, 3], logps=[-1.0, math.nan]), "the log-prob of token 1 is nan; finite numbers of at most 0"),
        (Response(ids=[2, 3], logps=[-math.inf, -1.0]), "the log-prob of token 0 is -inf; finite numbers of at most 0"),
        (Response(ids=[2, 3], logps=[-1.0, 0.5]), "the log-prob of token 1 is 0.5; finite numbers of at most 0"),
        (Response(ids=[2, 3], logps=[-1.0, None]), "the log-prob of token 1 is None; finite numbers of at most 0"),
        (Response(ids=[2, 3], logps=[-1.0, -1.0], is_trained=[True]), "is_trained has 1 values for 2 tokens"),
        (Response(ids=[2, 3], logps=[-1.0, -1.0], columns={"aux": 1}), r"has the columns \['aux'\] and response 0"),
    ],
)
def test_a_wrong_response_is_named_with_its_number(wrong: Response, sentence: str, model: LlamaForCausalLM):
    asked = asked_of(model, responses=2)
    with pytest.raises(ValueError, match=f"^the rollout 'mine', response 2 of 4 .counted from 0.: {sentence}"):
        checked("mine", [GOOD, GOOD, wrong, GOOD], asked, words=7)
    assert checked("mine", [GOOD] * 4, asked, words=7) == [GOOD] * 4


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([GOOD] * 3, "returned 3 responses; it must return 4, 2 to each of 2 prompts: response 3 is the first that is"),
        (
            [GOOD] * 5,
            "returned 5 responses; it must return 4, 2 to each of 2 prompts: response 4 is the first too many",
        ),
        (None, "must return a list of Response, got NoneType"),
        ([GOOD, {"ids": [2]}], "must return a list of Response, got Response, dict"),
    ],
)
def test_a_wrong_number_of_responses_is_refused(given: object, sentence: str, model: LlamaForCausalLM):
    with pytest.raises(ValueError, match=f"^the rollout 'mine' {sentence}"):
        checked("mine", given, asked_of(model, responses=2), words=7)
