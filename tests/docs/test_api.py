"""docs/api.md: every public name is there, every name on it exists, and its signatures are the code's."""

import ast
import inspect
import re
from typing import Any

import pytest

import unimm
import unimm.class_conditional.drawing
import unimm.export.onnx_tokenizer
import unimm.mllm
import unimm.tokenizer
from tests.docs.pages import read_page

PAGE = "api.md"
PLACES = (unimm, unimm.mllm, unimm.tokenizer, unimm.class_conditional.drawing, unimm.export.onnx_tokenizer)
FIRST_CELL = r"^\| `(__)?(\w.*?)` \|"
Parameter = tuple[str, Any, Any]


def first_cells() -> list[str]:
    """Return the code in the first column of every table."""
    return ["".join(found) for found in re.findall(FIRST_CELL, read_page(PAGE), flags=re.MULTILINE)]


CALLS = [cell for cell in first_cells() if "(" in cell]
NAMES = [cell for cell in first_cells() if "(" not in cell]
ROW = re.compile(r"^\| (`[^`]+` \| ?){4}$")
CONFIGS = ("VQRAEConfig", "VFMTokConfig", "IDEALConfig")


def find(dotted: str) -> Any:
    """Return what a name on the page stands for."""
    first, *rest = dotted.split(".")
    found = next(getattr(place, first) for place in PLACES if hasattr(place, first))
    for name in rest:
        found = getattr(found, name)
    return found


def written_parameters(call: str) -> list[Parameter]:
    """Return (name, kind, default) of the parameters as the page writes them."""
    arguments = ast.parse(f"def f{call[call.index('(') :]}: ...").body[0].args  # type: ignore[attr-defined]
    code = ast.unparse(arguments)
    namespace: dict[str, Any] = {}
    exec(f"def f({code}): ...", namespace)
    return real_parameters(namespace["f"], method=False)


def real_parameters(function: Any, *, method: bool) -> list[Parameter]:
    """Return (name, kind, default) of the parameters of a function; `method` leaves its `self` out."""
    parameters = list(inspect.signature(function).parameters.values())[1 if method else 0 :]
    return [(each.name, each.kind, each.default) for each in parameters]


def takes_self(dotted: str) -> bool:
    owner, _, name = dotted.rpartition(".")
    return (
        bool(owner)
        and not inspect.ismethod(inspect.getattr_static(find(owner), name))
        and not isinstance(inspect.getattr_static(find(owner), name), classmethod)
    )


def test_every_public_name_is_on_the_page() -> None:
    written = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", read_page(PAGE)))))
    assert set(unimm.__all__) - written == set()


@pytest.mark.parametrize("name", NAMES)
def test_names_exist(name: str) -> None:
    if name not in {row[0] for row in config_rows()}:
        assert find(name) is not None


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.partition("(")[0])
def test_signatures_are_those_of_the_code(call: str) -> None:
    dotted = call.partition("(")[0]
    assert written_parameters(call) == real_parameters(find(dotted), method=takes_self(dotted))


def config_rows() -> list[list[str]]:
    """Return the rows of the table of configuration fields, as code."""
    return [re.findall(r"`([^`]+)`", line) for line in read_page(PAGE).splitlines() if ROW.match(line)]


@pytest.mark.parametrize("column", range(len(CONFIGS)), ids=CONFIGS.__getitem__)
def test_configuration_defaults(column: int) -> None:
    rows = config_rows()
    assert len(rows) >= 8
    fields = inspect.signature(find(CONFIGS[column])).parameters
    for name, *defaults in rows:
        assert ast.literal_eval(defaults[column]) == fields[name].default, name


def test_config_fields_of_a_unified_model_exist() -> None:
    (sentence,) = re.findall(r"`model.config` holds (.*?)\.\n", read_page(PAGE), flags=re.DOTALL)
    fields = inspect.signature(unimm.mllm.vocabulary.ImageVocabularyFields).parameters
    assert set(re.findall(r"`(\w+)`", sentence)) <= set(fields)


def test_a_wrong_signature_is_found() -> None:
    assert written_parameters("ask(text, images=None)") != real_parameters(unimm.ChatSession.ask, method=True)
    assert written_parameters("f(a, *, b=1, **c)")[1][2] == 1
