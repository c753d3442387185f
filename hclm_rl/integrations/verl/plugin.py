"""What verl loads by itself: the entry point `hclm_rl` of the group `verl.plugins`, or VERL_USE_EXTERNAL_MODULES.

Every process of a verl run imports verl, and verl's trainers take seconds to import. So nothing is imported here: the
names are registered when verl's own registries are, just after their modules have run.

verl logs what fails in an entry point at debug level and goes on. Here it is logged as an error. A run that names one
of our trainers or our loss cannot go on without it: verl does not know the name then, and says so.
"""

import importlib
import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

logger = logging.getLogger("hclm_rl")

REGISTRIES = {  # module of verl: ours, whose `register` is called with it
    "verl.trainer.ppo.core_algos": "hclm_rl.integrations.verl.register_loss",
    "verl.trainer.ppo.v1": "hclm_rl.integrations.verl.register_trainers",
}


class After(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of REGISTRIES as Python would, and registers once they have run."""

    def __init__(self) -> None:
        self.theirs: dict[str, importlib.abc.Loader] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Leaves a registry to its own loader, and looks on when that has loaded it."""
        if fullname not in REGISTRIES or fullname in self.theirs:
            return None
        self.theirs[fullname] = self  # pyright: ignore[reportArgumentType]  (so that the next line does not end here)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        self.theirs[fullname], spec.loader = spec.loader, self  # pyright: ignore[reportArgumentType]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.theirs[spec.name].create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Loads the registry as its own loader does, then registers there."""
        loader = self.theirs[module.__name__]
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = loader  # as if nobody had looked
        loader.exec_module(module)
        register(module.__name__)


def register(name: str) -> None:
    """What belongs to one of verl's registries; a failure is said and ends nothing but what needs it."""
    try:
        importlib.import_module(REGISTRIES[name]).register()
    except Exception as error:
        logger.error(
            "hclm_rl could not register with %s (%s: %s): this process knows none of its names, and a run that uses "
            "one of them will stop; docs/integrations.md says which versions of verl are tested",
            name,
            type(error).__name__,
            error,
        )


def install() -> None:
    """Once a process."""
    if any(isinstance(finder, After) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, After())
    for name in REGISTRIES:
        if name in sys.modules:  # verl was there before
            register(name)


install()
