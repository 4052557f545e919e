"""Tiny models and text tokenizers built from real configuration classes, for testing unimm and new hosts.

A host is the language or multimodal model that an image tokenizer is attached to.
"""
