"""What links remember between steps, and how it is written beside a checkpoint."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .chain import Chain
from .door import first_state
from .memory import make_plain

JSON_NAME, TENSORS_NAME = "entropy_terms.json", "entropy_terms.safetensors"


@dataclass
class ChainState:
    """Per link: the term's memory, the controller's state, and how long it has affected nothing."""

    memory: dict[str, dict] = field(default_factory=dict)
    controller: dict[str, dict[str, float]] = field(default_factory=dict)
    idle_steps: dict[str, int] = field(default_factory=dict)

    @classmethod
    def fresh(cls, chain: Chain) -> "ChainState":
        return cls(
            memory={link.name: {} for link in chain.links},
            controller={link.name: first_state(link.coef, link.name) for link in chain.links},
            idle_steps={link.name: 0 for link in chain.links},
        )

    def require_savable(self) -> None:
        """Raises in one sentence where a checkpoint could not hold a memory; NumPy numbers become Python's."""
        for link, memory in self.memory.items():
            make_plain(memory, link)

    def save(self, folder: Path) -> None:
        """Writes both files; tensors of the memories go into the safetensors file as "<link>/<key>"."""
        self.require_savable()
        tensors, plain = {}, {}
        for link, memory in self.memory.items():
            for key, value in memory.items():
                if isinstance(value, torch.Tensor):
                    # a copy: safetensors refuses two tensors that share memory
                    tensors[f"{link}/{key}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            plain[link] = {key: value for key, value in memory.items() if not isinstance(value, torch.Tensor)}
        # Python's JSON writes and reads Infinity, which StepToTarget's first state holds
        state = {"version": 1, "memory": plain, "controller": self.controller, "idle_steps": self.idle_steps}
        (folder / JSON_NAME).write_text(json.dumps(state, indent=1))
        save_file(tensors, folder / TENSORS_NAME)

    @classmethod
    def load(cls, folder: Path, chain: Chain, device: torch.device) -> "ChainState":
        """The state of a checkpoint; raises where it was written by other links than the run's."""
        state = json.loads((folder / JSON_NAME).read_text())
        names = [link.name for link in chain.links]
        if sorted(state["memory"]) != sorted(names):
            raise ValueError(
                f"{folder} was written with the entropy terms {sorted(state['memory'])}, this run has {sorted(names)}; "
                "resume with the same terms, or start a new run from the checkpoint's weights"
            )
        loaded = cls(memory=state["memory"], controller=state["controller"], idle_steps=state["idle_steps"])
        for link in chain.links:
            kept, wanted = loaded.controller[link.name], link.coef.initial_state()
            if not wanted.keys() <= kept.keys():
                raise ValueError(
                    f"{folder} has the state of another coef for '{link.name}': it has {', '.join(kept) or 'nothing'}, "
                    f"this run needs {', '.join(wanted)}; resume with the coef that it was written with, or start a "
                    "new run from the checkpoint's weights"
                )
        for name, tensor in load_file(folder / TENSORS_NAME).items():
            link, key = name.split("/", 1)  # a link's name has no "/", a key may
            loaded.memory[link][key] = tensor.to(device)
        return loaded
