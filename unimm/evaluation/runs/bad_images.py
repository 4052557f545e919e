"""Go on with a long run when an image cannot be read or judged: its sample gets a row that says why.

Judges take images in batches. When a batch fails, its images are tried one by one; if all of several fail, the fault is
the judge's, and the run stops, to go on later.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from unimm.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_or_error(items: Sequence[Item], load: Callable[[Item], Result]) -> list[Result | UserError]:
    """Return what `load` makes of each item, or the sentence that it refuses it with."""
    found: list[Result | UserError] = []
    for item in items:
        try:
            found.append(load(item))
        except UserError as error:
            found.append(error)
    return found


def judged_or_error(
    items: Sequence[Item | UserError], judge: Callable[[Sequence[Item]], Sequence[Result]]
) -> list[Result | UserError]:
    """Return what `judge` makes of a batch, item by item; errors among the items stay what they are.

    Raises:
        UserError: the judge refuses each of several items by itself.
    """
    good = [item for item in items if not isinstance(item, UserError)]
    try:
        results: list[Result | UserError] = list(judge(good)) if good else []
    except UserError as error:
        results = each_or_error(good, lambda item: judge([item])[0])
        if len(good) > 1 and all(isinstance(result, UserError) for result in results):
            raise error from None
    answered = iter(results)
    return [item if isinstance(item, UserError) else next(answered) for item in items]
