"""Run several recipes one after the other in the processes of one launch: imports cost more than the runs.

accelerate launch --num_processes 2 tests/training/every_recipe.py '[["tokenizer", "--config", "FILE"], ...]'
"""

import json
import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def run_recipe(name: str, *arguments: str) -> int:
    """The recipe's exit code."""
    AcceleratorState._reset_state()  # the precision of the run before; the processes stay connected
    argv, sys.argv = sys.argv, [f"{name}.py", *arguments]
    try:
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = argv
    return 0


if __name__ == "__main__":
    for command in json.loads(sys.argv[1]):
        if code := run_recipe(*command):
            sys.exit(code)
