"""A package, so that one named `tests` which somebody else installed cannot take its place."""
