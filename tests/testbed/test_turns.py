"""Several turns for real: TRL runs the tool, masks its tokens, and every term that knows turns trains on it."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import is_chat_template_prefix_preserving, parse_response, supports_tool_calling

import hclm_rl
from hclm_rl.commands.launch import main
from hclm_rl.responses.answers import own_last_words
from hclm_rl.responses.turns import number_turns, tokens_by_turn
from hclm_rl.testbed import find_task
from hclm_rl.testbed.hidden_number import (
    MAX_COMPLETION_LENGTH,
    QUESTIONS,
    HiddenNumber,
    Problem,
    compare,
    found_number,
    random_problems,
    random_transcript,
)
from hclm_rl.testbed.hidden_number_policy import new_tokenizer, own_words, warm_start
from hclm_rl.watch.meanings import meanings
from tests.rollouts.test_seam import TERMS as CHAINS
from tests.rollouts.vllm_stand_in import install
from tests.tiny import settings


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy that has just learnt to call the tool and to answer."""
    folder = str(tmp_path_factory.mktemp("talker"))
    warm_start(folder, steps=150, transcripts=1000, width=32, layers=1)
    return folder


SEEN: list[dict] = []


def closeness(prompts: list, completions: list[list[dict]], hidden: list[int], **_) -> list[float]:
    """A graded reward, so that hardly any group is all alike: 1 less the distance to the hidden number."""
    said = [messages[-1].get("content", "").split() for messages in completions]
    number = [int(words[1]) if len(words) == 2 and words[1].isdigit() else 99 for words in said]
    return [max(0.0, 1 - abs(x - y) / 32) for x, y in zip(number, hidden, strict=True)]


class Watching(hclm_rl.GRPOTrainer):
    """Keeps what each generation batch held."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        SEEN.append(output)
        return output


def make(policy: str, out: Path, terms: list, **changes) -> Watching:
    task = find_task("hidden_number", prompts=16)
    config = hclm_rl.GRPOConfig(
        output_dir=str(out),
        entropy_terms=terms,
        **settings(
            max_completion_length=MAX_COMPLETION_LENGTH,
            max_tool_calling_iterations=QUESTIONS,
            per_device_train_batch_size=16,
            num_generations=8,
            **changes,
        ),
    )
    SEEN.clear()
    return Watching(
        model=policy,
        reward_funcs=[*task.reward_funcs, closeness],
        args=config,
        train_dataset=task.train_dataset,
        environment_factory=task.environment,
    )


TERMS = {
    "empg": {},
    "epo": {"coef": 0.1},
    "hicra": {"grams": ["call ask number"]},
    "self_imitation": {"buffer": 1, "warm_up": 1, "keep_steps": 3},
    "tool_bonus": {},
    "info_po": {"temperature": 1.0, "template_before": 1, "template_after": 1},
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_trains_on_turns(name: str, talker: str, tmp_path: Path):
    trainer = make(talker, tmp_path, [{name: TERMS[name]}], max_steps=3)
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    for entry in logs:
        assert all(torch.tensor(float(value)).isfinite() for value in entry.values())
        assert float(entry["tools/call_frequency"]) > 0.25  # a question in every fourth response at least
    assert max(float(entry[f"{name}/affected"]) for entry in logs) > 0
    assert any((before[key] != value).any() for key, value in trainer.model.named_parameters())


def test_the_tool_answers_and_its_tokens_are_masked(talker: str, tmp_path: Path):
    trainer = make(talker, tmp_path, ["empg"], max_steps=1)
    trainer.train()
    tokenizer, [batch] = trainer.processing_class, SEEN
    mask = batch["tool_mask"].bool() & batch["completion_mask"].bool()
    replies = {tokenizer.convert_tokens_to_ids(word) for word in ("higher", "lower", "right")}
    several = 0
    for ids, own, present in zip(batch["completion_ids"], mask, batch["completion_mask"].bool(), strict=True):
        words = tokenizer.convert_ids_to_tokens(ids.tolist())
        for t in (present & ~own).nonzero().squeeze(1).tolist():
            # `: reply >`; what a tool says of an error is mostly unknown words
            assert words[t] not in ("call", "ask", "say", "<eos>", "<pad>"), words
        turns = tokens_by_turn(number_turns(own.unsqueeze(0)))[0]
        calls = sum(word == "call" for word, counts in zip(words, own.tolist(), strict=True) if counts)
        several += len(turns) > 1 and calls > 0
        assert int((turns > 0).sum()) <= QUESTIONS + 1
    assert several > 4
    written = batch["completion_ids"][batch["completion_mask"].bool() & ~mask]
    assert sum(token in replies for token in written.tolist()) > 4


def test_the_reply_is_that_of_the_rows_environment(talker: str, tmp_path: Path):
    trainer = make(talker, tmp_path, ["empg"], max_steps=1)
    trainer.train()
    tokenizer, [batch] = trainer.processing_class, SEEN
    hidden = [environment._hidden for environment in trainer.environments]
    texts = [tokenizer.decode(ids[counts.bool()]) for ids, counts in
             zip(batch["completion_ids"], batch["completion_mask"], strict=True)]  # fmt: skip
    checked = 0
    for number, text in zip(hidden, texts, strict=True):
        for turn in text.split("call ask number ")[1:]:
            words = turn.split()
            if words[1:3] == ["<eos>", ":"] and words[0].isdigit():
                assert words[3] == compare(int(words[0]), number), text
                checked += 1
    assert checked > 4


def test_what_the_policy_says_is_what_is_trained():
    tokenizer = new_tokenizer()
    text = "3 14 > call ask number 7 <eos> : higher > say 9 <eos> <pad>"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    own = [word for word, counts in zip(text.split(), own_words(ids, tokenizer)[0].tolist(), strict=True) if counts]
    assert " ".join(own) == "call ask number 7 <eos> say 9 <eos>"


def test_text_and_messages_are_one_another():
    tokenizer, source = new_tokenizer(), random.Random(0)
    assert supports_tool_calling(tokenizer) and is_chat_template_prefix_preserving(tokenizer)
    for problem, _ in zip(random_problems("train", 0), range(20), strict=False):
        messages = random_transcript(problem, source)
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        assert text.split()[:3] == [str(problem.low), str(problem.high), ">"]
        for message in messages:
            if message["role"] == "assistant":
                turn = str(tokenizer.apply_chat_template([message], tokenize=False))
                prefix = tokenizer(f"{problem.low} {problem.high} >")["input_ids"]
                parsed = parse_response(
                    tokenizer, tokenizer(turn)["input_ids"], prefix=prefix, tools=[HiddenNumber().ask]
                )
                assert parsed == message


def test_the_tokenizer_survives_saving(talker: str):
    tokenizer = AutoTokenizer.from_pretrained(talker)
    assert supports_tool_calling(tokenizer) and tokenizer.response_template == new_tokenizer().response_template


def test_transcripts_know_only_what_was_said():
    source = random.Random(1)
    for problem, _ in zip(random_problems("train", 1), range(200), strict=False):
        messages, left = random_transcript(problem, source), set(range(problem.low, problem.high + 1))
        for call, reply in zip(messages[1:-1:2], messages[2:-1:2], strict=True):
            number = call["tool_calls"][0]["function"]["arguments"]["number"]
            assert number in left and reply["content"] == compare(number, problem.hidden)
            left = {each for each in left if compare(number, each) == reply["content"]}
        assert int(messages[-1]["content"].split()[1]) in left


def test_the_reward_reads_the_last_turn():
    said = [{"role": "assistant", "content": "say 9"}]
    asked = [{"role": "assistant", "content": "", "tool_calls": []}, {"role": "tool", "name": "ask", "content": "9"}]
    completions = [said, [*asked, *said], asked, [], [{"role": "assistant", "content": "9"}]]
    assert found_number([], completions, hidden=[9, 9, 9, 9, 9]) == [1, 1, 0, 0, 0]
    assert found_number([], [said], hidden=[8]) == [0]


def test_splits_share_no_problem():
    seen = {split: {p for p, _ in zip(random_problems(split, 0), range(400), strict=False)}
            for split in ("train", "validation", "test")}  # fmt: skip
    assert not (seen["train"] & seen["test"] or seen["train"] & seen["validation"] or seen["test"] & seen["validation"])
    assert all(isinstance(each, Problem) and each.low <= each.hidden <= each.high for each in seen["train"])


LAUNCHED = ["--task", "hidden_number", "--task_kwargs", '{"prompts": 8, "eval_prompts": 6}', "--bf16", "false"]


def test_the_launcher_says_what_tools_exclude(talker: str, tmp_path: Path, capsys):
    assert main("rloo", [*LAUNCHED, "--model_name_or_path", talker, "--output_dir", str(tmp_path)]) == 2
    assert "has tools, which TRL's RLOO trainer does not run" in capsys.readouterr().err


def test_held_out_responses_use_the_tools_and_leave_training_as_it_was(talker: str, tmp_path: Path):
    line = [*LAUNCHED, "--model_name_or_path", talker, "--reward_funcs", f"{__name__}.closeness"]
    line += ["--max_steps", "2", "--num_generations", "4", "--per_device_train_batch_size", "8"]
    line += ["--learning_rate", "0.01", "--max_tool_calling_iterations", "2"]
    line += ["--use_cpu", "true", "--logging_steps", "1"]
    line += ["--allow_custom_code", "true"]
    line += ["--eval_batch", "10"]  # neither of whole prompts nor of groups
    logs, after = [], None
    for samples in ("0", "4"):
        out = tmp_path / samples
        assert main("grpo", [*line, "--output_dir", str(out), "--eval_samples", samples]) == 0
        entries = [json.loads(entry) for entry in (out / "log.jsonl").read_text().splitlines()]
        logs.append([{key: entry.get(key) for key in ("loss", "reward", "entropy", "grad_norm")} for entry in entries])
        after = json.loads((out / "summary.json").read_text())["after"]
    assert logs[0] == logs[1] and all(entry["grad_norm"] for entry in logs[0][:2])
    assert after["prompts"] == 6 and after["samples"] == 4 and 0 < after["means"]["token_entropy"] < 5


def test_held_out_responses_are_those_of_trl(talker: str, tmp_path: Path):
    trainer = make(talker, tmp_path, [])
    rows = list(find_task("hidden_number", prompts=1, eval_prompts=12).eval_dataset)
    SEEN.clear()
    trainer.model.train()
    before = torch.get_rng_state(), trainer.num_generations_eval
    said = trainer.sample_responses(rows, batch=5, seed=3)
    assert torch.equal(torch.get_rng_state(), before[0]) and trainer.num_generations_eval == before[1]
    assert trainer.model.training and not trainer._metrics["eval"]
    assert [len(each["completion_ids"]) for each in SEEN] == [5, 5, 2]
    assert any(message["role"] == "tool" for messages in said.completions for message in messages)
    own = [batch["completion_mask"] * batch["tool_mask"] for batch in SEEN]
    assert said.lengths == torch.cat([mask.sum(dim=1) for mask in own]).tolist()
    # the entropies, by a forward pass of the bare model
    model = AutoModelForCausalLM.from_pretrained(talker).eval()
    sums = []
    for batch, mask in zip(SEEN, own, strict=True):
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        present = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=present).logits[:, -mask.size(1) - 1 : -1]
        sums += (torch.distributions.Categorical(logits=logits).entropy() * mask).sum(dim=1).tolist()
    assert said.entropy_sums == pytest.approx(sums, rel=1e-4, abs=1e-5)
    again = trainer.sample_responses(rows, batch=5, seed=3)
    assert again == said != trainer.sample_responses(rows, batch=5, seed=4)


def test_a_response_that_ends_with_a_tool_says_nothing():
    tool = {"role": "tool", "name": "ask", "content": "say 9"}
    said = {"role": "assistant", "content": "say 9"}
    assert [own_last_words(each) for each in ([said], [tool, said], [said, tool], [])] == ["say 9", "say 9", "", ""]


# ---- rollouts that branch behind the tool's replies

BRANCHING = [{"arpo": {"beam": 3}}, {"arpo": {"beam": 3, "attribution": "hard"}}, "entropy_balanced"]


@pytest.mark.parametrize("use_vllm", [False, True], ids=["transformers", "vllm"])
@pytest.mark.parametrize("rollout", BRANCHING, ids=["soft", "hard", "balanced"])
def test_a_branch_has_a_copy_of_the_environment_and_the_reply(
    rollout: object, use_vllm: bool, talker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if use_vllm:
        install(monkeypatch, end=None, context=1000)
    trainer = make(talker, tmp_path, ["empg"], max_steps=2, rollout=rollout, use_vllm=use_vllm)
    trainer.train()
    tokenizer, batch = trainer.processing_class, SEEN[-1]
    assert len({id(each) for each in trainer.environments}) == len(batch["completion_ids"]) == 16
    # the responses of a group have one hidden number
    hidden = [each._hidden for each in trainer.environments]
    assert len(set(hidden[:8])) == len(set(hidden[8:])) == 1
    own = batch["tool_mask"].bool() & batch["completion_mask"].bool()
    texts, checked = [], 0
    for ids, present, mask, number in zip(batch["completion_ids"], batch["completion_mask"], own, hidden, strict=True):
        words = tokenizer.convert_ids_to_tokens(ids[present.bool()].tolist())
        texts.append(words)
        for t in (present.bool() & ~mask).nonzero().squeeze(1).tolist():
            assert words[t] not in ("call", "ask", "say", "<eos>", "<pad>"), words
            if words[t] in ("higher", "lower", "right") and words[t - 4 : t - 2] and words[t - 3].isdigit():
                assert words[t] == compare(int(words[t - 3]), number)
                checked += 1
    assert checked > 8
    # branches: a first turn with its reply that two responses of a group have word for word
    firsts = [(i // 8, *words[:8]) for i, words in enumerate(texts) if "higher" in words or "lower" in words]
    assert len(set(firsts)) < len(firsts)
    [first, last] = [entry for entry in trainer.state.log_history if "loss" in entry]
    name = "entropy_balanced" if rollout == "entropy_balanced" else "arpo"
    for entry in (first, last):
        assert not {each for each in entry if each != "step" and not meanings(each)}
        assert 0 < entry[f"{name}/branched"] < 1 and entry["rollout/tokens_reused"] > 0
        assert entry["rollout/share_trained"] < 1  # what the tool wrote
        assert entry["rollout/tokens_drawn"] < entry["rollout/tokens_returned"] * entry["rollout/share_trained"]
        assert float(entry["tools/call_frequency"]) > 0.25
        # with tools' tokens left out
        assert entry.get("sampling/sampling_logp_difference/max", 0.0) < 1e-4


@pytest.mark.parametrize("terms", CHAINS, ids=lambda terms: "+".join(str(each)[:12] for each in terms))
@pytest.mark.parametrize("rollout", ["arpo", "entropy_balanced"])
def test_terms_work_with_rollouts_that_branch(rollout: str, terms: list, talker: str, tmp_path: Path):
    trainer = make(talker, tmp_path, terms, max_steps=1, rollout=rollout)
    trainer.train()
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(torch.tensor(float(value)).isfinite() for value in entry.values())
    for each in terms:
        assert float(entry[f"{each if isinstance(each, str) else next(iter(each))}/affected"]) > 0


def test_soft_and_hard_attribution_are_one_where_nothing_is_clipped(talker: str, tmp_path: Path):
    """On-policy with a mean over tokens the advantages of the rows that share a token add up either way."""
    weights = []
    for name in ("soft", "hard"):
        trainer = make(talker, tmp_path / name, [], max_steps=1, rollout={"arpo": {"beam": 3, "attribution": name}})
        trainer.train()
        weights.append({key: value.detach().clone() for key, value in trainer.model.named_parameters()})
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], atol=1e-6, rtol=1e-5)
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["arpo/affected"] > 0


def test_a_rollout_within_a_turn_is_refused_beside_tools(talker: str, tmp_path: Path):
    with pytest.raises(ValueError, match="the rollout 'cure' branches inside a turn, where what the tools did cannot"):
        make(talker, tmp_path, [], rollout={"cure": {"branches": 3}})


class Locked(HiddenNumber):
    def __deepcopy__(self, memo: dict) -> None:
        raise TypeError("a socket cannot be copied")


def test_an_environment_that_cannot_be_copied_is_named(talker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = find_task("hidden_number", prompts=16)
    monkeypatch.setattr(f"{__name__}.find_task", lambda *args, **kwargs: replace(task, environment=Locked))
    trainer = make(talker, tmp_path, [], max_steps=1, rollout={"arpo": {"threshold": 1.0}})
    with pytest.raises(ValueError, match="Locked cannot be copied: TypeError: a socket cannot be copied; give it a"):
        trainer.train()
