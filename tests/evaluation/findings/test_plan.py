"""The tables in configs/findings: every cell is read by its recipes and builds, and what is compared has one budget."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from unimm.config.loading import load_config
from unimm.errors import UserError
from unimm.evaluation.findings.plan import Leg, load_tables
from unimm.evaluation.findings.report import NAMES
from unimm.evaluation.findings.run import leg_digest, overrides_of
from unimm.mllm.loading import default_model_path
from unimm.tokenizer import TOKENIZERS

FOLDER = ROOT / "configs" / "findings"
TABLES = load_tables(FOLDER)
CELLS = [(name, cell) for name, table in TABLES.items() for cell in table.cells]
CLASSES = {"vfm": "VFMConfig", "tokenizer": "TokenizerRecipe", "c2i": "C2IRecipe", "t2i": "T2IRecipe"}


@pytest.fixture(scope="module")
def recipes() -> dict[str, Any]:
    return {name: runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))[found] for name, found in CLASSES.items()}


def read(recipes: dict[str, Any], leg: Leg, folders: dict[str, Path]) -> Any:
    return load_config(recipes[leg.recipe], FOLDER / leg.config, overrides_of(leg, Path("out"), folders, 7))


@pytest.mark.parametrize(("name", "cell"), CELLS, ids=lambda value: value)
def test_every_cell_is_read_by_its_recipes_and_builds(recipes: dict[str, Any], name: str, cell: str) -> None:
    table, folders, vision = TABLES[name], {"cell": Path("cell")}, None
    for leg_name, leg in {**table.shared, **table.legs_of(cell)}.items():
        if leg.recipe == "default_encoder":
            vision = load_config_of_default()
        elif leg.recipe == "vfm":
            vision = {"model_type": "siglip_vision_model", **read(recipes, leg, folders).model.vision}
        else:
            recipe = read(recipes, leg, folders)
            assert (recipe.train.seed, recipe.train.output_dir) == (7, "out")
            if leg.recipe == "tokenizer" and recipe.model.encoder is not None:
                with torch.device("meta"):
                    kind = TOKENIZERS[recipe.model.kind]
                    built = kind(kind.config_class(encoder_config=vision, **recipe.model.config))
                assert recipe.data.image_size == built.config.image_size == built.config.output_size
                assert recipe.train.codebook_init == ("data" if recipe.model.kind == "ideal" else "random")
        folders[leg_name] = Path(leg_name)


def load_config_of_default() -> dict[str, Any]:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(default_model_path()).vision_config.encoder_config.to_dict()


@pytest.mark.parametrize("name", TABLES)
def test_all_cells_of_a_table_see_equally_many_images(recipes: dict[str, Any], name: str) -> None:
    table = TABLES[name]
    folders = {leg: Path(leg) for leg in ("cell", "stage1", "tokenizer", *table.shared)}
    seen = set()
    for cell in table.cells:
        trains = [
            read(recipes, leg, folders).train for leg in table.legs_of(cell).values() if leg.recipe == "tokenizer"
        ]
        seen.add(sum(train.steps * train.batch_size for train in trains))
    assert seen == {(960 if name == "a_long" else 240) * 64}


@pytest.mark.parametrize("name", TABLES)
def test_what_a_table_shows_is_measured(name: str) -> None:
    table, measured = TABLES[name], {"psnr", "ssim", "use", "perplexity"}
    measured |= {"distance"} if table.measures.distance else set()
    measured |= {"probe_features", "probe_codes"} if table.measures.probe else set()
    for cell in table.cells:
        legs = table.legs_of(cell)
        found = measured | ({"ar_loss", "ar_gain", "drawn_distance"} if "c2i" in legs else set())
        found |= (
            {"chat_kept"} | ({"chat_retrained"} if "chat" in legs else set()) if table.measures.questions else set()
        )
        assert set(table.figures) <= found and set(table.figures) <= NAMES.keys()


def test_a_changed_setting_has_another_digest() -> None:
    leg = TABLES["a"].legs_of("dim43")["tokenizer"]
    digests = {leg_digest(leg, FOLDER, 1), leg_digest(leg, FOLDER, 2)}
    digests |= {leg_digest(each, FOLDER, 1) for each in (TABLES["a"].legs["tokenizer"], Leg("tokenizer", leg.config))}
    assert len(digests) == 4 and leg_digest(leg, FOLDER, 1) in digests


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("cells: {one: {label: x, set: {c2i: {a: 1}}}}", "sets 'c2i', which is none of its legs tokenizer"),
        ("cells: {one: {label: x, legs: {c2i: {recipe: c2i}}}}", "one has no leg 'tokenizer'"),
        ("cells: {one: {label: x}}\nclaims: [{text: t, paper: p, figure: ssim, higher: one, lower: 1}]", "about ssim"),
        ("cells: {one: {label: x}}\nclaims: [{text: t, paper: p, figure: psnr, higher: two, lower: 1}]", "cell two"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, table: str, message: str) -> None:
    head = "title: t\npaper: p\nfigures: [psnr]\nmeasures: {source: shapes}\nminutes: 1\n"
    (tmp_path / "x.yaml").write_text(f"{head}legs: {{tokenizer: {{recipe: tokenizer}}}}\n{table}\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_tables(tmp_path)["x"].legs_of("one")
    with pytest.raises(UserError, match="There is no table"):
        load_tables(tmp_path / "nothing")
