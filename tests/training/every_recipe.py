"""Run several recipes one after the other in the processes of one launch: imports cost more than the runs.

accelerate launch --num_processes 2 tests/training/every_recipe.py '[["tokenizer", "--config", "FILE"], ...]'
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState

from eval.bench_accumulation import run_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def run(name: str, *arguments: str) -> int:
    """The exit code of the recipe of this name."""
    return run_recipe(RECIPES / f"{name}.py", *arguments)


if __name__ == "__main__":
    PartialState(cpu=True)  # a recipe closes the process group that it has opened, and the next one needs it
    for command in json.loads(sys.argv[1]):
        if code := run(*command):
            sys.exit(code)
