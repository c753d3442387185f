"""The trainer: TRL's bit for bit without a method, accumulation, the teacher, checkpoints, what is refused."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig

from hclm_rl.decoding.rows import Drawn
from hclm_rl.sft import own_responses
from hclm_rl.sft.config import METHODS, SFTConfig
from hclm_rl.sft.mix_ce import MixCe
from hclm_rl.sft.teacher import Teacher
from hclm_rl.sft.trainer import SFTTrainer

from ..tiny import WORDS, largest_difference, weights_of

NEUTRAL = {
    "mix_ce": {"mix_ce": {"eta": 1.0}},
    "entropy_sft": {"entropy_sft": {"ratio": 1.0}},
    "curio_sft": {"curio_sft": {"alpha": 0.0}},
}
FOLLOWS = {"curio_sft": {"sync_every": 1, "new_weight": 0.5}}


def lessons(count: int = 16) -> Dataset:
    """Prompts and completions of several lengths."""
    rng = random.Random(2)

    def texts(least: int, most: int) -> list[str]:
        return [" ".join(rng.choices(WORDS, k=rng.randint(least, most))) for _ in range(count)]

    return Dataset.from_dict({"prompt": texts(2, 3), "completion": [f" {text}" for text in texts(2, 6)]})


def make(
    policy: str, out: Path, *, ours: bool = True, method: Any = None, argument: Any = None, peft: bool = False,
    **changes: Any,
) -> Any:  # fmt: skip
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "optim": "sgd", "bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 7, **changes,
    }  # fmt: skip
    config: Any = SFTConfig(output_dir=str(out), sft_method=method, **settings)
    if argument is not None:
        config = trl.SFTConfig(output_dir=str(out), **settings)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2, task_type="CAUSAL_LM")
    held_out = {"eval_dataset": lessons(4)} if "eval_strategy" in changes else {}
    more = {"sft_method": argument} if ours else {}
    return (SFTTrainer if ours else trl.SFTTrainer)(
        model=policy, args=config, train_dataset=lessons(), peft_config=lora if peft else None, **held_out, **more
    )


def after(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    trainer = make(*args, **kwargs)
    trainer.train()
    return weights_of(trainer)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "LoRA with dropout, checkpointing": {"peft": True, "gradient_checkpointing": True},
    "dft, Adam": {"loss_type": "dft", "optim": "adamw_torch", "learning_rate": 1e-3},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_method_it_is_trl_bit_for_bit(variant: str, policy: str, tmp_path: Path):
    stock = after(policy, tmp_path, ours=False, **VARIANTS[variant])
    assert largest_difference(after(policy, tmp_path, **VARIANTS[variant]), stock) == 0.0
    if not VARIANTS[variant]:
        for method in NEUTRAL.values():  # where a method's own loss is cross-entropy, it is TRL's too
            assert largest_difference(after(policy, tmp_path, method=method), stock) == 0.0
        assert largest_difference(stock, weights_of(make(policy, tmp_path))) > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_a_method_acts_logs_and_leaves_the_generator_alone(name: str, policy: str, tmp_path: Path):
    method = {name: {**FOLLOWS.get(name, {}), **({"longest": 6} if name == "em_ft" else {})}}
    trainer = make(policy, tmp_path, method=method)
    trainer.train()
    weights = weights_of(trainer)
    assert all(value.isfinite().all() for value in weights.values())
    assert largest_difference(weights, after(policy, tmp_path)) > 1e-4
    assert any(key.startswith(f"{name}/") for key in trainer.state.log_history[0])
    # dropout, the only draw of a step, comes out the same
    with_dropout = after(policy, tmp_path, method=NEUTRAL.get(name), peft=True)
    if name in NEUTRAL:
        assert largest_difference(with_dropout, after(policy, tmp_path, peft=True)) == 0.0


def fixed_draw(model: Any, prompts: list[list[int]], *_: Any, **__: Any) -> list[Drawn]:
    return [Drawn(ids=[2 + sum(prompt) % 20] * (1 + prompt[0] % 3) + [1], is_ended=True) for prompt in prompts]


@pytest.mark.parametrize("name", ["mix_ce", "curio_sft", "em_ft"])
def test_accumulation_changes_nothing(name: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(own_responses, "draw", fixed_draw)
    method = {name: FOLLOWS.get(name, {})}
    four = after(policy, tmp_path, method=method, learning_rate=0.01)
    two = after(
        policy,
        tmp_path,
        method=method,
        learning_rate=0.01,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    assert largest_difference(four, two) < 1e-6
    assert largest_difference(four, after(policy, tmp_path, learning_rate=0.01)) > 1e-4


def test_em_ft_trains_on_the_entropy_of_its_responses(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(own_responses, "draw", fixed_draw)
    trainer = make(policy, tmp_path, method={"em_ft": {"responses": 2}}, max_steps=1)
    rows = [trainer.train_dataset[i] for i in range(4)]
    inputs = {name: value for name, value in trainer.data_collator(rows).items()}
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    sums = []
    for row in rows:
        prompt = [word for word, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        [answer] = fixed_draw(None, [prompt])
        with torch.no_grad():
            logits = trainer.model(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1]
        sums.append(torch.distributions.Categorical(logits=logits).entropy().sum())
    torch.testing.assert_close(loss.detach(), torch.stack(sums).mean())


def test_the_teacher_is_another_model_and_the_student_is_not_touched(policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, method="curio_sft")
    model = trainer.model
    teacher = Teacher(model)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        before = model(ids).logits
        model.model.embed_tokens.weight.add_(0.1)
        moved = model(ids).logits
        with teacher.in_place(model):
            assert torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, moved)
    # new = .75 old + .25 student, and the student is .1 above
    start = teacher.weights["model.embed_tokens.weight"].clone()
    teacher.follow(model, 0.25)
    torch.testing.assert_close(teacher.weights["model.embed_tokens.weight"], start + 0.025)
    # what it says of the labels is what a pass of the same weights says; no label, no value
    labels = torch.tensor([[-100, 4, 5, -100]])

    def reads(logps: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logp": logps.gather(1, targets.unsqueeze(1)).squeeze(1)}

    found = Teacher(model).columns(model, {"input_ids": ids, "labels": labels}, labels, reads)["logp"]
    wanted = moved.log_softmax(-1)[0, [0, 1], [4, 5]]
    torch.testing.assert_close(found, torch.tensor([[*wanted.tolist(), 0.0]]))


def test_under_autocast_the_teacher_reads_as_the_student_does(policy: str, tmp_path: Path):
    """At temperature 1 a teacher that is still the student pulls nowhere, in half precision too."""
    same = {"coldest": 1.0, "hottest": 1.0, "sync_every": 1, "new_weight": 1.0}
    trainer = make(policy, tmp_path, method={"curio_sft": same}, bf16=True, max_steps=1)
    before = weights_of(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["curio_sft/pull"] < 1e-9
    assert largest_difference(weights_of(trainer), before) > 1e-3  # the student's pass has its gradient


@pytest.mark.parametrize("name", ["curio_sft", "em_ft"])
def test_a_resumed_run_is_the_uninterrupted_one(name: str, policy: str, tmp_path: Path):
    method = {name: FOLLOWS.get(name, {"longest": 5})}
    whole = after(policy, tmp_path / "whole", method=method, max_steps=4)
    cut = make(policy, tmp_path / "cut", method=method, max_steps=2, save_strategy="steps", save_steps=2)
    cut.train()
    rest = make(policy, tmp_path / "cut", method=method, max_steps=4)
    rest.train(resume_from_checkpoint=True)
    assert largest_difference(weights_of(rest), whole) == 0.0
    other = make(policy, tmp_path / "cut", method="mix_ce", max_steps=4)
    with pytest.raises(ValueError, match=r"checkpoint-2 is a checkpoint of \{.*\}, and this run has \{.*mix_ce"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: no checkpoint at '.*none'"):
        rest.train(resume_from_checkpoint=str(tmp_path / "none"))
    (tmp_path / "cut/checkpoint-2/sft_method.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 is a checkpoint of no method, and this run has"):
        rest.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-2"))


@pytest.mark.parametrize("name", ["mix_ce", "entropy_sft", "curio_sft"])
def test_a_micro_batch_without_labels_adds_nothing(name: str, policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, method=name)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as in training
    ids = torch.tensor([[3, 4, 5, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    assert trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(5)).item() == 0.0
    # its metrics are there all the same: processes must log the same names
    assert trainer._hclm_metrics and all(each[0].isfinite() for each in trainer._hclm_metrics.values())


def test_a_loss_that_is_not_finite_stops_before_the_step(policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, method={"curio_sft": {"alpha": 1e300}})
    before = weights_of(trainer)
    with pytest.raises(ValueError, match=r"sft_method: a loss of curio_sft is not finite at step 0; training stopped"):
        trainer.train()
    assert largest_difference(weights_of(trainer), before) == 0.0
    trainer = make(policy, tmp_path, method="mix_ce")
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"sft_method: a loss of the model is not finite at step 0"):
        trainer.train()


def test_what_is_refused(policy: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"mix_ce is a loss of its own beside loss_type 'dft'"):
        SFTConfig(output_dir="out", sft_method="mix_ce", loss_type="dft", use_cpu=True)
    with pytest.raises(ValueError, match=r"set label_smoothing_factor to 0"):
        SFTConfig(output_dir="out", sft_method="mix_ce", label_smoothing_factor=0.1, use_cpu=True)
    with pytest.raises(ValueError, match=r"em_ft samples a response to each prompt: set packing and padding_free"):
        SFTConfig(output_dir="out", sft_method="em_ft", packing=True, use_cpu=True)
    config = SFTConfig(output_dir=str(tmp_path), sft_method="mix_ce", use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match=r"sft_method came twice"):
        SFTTrainer(model=policy, args=config, train_dataset=lessons(), sft_method=MixCe())
    with pytest.raises(ValueError, match=r"mix_ce beside compute_loss_func: a run has one loss"):
        SFTTrainer(model=policy, args=config, train_dataset=lessons(), compute_loss_func=lambda *_, **__: None)
    texts = Dataset.from_dict({"text": ["3 4 5", "6 7 8"]})
    trainer = SFTTrainer(model=policy, args=config, train_dataset=texts)
    trainer._hclm_method = own_responses.EmFt(longest=3)
    with pytest.raises(ValueError, match=r"em_ft answers prompts, and a row of the data has none"):
        trainer.train()


def test_a_method_may_be_an_argument_beside_trls_config(policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, argument=MixCe())
    trainer.train()
    assert largest_difference(weights_of(trainer), after(policy, tmp_path, method="mix_ce")) == 0.0
    assert json.dumps(trainer.state.log_history)
