"""Entropy control in RL fine-tuning of language models, on top of TRL."""

import lazy_loader

__version__ = "0.1.0"

# The names of __init__.pyi, on first use: torch and TRL take seconds, which `hclm-rl methods` need not wait for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
