"""Build tiny models and text tokenizers from real configuration classes, for the tests of unimm and of new hosts."""
