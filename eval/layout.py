"""Measure how the code is laid out at revisions of this repository: modules, packages, imports, sizes, words, tests.

    python eval/layout.py 1b00b13~1 HEAD
    python eval/layout.py 1b00b13~1 HEAD --tests        # names of tests that are gone, too

Every number is read from the syntax trees of unimm, recipes and eval as git stores them; nothing is imported. Parts are
the packages and modules right under unimm. An arrow is a pair of parts of which the first imports the second; it points
back if the table of the revision's own tests/test_arrows.py does not allow it.
"""

import argparse
import ast
import io
import re
import statistics
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import PurePosixPath as Path
from typing import Any

from unimm.errors import UserError, run_main

OWN = ("unimm", "recipes", "eval")
LONG_FILE, LONG_FUNCTION = 300, 60
Trees = Mapping[Path, ast.Module]


class Revision:
    """The Python files of a revision: `sources` and `trees` by path."""

    def __init__(self, name: str) -> None:
        self.name = name
        packed = subprocess.run(["git", "archive", "--format=tar", name], capture_output=True, check=False)
        if packed.returncode:
            raise UserError(f"git has no revision {name!r} here: {packed.stderr.decode().strip()}.")
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as files:
            python = [each for each in files if each.isfile() and each.name.endswith(".py")]
            self.sources = {Path(each.name): files.extractfile(each).read().decode() for each in python}  # type: ignore
        self.trees = {path: ast.parse(source) for path, source in self.sources.items()}

    def own(self, *folders: str) -> list[Path]:
        """Return the files of `folders`, all of our own code unless given."""
        return sorted(path for path in self.sources if path.parts[0] in (folders or OWN))

    def lines(self, paths: Iterable[Path]) -> int:
        """Count the lines of files."""
        return sum(self.sources[path].count("\n") for path in paths)


def imports(trees: Trees) -> dict[Path, set[Path]]:
    """Return {module of unimm: the other modules of unimm that it imports}, imports inside functions included."""
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in trees}
    found: dict[Path, set[Path]] = {}
    for path, tree in trees.items():
        names: list[str] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parents = ".".join(path.parts[: len(path.parts) - node.level]) if node.level else ""
                module = ".".join(part for part in (parents, node.module or "") if part)
                # a name is a module of its own, or stands in the module that it is taken from
                names += [full if (full := f"{module}.{alias.name}") in modules else module for alias in node.names]
        found[path] = {modules[name] for name in names if name in modules} - {path}
    return found


def part_of(path: Path) -> str:
    """Return the part of unimm that a module belongs to."""
    return path.parts[1].removesuffix(".py")


def arrows(trees: Trees) -> dict[str, set[str]]:
    """Return {part: the other parts that it imports}."""
    found: dict[str, set[str]] = {part_of(path): set() for path in trees}
    for path, others in imports(trees).items():
        found[part_of(path)] |= {part_of(other) for other in others} - {part_of(path), "__init__"}
    return found


def circles(graph: Mapping[Any, set[Any]]) -> list[set[Any]]:
    """Return the sets of two or more nodes that reach each other."""
    reached: dict[Any, set[Any]] = {}
    for start in graph:
        seen, waiting = set[Any](), list(graph[start])
        while waiting:
            if (node := waiting.pop()) not in seen:
                seen.add(node)
                waiting += graph[node]
        reached[start] = seen
    found: list[set[Any]] = []
    for node in graph:
        circle = {other for other in reached[node] if node in reached[other]} | {node}
        if len(circle) > 1 and circle not in found:
            found.append(circle)
    return found


def arrows_back(trees: Trees, table: ast.Module) -> int:
    """Count the arrows that the table ALLOWED of tests/test_arrows.py does not allow; a part of a part may have a row
    of its own there."""
    body: list[ast.stmt] = []
    for node in table.body:  # the assignments up to the table
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            body.append(node)
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ALLOWED":
                break
    names: dict[str, Any] = {}
    exec(compile(ast.Module(body, []), "ALLOWED", "exec"), names)  # noqa: S102 - our own test
    allowed, back = names["ALLOWED"], set[tuple[str, str]]()
    for path, others in imports(trees).items():
        rows = (".".join(path.with_suffix("").parts[1:n]) for n in (3, 2))
        row = next(row for row in rows if row in allowed)
        named = {part_of(other) for other in others} & set(allowed) - {"__init__"}
        back |= {(row, other) for other in named - allowed[row] - {part_of(path)}}
    return len(back)


def docstrings(trees: Iterable[ast.Module]) -> Iterator[str]:
    """Yield every docstring: of modules, classes and functions, and those under assignments."""
    for tree in trees:
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            for each in body if isinstance(body, list) else ():
                value = each.value if isinstance(each, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def functions(trees: Iterable[ast.Module]) -> list[int]:
    """Return the number of lines of every function."""
    nodes = (node for tree in trees for node in ast.walk(tree))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(node.end_lineno or 0) - node.lineno + 1 for node in nodes if isinstance(node, kinds)]


def test_names(revision: Revision) -> Counter[str]:
    """Count the test functions of each name."""
    trees = (tree for path, tree in revision.trees.items() if path.parts[0] == "tests")
    named = (node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return Counter(name for name in named if name.startswith("test_"))


def measured(revision: Revision) -> dict[str, str]:
    """Return the rows of the table for one revision."""
    own, library = revision.own(), revision.own("unimm")
    trees = {path: revision.trees[path] for path in library}
    graph = arrows(trees)
    sizes = Counter[str]()
    for path in library:
        sizes[part_of(path)] += revision.lines([path])
    largest, size = sizes.most_common(1)[0]
    names = Counter(path.name for path in own if path.name != "__init__.py")
    shared = {name: count for name, count in names.items() if count > 1}
    folders = {path.parent for path in library if "geneval" in path.as_posix()}
    words = [
        word.lower() for text in docstrings(revision.trees[path] for path in own) for word in re.findall(r"\w+", text)
    ]
    pictures = sum(word in ("picture", "pictures") for word in words)
    lengths = functions(revision.trees[path] for path in own)
    long = [path for path in own if revision.lines([path]) > LONG_FILE]
    return {
        "modules (files)": str(len(own)),
        "packages (folders of unimm)": str(len({path.parent for path in library})),
        "parts, arrows between them": f"{len(graph)}, {sum(map(len, graph.values()))}",
        "arrows back": str(arrows_back(trees, revision.trees[Path("tests/test_arrows.py")])),
        "circles of parts, of modules": f"{len(circles(graph))}, {len(circles(imports(trees)))}",
        "largest part of unimm": f"{largest}, {size / sum(sizes.values()):.0%}",
        "folders that hold GenEval": str(len(folders)),
        "files that share a basename": f"{sum(shared.values())} ({len(shared)} names)",
        "lines of our own code": str(revision.lines(own)),
        "lines of tests": str(revision.lines(path for path in revision.sources if path.parts[0] == "tests")),
        "lines of a file, median": f"{statistics.median(revision.lines([path]) for path in own):.0f}",
        f"files above {LONG_FILE} lines": str(len(long)),
        f"functions above {LONG_FUNCTION} lines": f"{sum(n > LONG_FUNCTION for n in lengths)}, longest {max(lengths)}",
        '"picture" in 10 000 words of docstrings': f"{10_000 * pictures / len(words):.1f}",
        "test functions": str(sum(test_names(revision).values())),
    }


def gone_tests(before: Revision, after: Revision) -> tuple[int, list[str]]:
    """Return how many tests changed that one word of their names, and the other names that are gone."""
    old, new = test_names(before), test_names(after)
    gone = sorted(set(old) - set(new))
    renamed = [name for name in gone if {re.sub("picture", word, name) for word in ("image", "drawing")} & set(new)]
    return len(renamed), sorted(set(gone) - set(renamed))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and with --tests the names of tests that are gone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="+", metavar="REV", help="a commit, a branch or a tag; one column each")
    parser.add_argument("--tests", action="store_true", help="list the tests of a revision that the next one lacks")
    arguments = parser.parse_args(argv)
    revisions = [Revision(name) for name in arguments.revisions]
    columns = [measured(revision) for revision in revisions]
    print("| | " + " | ".join(arguments.revisions) + " |\n|---" + "|---" * len(revisions) + "|")
    for row in columns[0]:
        print(f"| {row} | " + " | ".join(column[row] for column in columns) + " |")
    for before, after in pairwise(revisions) if arguments.tests else ():
        renamed, gone = gone_tests(before, after)
        print(f"\n{before.name} -> {after.name}: {renamed} tests have image for picture in their names; gone by name:")
        print("\n".join(gone) or "none")


if __name__ == "__main__":
    run_main(main)
