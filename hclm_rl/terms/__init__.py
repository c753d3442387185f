"""One module a method: `clip_cov.py` defines `ClipCov`, and a recipe names it `clip_cov`."""

import lazy_loader

# The classes of __init__.pyi, on first use: `from hclm_rl.terms import ClipCov` reads that one module.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
