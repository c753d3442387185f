import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.testbed import evaluate, find_task
from hclm_rl.testbed.policy import EOS, load_policy, new_policy, new_tokenizer
from hclm_rl.testbed.sampling import measured, sample_completions


@pytest.fixture(scope="module")
def task():
    return find_task("coins", prompts=1, eval_prompts=6)


@pytest.fixture(scope="module")
def policy():
    return load_policy()


def uniform_policy():
    """With zero (tied) embeddings all logits are 0: each of the 46 words has probability 1/46."""
    model = new_policy(seed=0)
    torch.nn.init.zeros_(model.model.embed_tokens.weight)
    return model


def test_uniform_policy_has_entropy_log_46_at_any_temperature(task):
    for temperature in (1.0, 0.5):
        measured = evaluate(
            uniform_policy(), new_tokenizer(), task.eval_dataset, task, samples=16, temperature=temperature
        )
        assert measured.token_entropy == pytest.approx(math.log(46), rel=1e-6)
        # float32 sums: the spread over prompts is rounding
        assert measured.standard_errors["token_entropy"] == pytest.approx(0, abs=1e-6)


def test_length_of_a_uniform_policy_is_a_cut_geometric(task):
    measured = evaluate(uniform_policy(), new_tokenizer(), task.eval_dataset, task, samples=500)
    # sum_{t=1..17} (45/46)^(t-1) = 46 (1 - (45/46)^17) = 14.34; standard deviation of one length about 4.8,
    # of the mean of 3000 about 0.09
    assert measured.length == pytest.approx(46 * (1 - (45 / 46) ** 17), abs=0.36)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_entropies_are_those_of_a_forward_pass_without_padding(policy, temperature):
    model, tokenizer = policy
    prompts = ["7 3 5 : 35 ! 4 5 7 >", "5 : 35 ! 4 5 7 >"]  # the second is padded on the left
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        completions, entropies, mask = sample_completions(model, tokenizer, prompts, 17, temperature)
        for row, prompt in enumerate(prompts):
            prompt_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            length = int(mask[row].sum())
            ids = torch.cat([prompt_ids[0], completions[row, :length]])
            logits = model(input_ids=ids[None]).logits[0, prompt_ids.shape[1] - 1 : -1] / temperature
            expected = torch.distributions.Categorical(logits=logits).entropy()
            # cached and left-padded against one uncached pass: other float32 kernels
            torch.testing.assert_close(entropies[row, :length], expected, rtol=1e-4, atol=1e-5)


def test_the_mask_ends_with_the_first_end_of_text(policy):
    model, tokenizer = policy
    completions, _, mask = sample_completions(model, tokenizer, ["7 3 5 : 35 ! 4 5 7 >"] * 64, 17, 1.0)
    eos = tokenizer.convert_tokens_to_ids(EOS)
    for ids, counted in zip(completions.tolist(), mask.tolist(), strict=True):
        length = ids.index(eos) + 1 if eos in ids else 17
        assert counted == [True] * length + [False] * (len(ids) - length)


def test_the_global_generator_and_the_mode_are_untouched(task, policy):
    model, tokenizer = policy
    state = torch.random.get_rng_state()
    model.train()
    evaluate(model, tokenizer, task.eval_dataset, task, samples=2)
    assert model.training
    model.eval()
    evaluate(model, tokenizer, task.eval_dataset, task, samples=2)
    assert not model.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_in_training_mode_is_measured_without_dropout(task):
    model, tokenizer = load_policy()
    before = evaluate(model, tokenizer, task.eval_dataset, task, samples=4)
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert evaluate(model, tokenizer, task.eval_dataset, task, samples=4) == before


def test_draws_follow_from_the_seed(task, policy):
    first, again, other = (evaluate(*policy, task.eval_dataset, task, samples=8, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.per_prompt["token_entropy"] != other.per_prompt["token_entropy"]


def test_sampling_settings_of_the_model_do_not_narrow_the_distribution_and_stay(task):
    model, tokenizer = load_policy()
    before = evaluate(model, tokenizer, task.eval_dataset, task, samples=8)
    model.generation_config.top_k = 1
    model.generation_config.min_p = 0.5
    model.generation_config.repetition_penalty = 2.0
    assert evaluate(model, tokenizer, task.eval_dataset, task, samples=8) == before
    assert model.generation_config.top_k == 1


def test_warm_start_has_the_stated_numbers(policy):
    task = find_task("coins", prompts=1, eval_prompts=48)
    measured = evaluate(*policy, task.eval_dataset, task, samples=32)
    # 0.40 +- 0.02 and 0.447 +- 0.006 over 96 prompts; four standard errors of 48 prompts
    assert measured.pass_at[1] == pytest.approx(0.40, abs=0.11)
    assert measured.token_entropy == pytest.approx(0.447, abs=0.034)


def test_measures_of_answers_counted_by_hand(task):
    """The worked example of maj@k: three right samples C, four a, one b; and a prompt of eight that do not parse."""
    by_letter = replace(
        task, answer=lambda row, text: text or None, is_correct=lambda row, text: text == row["correct"]
    )
    rows = [{"prompt": "p", "correct": "C"}, {"prompt": "q", "correct": "C"}]
    texts = ["C", "C", "C", "a", "a", "a", "a", "b"] + [""] * 8
    # prompt 1: 8 responses of 2 tokens, 4 nats together; prompt 2: 8 of 1 token, 2 nats
    found = measured(rows, by_letter, 8, texts, [0.5] * 8 + [0.25] * 8, [2] * 8 + [1] * 8)
    assert found.means() == pytest.approx(
        {
            "token_entropy": 6 / 24,
            "pass@1": (3 / 8 + 0) / 2,
            "pass@8": 1 / 2,
            "maj@8": 0.0,  # a has the most votes
            "distinct_correct": 1 / 2,
            "answer_entropy": 0.974315 / 2,
            "unanswered": 1 / 2,
            "length": 1.5,
        },
        abs=1e-6,  # the worked example has six digits
    )
    assert found.per_prompt["pass@1"] == pytest.approx([3 / 8, 0.0])
    # of two values x, y the standard error of the mean is |x - y| / 2
    assert found.standard_errors["pass@1"] == pytest.approx(3 / 16)
    assert found.standard_errors["pass@8"] == pytest.approx(1 / 2)


def test_token_entropy_error_is_that_of_a_ratio(task):
    rows = [{"prompt": "p"}, {"prompt": "q"}]
    silent = replace(task, answer=lambda row, text: None, is_correct=lambda row, text: False)
    # prompt sums of entropy 3, 1 and of tokens 3, 5: ratio R = 4 / 8; residuals (S - R L) / 4 = 3/8 and -3/8,
    # standard error sqrt((2 * 9/64) / (1 * 2)) = 3/8
    found = measured(rows, silent, 1, ["", ""], [3.0, 1.0], [3, 5])
    assert found.token_entropy == pytest.approx(0.5)
    assert found.standard_errors["token_entropy"] == pytest.approx(3 / 8)


def test_bad_input_is_refused(task, policy):
    with pytest.raises(ValueError, match="at least one row"):
        evaluate(*policy, [], task)
    with pytest.raises(ValueError, match=r"temperature must be > 0, got 0\.0"):
        evaluate(*policy, task.eval_dataset, task, temperature=0.0)
    with pytest.raises(ValueError, match="at least 1, got 0 and 1024"):
        evaluate(*policy, task.eval_dataset, task, samples=0)
