"""Places where unimm plugs into other programs; each is an optional extra, imported by its own name only."""
