"""Where the responses to a prompt come from: ways to spend the rollout budget, one module each."""

import lazy_loader

# the names of __init__.pyi, on first use: torch and transformers take seconds
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
