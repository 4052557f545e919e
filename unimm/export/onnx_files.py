"""Write an image tokenizer as three ONNX graphs, for onnxruntime and whatever else reads ONNX.

| file | input | outputs |
|---|---|---|
| encoder.onnx | pixel_values [B, 3, H, W] | features [B, N, D], latents [B, M, C] |
| quantizer.onnx | latents [B, M, C] | ids [B, M] int64 |
| decoder.onnx | ids [B, M] int64 | pixels [B, 3, H, W] in [0, 1] |

All values are float32 and B is free; the size of the images is the configuration's. `image_tokenizer.json` beside them
holds what a caller needs to know. `unimm.export.onnx_tokenizer` reads the folder without torch.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.errors import UserError
from unimm.export.onnx_tokenizer import DESCRIPTION, GRAPHS
from unimm.saving import whole_folder
from unimm.tokenizer import ImageTokenizer, ImageTokenizerProcessor

TOLERANCE = 1e-4
"""Largest difference to torch, relative to the largest value where that is above 1."""
LARGEST_FILE = 2**31 - 2**20
"""Bytes of weights of one graph in one file (protobuf's limit is 2 GiB); above, they go into a file beside it."""


def save_onnx(tokenizer: ImageTokenizer, image_processor: ImageTokenizerProcessor, folder: Path) -> None:
    """Write `write_onnx`'s files into `folder`, all or none."""
    with whole_folder(folder) as staging:
        write_onnx(tokenizer, image_processor, staging)


def write_onnx(tokenizer: ImageTokenizer, image_processor: ImageTokenizerProcessor, folder: Path) -> None:
    """Write the tokenizer's encoder, quantizer and decoder into `folder`, with their description.

    Each graph is run by onnxruntime on two random images and compared with torch before this returns.

    Raises:
        UserError: onnxruntime computes something else than torch.
    """
    tokenizer = _in_float32(tokenizer)
    config, side = tokenizer.config, tokenizer.config.image_size
    pixel_values = tokenizer.normalize(torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)))
    given = pixel_values
    for name, graph in (("encoder", _Encoder), ("quantizer", _Quantizer), ("decoder", _Decoder)):
        module = graph(tokenizer).eval()
        with torch.no_grad():
            expected = module(given)
            _write_graph(name, module, given, folder)
        _check(name, given, expected, folder)
        given = expected[-1]
    description = {
        "format": 1,
        "model_type": config.model_type,
        "image_size": side,
        "output_size": config.output_size,
        "image_mean": list(image_processor.image_mean),
        "image_std": list(image_processor.image_std),
        "resample": Image.Resampling(image_processor.resample).name.lower(),
        "pad_to_square": image_processor.pad_to_square,
        "patch_grid": list(config.patch_grid),
        "grid": list(config.grid),
        "hidden_size": config.hidden_size,
        "codebook_size": config.codebook_size,
        "codebook_dim": config.codebook_dim,
        "fingerprint": tokenizer.fingerprint,
        "graphs": {name: {"file": f"{name}.onnx", **names} for name, names in GRAPHS.items()},
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


class _Encoder(nn.Module):
    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        states = self.tokenizer.hidden_states(pixel_values)
        return states[-1], self.tokenizer.latents(*self.tokenizer.sources(states))


class _Quantizer(nn.Module):
    """The nearest code by brute force in float64, which is what the exact search of `tokenizer.search` returns."""

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.quantizer = tokenizer.quantizer
        self.table = nn.Buffer(tokenizer.quantizer.effective_codebook.detach())

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        rows, table = self.quantizer.comparable(latents).double(), self.table.double()
        return ((table.square().sum(dim=1) / 2 - rows @ table.t()).argmin(dim=-1),)


class _Decoder(nn.Module):
    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.table = nn.Buffer(tokenizer.quantizer.effective_codebook.detach())

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        codes = F.embedding(ids, self.table)
        return (self.tokenizer.pixels_from(codes, self.tokenizer.config.grid).clamp(0, 1),)


def _in_float32(tokenizer: ImageTokenizer) -> ImageTokenizer:
    """Return the tokenizer in float32 on the CPU, in evaluation mode; a copy if it is elsewhere."""
    if tokenizer.dtype == torch.float32 and tokenizer.device.type == "cpu" and not tokenizer.training:
        return tokenizer
    copied = type(tokenizer)(tokenizer.config).float()
    copied.load_state_dict(tokenizer.state_dict())
    return copied.eval()


def _write_graph(name: str, module: nn.Module, given: Tensor, folder: Path) -> None:
    """Export one graph with a free batch size; torch.export raises if the module depends on the batch size."""
    input_name, outputs = GRAPHS[name]["input"], GRAPHS[name]["outputs"]
    batch = {input_name: {0: torch.export.Dim("batch")}}
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    with _quiet():
        program = torch.export.export(module, (given,), dynamic_shapes=batch)
        torch.onnx.export(
            program,
            (),
            folder / f"{name}.onnx",
            input_names=[input_name],
            output_names=list(outputs),
            dynamic_shapes=batch,
            external_data=size > LARGEST_FILE,
            dynamo=True,
            verbose=False,
        )


def _check(name: str, given: Tensor, expected: tuple[Tensor, ...], folder: Path) -> None:
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {GRAPHS[name]["input"]: given.numpy()})
    for output, ours, theirs in zip(GRAPHS[name]["outputs"], expected, found, strict=True):
        wanted = ours.numpy()
        difference = float(np.abs(wanted.astype(np.float64) - theirs).max())
        allowed = 0.0 if ours.dtype == torch.int64 else TOLERANCE * max(1.0, float(np.abs(wanted).max()))
        if not difference <= allowed:
            raise UserError(
                f"onnxruntime {onnxruntime.__version__} computes other {output} from {name}.onnx than torch: they "
                f"differ by {difference:.2g}, and {allowed:.2g} is allowed. Use another version of either."
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes about operators that are not installed and constants that it does not fold."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
