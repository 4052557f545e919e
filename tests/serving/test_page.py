"""docs/serving.md: its example runs as it is written, its options and its endpoints exist."""

import re

from tests.docs.pages import code_blocks, read_page
from tests.serving.conftest import KEY, Served
from unimm.cli import build_parser


def test_the_example_runs(served: Served) -> None:
    (code,) = code_blocks("serving.md", "python")
    names: dict[str, object] = {}
    exec(code.replace("http://127.0.0.1:8000", served.url).replace('"none"', repr(KEY)), names)
    assert names["answer"].choices[0].message.content  # type: ignore[attr-defined]


def test_endpoints_and_options_exist(served: Served) -> None:
    text = read_page("serving.md")
    paths = set(served.client.get("/../openapi.json", cast_to=dict)["paths"])  # type: ignore[type-var]
    found = set(re.findall(r"`(/[a-z0-9/]+)`", text)) - {"/draw"}
    assert found and found <= paths
    helped = build_parser().parse_args(["serve"])
    for option in set(re.findall(r"`--([a-z-]+)", text)):
        assert hasattr(helped, option.replace("-", "_")), option
