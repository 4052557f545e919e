"""docs/data.md promises only settings that there are."""

import re

import pytest
import yaml

from tests.conftest import ROOT
from unimm.config.schema import build
from unimm.data.image_streams import ImageDataConfig
from unimm.data.mixture import MixtureConfig
from unimm.encoding import EncodeConfig

TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
SETTINGS = {"recipes/tokenizer.py": ImageDataConfig, "recipes/t2i.py": MixtureConfig, "recipes/encode.py": EncodeConfig}


@pytest.mark.parametrize(("recipe", "block"), BLOCKS, ids=[recipe for recipe, _ in BLOCKS])
def test_the_settings_exist(recipe, block):
    build(SETTINGS[recipe], yaml.safe_load(block)["data"], key="data", source="docs/data.md")


def test_every_recipe_is_shown_and_every_file_exists():
    assert {recipe for recipe, _ in BLOCKS} == set(SETTINGS)
    for path in re.findall(r"(?:recipes|configs|unimm)/[\w./]+\w", TEXT):
        assert (ROOT / path).exists(), path
