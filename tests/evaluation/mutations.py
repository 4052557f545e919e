"""One line of a module's source changed in memory: a rule that no recorded verdict holds would not be missed."""

from pathlib import Path
from types import ModuleType

NOTHING = ("", "")


def mutated(module: ModuleType, before: str, after: str) -> ModuleType:
    """The module with one line changed. A line that is gone fails, so a list of changes cannot outlive the rules."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text(encoding="utf-8")
    if (before, after) != NOTHING:
        assert source.count(before) == 1, f"{before!r} stands {source.count(before)} times in {module.__name__}"
    made = ModuleType(f"mutated {module.__name__}")
    vars(made)["__name__"] = module.__name__
    exec(compile(source.replace(before, after) if before else source, module.__file__, "exec"), vars(made))
    return made
