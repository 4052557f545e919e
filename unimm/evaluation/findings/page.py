"""Write the report of all tables into a page, and its plots and image panels beside it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from unimm.data.image_files import save_image_atomically
from unimm.errors import UserError
from unimm.evaluation.findings.plan import Table
from unimm.evaluation.findings.report import NAMES, SHARES, Found, claims_of, fill, gathered, table_of
from unimm.evaluation.findings.run import Place, read_cell
from unimm.evaluation.findings.verdict import Figure
from unimm.runs.provenance import appearing

MOST_SEEDS = 100
PANEL_SCALE = 2


def write_report(place: Place, tables: dict[str, Table], page: Path) -> list[Path]:
    """Fill the page with every table; return the files written. Images go into the folder `images` beside it."""
    parts, written = dict[str, str](), [page]
    for name, table in tables.items():
        cells, folders = finished(place, name, table)
        found = gathered(cells)
        text = [f"{table.paper}. {table.note.strip()}", table_of(table, found), claims_of(table, found)]
        if found:
            plot = page.parent / "images" / f"findings-{name}.png"
            save_plot(table, found, plot)
            images = [(plot, "figures of the cells; a point is a seed, a bar its interval")]
            images += save_panels(name, folders, page.parent / "images")
            text += [f"![Table {name}: {words}](images/{path.name})" for path, words in images]
            written += [path for path, _ in images]
        parts[name] = "\n\n".join(text)
    fill(page, parts)
    return written


def finished(place: Place, name: str, table: Table) -> tuple[dict[str, list[dict[str, Figure]]], dict[str, Path]]:
    """Return the figures of the finished seeds of every cell, and the folder of each cell's first one."""
    cells: dict[str, list[dict[str, Figure]]] = {cell: [] for cell in table.cells}
    folders: dict[str, Path] = {}
    for cell in table.cells:
        for seed in range(MOST_SEEDS):
            if (figures := read_cell(place, name, table, cell, seed)) is not None:
                cells[cell].append(figures)
                folders.setdefault(cell, place.cell(name, cell, seed))
    return cells, folders


def save_plot(table: Table, found: Found, path: Path) -> None:
    """Save one plot for each figure of a table: cells on the y axis, a point for each seed over its interval.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ModuleNotFoundError:
        raise UserError("Plots are made by matplotlib, which is not installed: install unimm[eval].") from None

    names = [cell for cell in table.cells if cell in found]
    columns = min(4, len(table.figures))
    rows = -(-len(table.figures) // columns)
    canvas = Canvas(figsize=(3.2 * columns, (0.6 + 0.28 * len(names)) * rows), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = np.atleast_1d(np.asarray(canvas.subplots(rows, columns, sharey=True))).ravel()
    for axis, name in zip(axes, table.figures, strict=False):
        factor = 100 if name in SHARES else 1
        for place, cell in enumerate(names):
            spread = found[cell][name]
            if spread.low is not None and spread.high is not None:
                axis.plot([spread.low * factor, spread.high * factor], [place, place], color="#9ecae1", linewidth=6)
            axis.plot([value * factor for value in spread.values], [place] * len(spread.values), "o", color="#08519c")
        axis.set_yticks(range(len(names)), [table.cells[cell].label for cell in names], fontsize=8)
        axis.set_title(f"{NAMES.get(name, name)}{' (%)' if factor == 100 else ''}", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    for axis in axes[len(table.figures) :]:
        axis.set_visible(False)
    with appearing(path, "plot") as temporary:
        canvas.savefig(temporary, format="png", dpi=110)


def save_panels(name: str, folders: dict[str, Path], images: Path) -> list[tuple[Path, str]]:
    """Save the panels, and the maps if there are any, of a table's cells one below the other; return them with words
    for each."""
    cells = ", ".join(folders)
    kinds = {
        "panel": f"originals above reconstructions; {cells}",
        "maps": f"images, K-means maps of their features and of their codes; {cells}",
    }
    written = []
    for kind, words in kinds.items():
        if found := [path for folder in folders.values() if (path := folder / f"{kind}.png").exists()]:
            path = images / f"findings-{name}-{kind}.png"
            save_image_atomically(stacked(found), path)
            written.append((path, words))
    return written


def stacked(paths: Sequence[Path], gap: int = 4) -> Image.Image:
    """Return images of one width one below the other, enlarged if they are small, with a white line between them."""
    rows = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    line = np.full((gap, rows[0].shape[1], 3), 255, np.uint8)
    image = Image.fromarray(np.concatenate([part for row in rows for part in (row, line)][:-1]))
    if image.width >= 512:
        return image
    return image.resize((image.width * PANEL_SCALE, image.height * PANEL_SCALE), Image.Resampling.NEAREST)
