"""The commands of `unimm`, one module each.

A module has `add_arguments(parser)` and `run(arguments, report)`, whose docstring is the command's help; `unimm.cli`
lists it in `COMMANDS`. Importing it is cheap: what needs torch or transformers is imported in `run`, after the
arguments have been checked.
"""
