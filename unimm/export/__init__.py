"""Export to formats of other engines: ONNX for the image tokenizer, GGUF for the language model.

`unimm.export.onnx_files` and `unimm.export.gguf_file` write them (extras `onnx` and `gguf`), and
`unimm.export.onnx_tokenizer` runs the ONNX files without torch. `unimm.mllm.export` writes checkpoints of transformers.
"""
