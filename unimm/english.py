"""English helpers for prompts and questions: articles, GenEval's plurals, numbers and lists."""

from collections.abc import Sequence

NUMBERS = ("zero", "one", "two", "three", "four")


def with_article(noun: str) -> str:
    """Prefix the noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Return GenEval's naive plural: +es after s, else +s."""
    return noun + ("es" if noun.endswith("s") else "s")


def enumeration(parts: Sequence[str]) -> str:
    """Join the parts as in "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
