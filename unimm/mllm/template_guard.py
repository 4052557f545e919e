"""A guard for untrusted chat templates: a trial rendering with resource limits, before transformers renders them.

A template is a program. Jinja's sandbox blocks files and attributes, but not endless loops, strings that multiply or
numbers of a gigabyte. Here counters are inserted into the syntax tree in every loop and around every output, and
operators, filters and calls are checked before they run. A template that passes is rendered again by transformers.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

from unimm.errors import UserError, one_line

LONGEST_TEXT = 10_000_000
"""Maximum characters of one value, or items of one list: more than any model's context."""
MOST_WORK = 10 * LONGEST_TEXT
MOST_STEPS = 200_000
MOST_SECONDS = 10.0
LARGEST_ARGUMENT = 100_000
_LONG_NUMBER = re.compile(r"\d{5}|\*")
_SLOW_FILTERS = ("urlize", "wordwrap", "striptags")  # quadratic in the text's length


class _Refused(Exception):
    """Raised if a template does something that no chat needs."""


class _Budget:
    """The steps, characters and time that one rendering has used."""

    def __init__(self) -> None:
        self.steps, self.work = 0, 0
        self.end = time.monotonic() + MOST_SECONDS

    def step(self) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS or time.monotonic() > self.end:
            raise _Refused(f"takes more than {MOST_STEPS} steps or {MOST_SECONDS:g} seconds")

    def need(self, size: int) -> None:
        """Charge `size` characters or items to the budget, before they are created."""
        self.work += size
        if size > LONGEST_TEXT or self.work > MOST_WORK:
            raise _Refused(f"makes more than {LONGEST_TEXT} characters")


_budget: ContextVar[_Budget] = ContextVar("what a rendering has used up")


class _Counting(NodeTransformer):
    """A syntax tree transformer that adds a counter to loops, macros and outputs, and replaces `~`."""

    def _counted(self, node: Any, *_: Any) -> Any:
        self.generic_visit(node)
        step = nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None))
        node.body.insert(0, step.set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted

    def visit_Output(self, node: nodes.Output, *_: Any) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [
            each if isinstance(each, nodes.TemplateData) else self._call("put", [each]) for each in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat, *_: Any) -> nodes.Call:
        self.generic_visit(node)
        return self._call("join", node.nodes)

    @staticmethod
    def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)
        if arguments:
            call.set_lineno(arguments[0].lineno)
        return call


class _GuardedEnvironment(ImmutableSandboxedEnvironment):
    """The Jinja environment of transformers, with counters."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return tree

    def step(self) -> None:
        _budget.get().step()

    def put(self, value: Any) -> Any:
        """Charge an output to the budget and return it."""
        _budget.get().need(_size(value))
        return value

    def join(self, *parts: Any) -> str:
        _budget.get().need(sum(map(_size, parts)))
        return "".join(map(str, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # the sandbox wraps a text's `format`
        if owner is not self:
            _check_arguments(getattr(__obj, "__name__", ""), owner, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if owner is not self:
            budget.need(_size(result))
        return result


def _size(value: Any) -> int:
    """Return the number of characters or items of a value, as it is or once written."""
    if isinstance(value, str | list | tuple | dict):
        return len(value)
    if isinstance(value, int):
        if value.bit_length() > 4096:
            raise _Refused("makes a number of more than a thousand digits")
        return 20
    return 20


def _check_operands(operator: str, left: Any, right: Any) -> None:
    budget = _budget.get()
    budget.step()
    numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "%" and isinstance(left, str):
        _check_arguments("format", left, (right,) if not isinstance(right, tuple) else right, {})
    elif operator == "+" and not numbers:
        budget.need(_size(left) + _size(right))
    elif operator == "*" and not numbers:
        count = right if isinstance(right, int) else left if isinstance(left, int) else 1
        budget.need(max(_size(left), _size(right)) * max(count, 0) if isinstance(count, int) else 0)
    elif operator == "*" and left.bit_length() + right.bit_length() > 4096:
        raise _Refused("makes a number of more than a thousand digits")
    elif operator == "**" and (not numbers or left.bit_length() * abs(right) > 4096):
        raise _Refused(f"raises a number to the power of {right!r:.20}")


def _check_arguments(name: str, owner: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check the arguments of a call or a filter (`owner` is its first argument) before it runs."""
    values = (*args, *kwargs.values())
    if any(isinstance(value, int) and abs(value) > LARGEST_ARGUMENT for value in values):
        raise _Refused(f"calls {name} with a number above {LARGEST_ARGUMENT}")
    budget = _budget.get()
    texts = [value for value in values if isinstance(value, str)]
    if name == "replace" and isinstance(owner, str):
        budget.need((len(owner) + 1) * max(map(len, texts), default=0) + len(owner))
    elif name == "join":
        parts = next((value for value in (*args, owner) if isinstance(value, list | tuple)), ())
        separator = owner if isinstance(owner, str) else next(iter(texts), "")
        budget.need(sum(_size(part) + len(separator) for part in parts))
    elif name in ("format", "format_map", "do_format") and isinstance(owner, str) and _LONG_NUMBER.search(owner):
        raise _Refused("formats a value to a width of its own")
    elif name in ("indent", "expandtabs", "tojson"):
        width = max((value for value in values if isinstance(value, int)), default=4)
        budget.need(max(width, *map(len, texts), 1) * (_size(owner) + 1))
    elif name in ("lipsum", "generate_lorem_ipsum"):
        raise _Refused("writes filler text")


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0  # environment or context comes first

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        owner, rest = (args[passed], args[passed + 1 :]) if len(args) > passed else (None, ())
        if name in _SLOW_FILTERS:
            budget.need(_size(owner) ** 2)
        _check_arguments(name, owner, rest, kwargs)
        result = function(*args, **kwargs)
        budget.need(_size(result))
        return result

    return checked


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    theirs = _compile_jinja_template("").environment
    environment = _GuardedEnvironment(
        extensions=[type(extension) for extension in theirs.extensions.values()], trim_blocks=True, lstrip_blocks=True
    )
    environment.filters = {name: _guarded(name, each) for name, each in theirs.filters.items()}
    environment.globals |= theirs.globals
    environment.tests = theirs.tests
    return environment.from_string(template)


def render_guarded(template: Any, messages: Iterable[Any], **context: Any) -> str:
    """Render a chat template within resource limits.

    Raises:
        UserError: if it is not a string, fails, rejects the messages, or does more work than any chat needs.
    """
    if not isinstance(template, str):
        raise UserError(f"The chat template is a {type(template).__name__}, not a text.")
    token = _budget.set(_Budget())
    try:
        _budget.get().need(len(template))
        pieces = _compiled(template).generate(messages=_plain(messages), **_plain(context))
        return "".join(pieces)
    except _Refused as refused:
        raise UserError(f"The chat template {refused}: it is broken, or made to do harm.") from None
    except (RecursionError, MemoryError):
        raise UserError("The chat template never ends: it is broken, or made to do harm.") from None
    except TemplateError as error:
        raise UserError(f"The chat template cannot render these messages: {one_line(error)[:200]}.") from error
    except Exception as error:  # a template's expressions can raise anything
        raise UserError(
            f"The chat template cannot render these messages ({type(error).__name__}: {one_line(error)[:150]})."
        ) from error
    finally:
        _budget.reset(token)


def _plain(value: Any) -> Any:
    """Return a value of plain types for a template; images and other objects become True."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else True
