"""The report of a table in Markdown: its figures with intervals over seeds, and the direction of every claim."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from unimm.errors import UserError, reading
from unimm.evaluation.findings.plan import Claim, Table
from unimm.evaluation.findings.verdict import Figure, Spread, over_seeds, verdict
from unimm.runs.provenance import write_atomically

Found = Mapping[str, Mapping[str, Spread]]
"""{cell: {figure: its values over seeds}}, of the finished cells."""

NAMES = {
    "use": "codes used",
    "perplexity": "perplexity",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "distance": "distance",
    "probe_features": "probe, features",
    "probe_codes": "probe, codes",
    "chat_kept": "answers, kept",
    "chat_retrained": "answers, retrained",
    "ar_loss": "GPT's loss",
    "ar_gain": "gain",
    "drawn_distance": "distance, drawn",
}
SHARES = {"use", "probe_features", "probe_codes", "chat_kept", "chat_retrained"}
NOT_RUN = "not run yet"


def gathered(cells: Mapping[str, Sequence[Mapping[str, Figure]]]) -> dict[str, dict[str, Spread]]:
    """Return the figures over seeds from those of every cell's finished seeds; cells without any are left out."""
    return {
        cell: {name: _possible(name, over_seeds([figures[name] for figures in seeds])) for name in seeds[0]}
        for cell, seeds in cells.items()
        if seeds
    }


def _possible(name: str, spread: Spread) -> Spread:
    """Cut the interval of a share to what a share can be."""
    if name not in SHARES or spread.low is None or spread.high is None:
        return spread
    return spread._replace(low=max(0.0, spread.low), high=min(1.0, spread.high))


def shown(name: str, value: float) -> str:
    """Return a figure as text: shares in percent, the rest with three digits or more."""
    if name in SHARES:
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def table_of(table: Table, found: Found) -> str:
    """Return the table of figures: the values of the seeds, and their interval."""
    lines = [["cell", "the paper", *(NAMES.get(name, name) for name in table.figures)]]
    lines.append(["---"] * len(lines[0]))
    for cell, each in table.cells.items():
        row = [_spread_text(name, found[cell][name]) if cell in found else NOT_RUN for name in table.figures]
        lines.append([each.label, each.paper or "-", *row])
    return _markdown(lines)


def claims_of(table: Table, found: Found) -> str:
    """Return the table of claims, with the direction that the rule of `verdict` finds."""
    lines = [["claim", "the paper", "ours", "direction"], ["---"] * 4]
    for claim in table.claims:
        pair = [_of(claim, name, found) for name in (claim.higher, claim.lower)]
        higher = pair[0] if isinstance(pair[0], Spread) else None
        ours = " against ".join("?" if each is None else _mean_text(claim.figure, each) for each in pair)
        ours = NOT_RUN if None in pair else f"{NAMES.get(claim.figure, claim.figure)}: {ours}"
        lines.append([claim.text, claim.paper, ours, f"**{verdict(higher, pair[1])}**"])
    return _markdown(lines)


def _of(claim: Claim, name: str | float, found: Found) -> Spread | float | None:
    if not isinstance(name, str):
        return name
    return found[name][claim.figure] if name in found else None


def _mean_text(name: str, value: Spread | float) -> str:
    return shown(name, value.mean if isinstance(value, Spread) else value)


def _spread_text(name: str, spread: Spread) -> str:
    values = ", ".join(shown(name, value) for value in spread.values)
    if spread.low is None or spread.high is None:
        return f"{values} (one seed)"
    return f"{values} [{shown(name, spread.low)} to {shown(name, spread.high)}]"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- the page ----


def marks(name: str) -> tuple[str, str]:
    """Return the lines between which a page's generated part of this name stands."""
    return f"<!-- findings {name} -->", f"<!-- end of findings {name} -->"


def fill(page: Path, parts: Mapping[str, str]) -> None:
    """Replace the marked parts of a page.

    Raises:
        UserError: the page cannot be read, or lacks the marks of a part.
    """
    with reading("The page", page):
        text = page.read_text(encoding="utf-8")
    for name, content in parts.items():
        first, last = marks(name)
        before, found, rest = text.partition(first)
        _, ended, after = rest.partition(last)
        if not (found and ended):
            raise UserError(f"{page} lacks the lines {first} and {last}, between which table {name} belongs.")
        text = f"{before}{first}\n\n{content.strip()}\n\n{last}{after}"
    write_atomically(page, text)
