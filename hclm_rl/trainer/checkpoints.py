"""Which checkpoint a run goes on from: the newest complete one, or the one that is named.

transformers writes a checkpoint file by file, `trainer_state.json` last, and takes the folder with the highest number
to be the newest. A process that was killed while it saved, or while it deleted old ones, leaves folders that lack files
or have half of one. None of what is asked here reads a whole model: a safetensors file says its size in its header, and
what torch wrote is a zip archive, whose directory stands at its end.
"""

import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..chain.chain import Chain
from ..chain.manifest import plain, text
from ..chain.state import ALLOW, FILE_NAME, ChainState
from ..recipe.rollout import as_words
from ..rollouts.strategy import RolloutStrategy

logger = logging.getLogger(__name__)

ROLLOUT_NAME = "rollout.json"  # in a checkpoint, where the run has a rollout

STATE_NAME = "trainer_state.json"
CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# DeepSpeed's and FSDP's folders, with the optimiser in them or beside
SHARDED = ("global_step*", "pytorch_model_fsdp*")


def find_checkpoint(wanted: str | bool | None, args: Any, has_terms: bool) -> str | None:
    """The folder to resume from: of `true`, or of a run's folder, the newest complete checkpoint in it.

    A ValueError says in one sentence why there is none. Which ones were passed over is logged.
    """
    if wanted in (None, False, "", "false", "False"):
        return None
    folder = Path(args.output_dir if wanted in (True, "true", "True") else str(wanted))
    needs_terms = has_terms and not getattr(args, "allow_changed_terms", False)
    if CHECKPOINT.fullmatch(folder.resolve().name) or (folder / STATE_NAME).exists():
        if missing := what_is_missing(folder, args.save_only_model):
            raise ValueError(f"resume_from_checkpoint: '{folder}' is no complete checkpoint: {missing}")
        return str(folder)
    skipped = []
    for each in newest_first(folder):
        missing = what_is_missing(each, args.save_only_model)
        if not missing and needs_terms and not ChainState.is_in(each):
            missing = f"it has no {FILE_NAME}, though this run has entropy terms ({ALLOW})"
        if not missing:
            if skipped:
                logger.warning("resuming from %s; passed over: %s", each, "; ".join(skipped))
            return str(each)
        skipped.append(f"{each.name}: {missing}")
    if skipped:
        raise ValueError(f"resume_from_checkpoint: no complete checkpoint in '{folder}': {'; '.join(skipped)}")
    raise ValueError(f"resume_from_checkpoint: no checkpoint at '{folder}'")


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run, complete or not, by the number of their step."""
    found = [(CHECKPOINT.fullmatch(each.name), each) for each in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    numbered = [(int(match[1]), each) for match, each in found if match and each.is_dir()]
    return [each for _, each in sorted(numbered, reverse=True)]


def what_is_missing(folder: Path, is_model_alone: bool = False) -> str | None:
    """Why a run cannot go on from a checkpoint, or None. `is_model_alone`: as with `save_only_model`."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        state = json.loads((folder / STATE_NAME).read_text())
        if not isinstance(state["global_step"], int):
            raise TypeError
    except OSError:
        return f"it has no {STATE_NAME}, which is written last"
    except (ValueError, KeyError, TypeError):
        return f"its {STATE_NAME} is damaged"
    is_sharded = any(True for pattern in SHARDED for _ in folder.glob(pattern))
    if not is_sharded and (missing := what_is_missing_of_weights(folder)):
        return missing
    if not is_model_alone:
        for kind in ("optimizer", "scheduler", "rng_state"):
            if not any(folder.glob(f"{kind}*")) and not (is_sharded and kind != "rng_state"):
                return f"it has no {kind}"
    return next((f"its {each.name} is damaged" for each in folder.iterdir() if is_damaged(each)), None)


def what_is_missing_of_weights(folder: Path) -> str | None:
    """Whole weights or an adapter's, in one file or in the shards that an index names."""
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return f"its {index.name} is damaged"
        return next((f"it has no {shard}" for shard in sorted(shards) if not (folder / shard).is_file()), None)
    names = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
    return None if any((folder / name).is_file() for name in names) else "it has no weights"


def is_damaged(file: Path) -> bool:
    """Whether a file of tensors was cut off."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return False
        except (SafetensorError, OSError):
            return True
    return file.suffix in (".pt", ".pth", ".bin") and file.is_file() and not zipfile.is_zipfile(file)


def terms_state(checkpoint: str | None, chain: Chain, device: torch.device, args: Any) -> ChainState:
    """The state that the links of a run begin with; a ValueError says what of a checkpoint is not theirs."""
    if checkpoint is None:
        return ChainState.fresh(chain)
    allowed = getattr(args, "allow_changed_terms", False)
    if ChainState.is_in(Path(checkpoint)):
        return ChainState.load(Path(checkpoint), chain, device, allowed)
    state = ChainState.fresh(chain)
    if chain.links:
        state.changed = [f"{checkpoint} has no {FILE_NAME}: the entropy terms start afresh"]
        if not allowed:
            raise ValueError(
                f"{checkpoint} has no {FILE_NAME}, so the entropy terms would start afresh: resume without terms, or "
                f"{ALLOW}"
            )
    return state


def refuse_other_rollout(checkpoint: str | None, rollout: RolloutStrategy | None, args: Any) -> None:
    """Refuses a checkpoint whose run had another rollout or other values of it, unless that is allowed."""
    if checkpoint is None:
        return
    file = Path(checkpoint) / ROLLOUT_NAME
    was, now = file.read_text(encoding="utf-8") if file.exists() else "", rollout_in_words(rollout)
    if was == now:
        return
    said = f"{checkpoint} was written with the rollout {was or 'of TRL'}, and this run has {now or 'that of TRL'}"
    if not getattr(args, "allow_changed_terms", False):
        raise ValueError(f"{said}; resume with the same, or {ALLOW}")
    logger.warning("%s", said)


def rollout_in_words(rollout: RolloutStrategy | None) -> str:
    """Its name and all its values, as JSON; empty without one."""
    return "" if rollout is None else text(plain(as_words(rollout)))


def epochs_done(checkpoint: str | None) -> int:
    """How often the run had gone through its data."""
    if checkpoint is None:
        return 0
    return int(json.loads((Path(checkpoint) / STATE_NAME).read_text()).get("epoch") or 0)
