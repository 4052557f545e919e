"""Continue a long run if an image cannot be read or scored: its sample gets a record with the reason.

Scorers take images in batches. If a batch fails, its images are tried one by one; if all of several fail, the scorer is
at fault, and the run stops and can be resumed later.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from unimm.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_or_error(items: Sequence[Item], load: Callable[[Item], Result]) -> list[Result | UserError]:
    """Return `load(item)` for each item, or the UserError that it raised."""
    found: list[Result | UserError] = []
    for item in items:
        try:
            found.append(load(item))
        except UserError as error:
            found.append(error)
    return found


def scored_or_error(
    items: Sequence[Item | UserError], scorer: Callable[[Sequence[Item]], Sequence[Result]]
) -> list[Result | UserError]:
    """Return the scorer's result for each item of a batch; errors among the items are passed through.

    Raises:
        UserError: the scorer rejects each of several items by itself.
    """
    good = [item for item in items if not isinstance(item, UserError)]
    try:
        results: list[Result | UserError] = list(scorer(good)) if good else []
    except UserError as error:
        results = each_or_error(good, lambda item: scorer([item])[0])
        if len(good) > 1 and all(isinstance(result, UserError) for result in results):
            raise error from None
    answered = iter(results)
    return [item if isinstance(item, UserError) else next(answered) for item in items]
