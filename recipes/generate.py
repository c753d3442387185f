"""Responses from a recipe: python recipes/generate.py --config recipes/generate/em_inf.yaml"""

import sys

from hclm_rl.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
