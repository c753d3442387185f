"""What links remember between steps, and how it is written beside a checkpoint.

One file, `entropy_terms.safetensors`: the memories' tensors as "<link>/<key>", and as the bytes of the tensor
`manifest` a JSON text with all else: the links with their classes and values, plain memories, controllers, idle steps,
and the size and hash of every tensor. The file's metadata holds the version and the hash of that text.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .chain import Chain
from .door import first_state
from .manifest import described, differences
from .memory import make_plain

FILE_NAME = "entropy_terms.safetensors"
VERSION = 2
ABOUT = "entropy_terms"  # the key of version and hash in the file's metadata
FIRST_NAME = "entropy_terms.json"  # in version 1 what is no tensor stood in a file of its own
MANIFEST = "manifest"  # no link's tensor: theirs have a "/"
ALLOW = "set allow_changed_terms (on the command line --allow_changed_terms) to go on all the same"


@dataclass
class ChainState:
    """Per link: the term's memory, the controller's state, and how long it has affected nothing."""

    memory: dict[str, dict] = field(default_factory=dict)
    controller: dict[str, dict[str, float]] = field(default_factory=dict)
    idle_steps: dict[str, int] = field(default_factory=dict)
    links: list[dict] = field(default_factory=list)  # whose state it is: names, classes, values
    changed: list[str] = field(default_factory=list, compare=False)  # sentences: what differs from the checkpoint's

    @classmethod
    def fresh(cls, chain: Chain) -> "ChainState":
        """Before the first step: empty memories, controllers at their start."""
        return cls(
            memory={link.name: {} for link in chain.links},
            controller={link.name: first_state(link.coef, link.name) for link in chain.links},
            idle_steps={link.name: 0 for link in chain.links},
            links=described(chain),
        )

    def require_savable(self) -> None:
        """Raises in one sentence where a checkpoint could not hold a memory; NumPy numbers become Python's."""
        for link, memory in self.memory.items():
            make_plain(memory, link)

    def save(self, folder: Path) -> None:
        """Writes the file under another name and then renames it, so that it is whole or not there."""
        self.require_savable()
        tensors, plain = {}, {}
        for link, memory in self.memory.items():
            for key, value in memory.items():
                if isinstance(value, Tensor):
                    # a copy: safetensors refuses two tensors that share memory
                    tensors[f"{link}/{key}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            plain[link] = {key: value for key, value in memory.items() if not isinstance(value, Tensor)}
        manifest = {
            "links": self.links,
            "memory": plain,
            "controller": self.controller,
            "idle_steps": self.idle_steps,
            "tensors": {name: facts(tensors[name]) for name in sorted(tensors)},
        }
        # Python's JSON writes and reads Infinity, which StepToTarget's first state holds
        text = json.dumps(manifest).encode()
        tensors[MANIFEST] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        unfinished = folder / f"{FILE_NAME}.unfinished"
        about = {"version": VERSION, "sha256": hashlib.sha256(text).hexdigest()}
        save_file(tensors, unfinished, {ABOUT: json.dumps(about)})  # one key: the file's order of several is random
        settle(unfinished, folder / FILE_NAME)
        (folder / FIRST_NAME).unlink(missing_ok=True)  # of version 1, whose checkpoint this one replaces

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether a checkpoint has a state of entropy terms, of any version and in any condition."""
        return (folder / FILE_NAME).exists() or (folder / FIRST_NAME).exists()

    @classmethod
    def load(cls, folder: Path, chain: Chain, device: torch.device, allow_changed: bool = False) -> "ChainState":
        """The state of a checkpoint; raises where its links are not those of the run, unless that is allowed.

        What has no counterpart in the checkpoint starts afresh then, and `changed` says what differs.
        """
        kept, tensors = read(folder)
        loaded = cls.fresh(chain)
        loaded.changed = [f"{folder} {each}" for each in changes(kept, chain)]
        if loaded.changed and not allow_changed:
            raise ValueError(
                f"{'; '.join(loaded.changed)}; resume with the same terms, or start a new run from the checkpoint's "
                f"weights, or {ALLOW}"
            )
        goes_on = {link["name"] for link in loaded.links if link["class"] == class_in(kept, link)}
        for link in chain.links:
            if link.name in goes_on:
                loaded.memory[link.name] = kept["memory"][link.name]
                loaded.idle_steps[link.name] = kept["idle_steps"][link.name]
                if link.coef.initial_state().keys() <= kept["controller"][link.name].keys():
                    loaded.controller[link.name] = kept["controller"][link.name]
        for name, tensor in tensors.items():
            link, key = name.split("/", 1)  # a link's name has no "/", a key may
            if link in goes_on:
                loaded.memory[link][key] = tensor.to(device)
        return loaded


def class_in(kept: dict, link: dict) -> str | None:
    """The class that a checkpoint's link of that name had; of version 1, which says none, the run's own."""
    if link["name"] not in kept["memory"]:
        return None
    return next((old["class"] for old in kept.get("links", []) if old["name"] == link["name"]), link["class"])


def changes(kept: dict, chain: Chain) -> list[str]:
    """In words, what differs between the links of a checkpoint and those of a run."""
    was, names = sorted(kept["memory"]), sorted(link.name for link in chain.links)
    if was != names:
        return [f"was written with the entropy terms {was}, this run has {names or 'none'}"]
    said = []
    for link in chain.links:
        has, needs = kept["controller"][link.name], link.coef.initial_state()
        if not needs.keys() <= has.keys():
            said.append(
                f"has the state of another coef for '{link.name}': it has {', '.join(has) or 'nothing'}, this run "
                f"needs {', '.join(needs)}"
            )
    return said + [f"was written by other terms: {each}" for each in differences(kept.get("links", []), chain)]


def facts(tensor: Tensor) -> dict[str, object]:
    """By which damage shows, of a tensor of any shape."""
    content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(tensor.dtype),
        "shape": list(tensor.shape),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def settle(unfinished: Path, file: Path) -> None:
    """Gives a written file its name, once it is on the disk: whoever is killed leaves the old one or the new one."""
    with unfinished.open("rb+") as written:
        os.fsync(written.fileno())
    unfinished.replace(file)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """What is no tensor, and the tensors of any shape; a ValueError names a damaged file, or an unknown version."""
    file = folder / FILE_NAME
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or missing: {' '.join(str(error).split())}") from error
    if ABOUT not in metadata and not (folder / FIRST_NAME).exists():
        raise ValueError(f"{file} is damaged, or of version 1 without its {FIRST_NAME}")
    if ABOUT not in metadata:
        return of_version_1(folder / FIRST_NAME), tensors
    try:
        about = json.loads(metadata[ABOUT])
        version, digest = about["version"], about["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: its metadata cannot be read") from error
    if version != VERSION:
        raise ValueError(f"{file} is of version {version!r}; this hclm_rl reads versions 1 and {VERSION}")
    text = tensors.pop(MANIFEST, torch.zeros(0, dtype=torch.uint8)).numpy().tobytes()
    if hashlib.sha256(text).hexdigest() != digest:
        raise ValueError(f"{file} is damaged: its manifest is not the one that was written")
    kept = json.loads(text)
    for name in sorted(kept["tensors"].keys() | tensors.keys()):
        if name not in tensors or facts(tensors[name]) != kept["tensors"].get(name):
            raise ValueError(f"{file} is damaged: the tensor '{name}' is not the one that was written")
    return kept, tensors


def of_version_1(file: Path) -> dict:
    """What was no tensor then; it says of the links their names alone. Refuses a damaged file, and other versions."""
    try:
        kept = json.loads(file.read_text())
        version = kept["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged or missing: {type(error).__name__}: {error}") from error
    if version != 1:
        raise ValueError(f"{file} is of version {version!r}; this hclm_rl reads versions 1 and {VERSION}")
    for part in ("memory", "controller", "idle_steps"):
        if not isinstance(kept.get(part), dict) or kept[part].keys() != kept["memory"].keys():
            raise ValueError(f"{file} is damaged: its '{part}' does not say a value for every entropy term")
    return kept
