"""One module a method: `clip_cov.py` defines `ClipCov`, and a recipe names it `clip_cov`."""
