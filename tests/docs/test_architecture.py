"""docs/architecture.md: the diagram agrees with the imports of every file and with the table of allowed arrows."""

import re
from pathlib import Path

from tests.conftest import ROOT
from tests.docs.pages import code_blocks, read_page
from tests.test_arrows import ALLOWED, GROUND, SOURCES, imports_of

PAGE = "architecture.md"
COMMON = "common"
SCRIPTS = ("recipes", "eval")
Arrow = tuple[str, str]


def drawn_arrows(diagram: str) -> set[Arrow]:
    """Return the arrows (from, to) of a mermaid flowchart; `a & b --> c & d` draws four."""
    arrows = set()
    for line in diagram.splitlines():
        if "-->" in line:
            tails, heads = (re.findall(r"\w+", side) for side in line.split("-->"))
            arrows |= {(tail, head) for tail in tails for head in heads}
    return arrows


def arrows_of(path: Path) -> set[Arrow]:
    """Return the arrows between parts that one file's imports make; the common parts are one."""
    place = path.relative_to(ROOT).with_suffix("").parts
    part = place[0] if place[0] in SCRIPTS else place[1]
    arrows = set()
    for name, _ in imports_of(path.read_text(encoding="utf-8"), ".".join(place[:-1])):
        top, *rest = name.split(".")
        if top == "unimm" and rest and rest[0] in ALLOWED and rest[0] != part:
            arrows.add((COMMON if part in GROUND else part, COMMON if rest[0] in GROUND else rest[0]))
    return {arrow for arrow in arrows if arrow[0] not in (COMMON, "__init__")}


def diagram() -> set[Arrow]:
    (block,) = code_blocks(PAGE, "mermaid")
    return drawn_arrows(block)


def test_the_diagram_shows_every_import() -> None:
    real = {arrow for path in SOURCES for arrow in arrows_of(path)}
    assert {arrow for arrow in real if arrow[1] != COMMON} - diagram() == set()
    assert len(real) > 20  # the reading of the imports works


def test_the_diagram_shows_nothing_that_the_rules_forbid() -> None:
    allowed = {(part, COMMON if other in GROUND else other) for part, others in ALLOWED.items() for other in others}
    allowed |= {(script, part) for script in SCRIPTS for part in ALLOWED}
    assert diagram() - allowed == set()


def test_the_page_names_the_common_parts() -> None:
    (sentence,) = re.findall(r"the parts in `common`: (.*)\.$", read_page(PAGE), flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", sentence)) == GROUND


def test_arrows_are_read_from_mermaid_and_from_imports(tmp_path: Path) -> None:
    assert drawn_arrows("flowchart TD\n  a & b --> c & d\n  c --> e") == {
        ("a", "c"),
        ("a", "d"),
        ("b", "c"),
        ("b", "d"),
        ("c", "e"),
    }
    assert ("chat", "mllm") in arrows_of(ROOT / "unimm" / "chat" / "session.py")
    assert ("recipes", COMMON) in arrows_of(ROOT / "recipes" / "sft.py")
