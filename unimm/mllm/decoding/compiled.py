"""Compiled decoding steps: the model's own forward or a fused one, a static cache, every tensor written in place.

On a GPU the whole step, the choice of the next tokens included, is captured as a CUDA graph. What a graph reads and
writes must keep its address, so a `CompiledStep` with its cache is kept for the next drawing of the same size: that one
copies its prompt and replays. R rows, T tokens of the cache, L of the prompt, M image tokens, S sequences, K codes.
"""

import time
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.utils import logging

from unimm.mllm.choice import Choice, Chosen, Inputs
from unimm.mllm.decoding.fused import FusedForward, FusedLayers, addresses, fused_layers
from unimm.mllm.decoding.host import HostSteps

logger = logging.get_logger(__name__)

_SIZE_STEP = 64  # a static cache is rounded up to this: prompts of similar length share a compiled step
_KEPT = 2  # steps that wait for the next drawing of a model: the guided and the unguided rows of one
_GRAPHS = 4  # CUDA graphs of a step, one for each way of choosing ids
_SIZES = 64  # sizes of batches and prompts that are compiled in a process, before drawing falls back

unfused: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""Models that are compiled with their own forward: the fused one could not be compiled."""

_free: "weakref.WeakKeyDictionary[Any, list[CompiledStep]]" = weakref.WeakKeyDictionary()


def _forward(model: Any, static: StaticCache, hidden: Tensor, place: Tensor, token_ids: Tensor, at: Tensor) -> Tensor:
    """Feed one token of each row, and return the logits [R, 1, K] after it."""
    hidden.index_fill_(1, place, False)
    place.add_(1)
    lowest = torch.finfo(model.dtype).min
    mask = torch.zeros_like(hidden, dtype=model.dtype).masked_fill(hidden, lowest)
    output = model(
        input_ids=token_ids,
        attention_mask=mask[:, None, None],
        position_ids=at,
        past_key_values=static,
        use_cache=True,
        vocabulary="image",
    )
    logits: Tensor = output.logits
    return logits


class Captured:
    """A CUDA graph of `run(*inputs)`, with memory of its own for what comes in.

    Args:
        state: what `run` changes in place; the capture leaves it as it is.
        reads: what owns the other tensors that `run` reads; it must live as long as the graph.
    """

    def __init__(self, run: Callable[..., Chosen], inputs: Inputs, state: list[Tensor], reads: Any) -> None:
        self.reads, self.inputs = reads, [None if each is None else each.clone() for each in inputs]
        before = [each.clone() for each in state]
        with torch.cuda.device(state[0].device):  # streams belong to the current device
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # compile, and warm up
                    run(*self.inputs)
                    for each, old in zip(state, before, strict=True):
                        each.copy_(old)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # other threads may allocate memory meanwhile
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.outputs = run(*self.inputs)

    def __call__(self, *inputs: Tensor | None) -> Chosen:
        for own, given in zip(self.inputs, inputs, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        self.graph.replay()
        raw, scores, ids = self.outputs
        return raw.clone(), scores.clone(), ids.clone()  # the next replay writes to the same memory


class CompiledStep:
    """One decoding step for R rows and T tokens at most, with a static cache of its own; for one drawing at a time.

    Args:
        layers: keys and values [R, H', L, d] of each layer, which give the sizes, types and devices of the cache.
        length: T.
    """

    def __init__(
        self, model: Any, layers: list[tuple[Tensor, Tensor]], hidden: Tensor, length: int, fused: FusedLayers | None
    ) -> None:
        self.key = _key(model, layers, length, fused)
        self.static = StaticCache(config=model.config.get_text_config(), max_cache_len=length)
        for layer, (keys, values) in zip(self.static.layers, layers, strict=True):
            layer.lazy_initialization(keys, values)
        self.hidden = torch.ones(len(hidden), length, dtype=torch.bool, device=hidden.device)
        self.place = torch.zeros(1, dtype=torch.long, device=hidden.device)
        self.fused = None if fused is None else FusedForward(fused, length)
        self.compiled = torch.compile(_forward, dynamic=False, fullgraph=True)
        devices = {layer.keys.device for layer in self.static.layers} | {hidden.device}
        self.captured = len(devices) == 1 and hidden.is_cuda  # a graph belongs to one device
        self.graphs: dict[Hashable, Captured] = {}
        self.warm = False

    @classmethod
    def for_drawing(
        cls, model: Any, layers: list[tuple[Tensor, Tensor]], hidden: Tensor, length: int
    ) -> "CompiledStep":
        """Return a step that holds these L tokens, hidden [R, L] where they are masked; a kept one if its size fits."""
        fused = None if model in unfused else fused_layers(model)
        free, key = _free.setdefault(model, []), _key(model, layers, length, fused)
        fitting = next((step for step in free if step.key == key), None)
        if fitting is None:
            fitting = cls(model, layers, hidden, length, fused)
        else:
            free.remove(fitting)
        fitting._load(layers, hidden)
        return fitting

    def release(self, model: Any) -> None:
        """Keep the step for the next drawing of its size, if it has run."""
        if not self.warm:
            return
        free = _free.setdefault(model, [])
        free.append(self)
        del free[:-_KEPT]

    def _load(self, layers: list[tuple[Tensor, Tensor]], hidden: Tensor) -> None:
        length = hidden.shape[1]
        for layer, (keys, values) in zip(self.static.layers, layers, strict=True):
            for kept, given in ((layer.keys, keys), (layer.values, values)):
                kept[:, :, :length] = given
                kept[:, :, length:] = 0  # masked, but a NaN there would count
            layer.cumulative_length.fill_(length)
        self.hidden.fill_(True)
        self.hidden[:, :length] = hidden
        self.place.fill_(length)

    def layers(self, rows: Tensor, length: int) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and values of these rows' first L tokens."""
        pairs = [(layer.keys, layer.values) for layer in self.static.layers]
        return [tuple(each[rows.to(each.device), :, :length] for each in pair) for pair in pairs]

    def __call__(self, model: Any, token_ids: Tensor, positions: Tensor, choice: Choice, inputs: Inputs) -> Chosen:
        """Feed token_ids [R, 1] at positions [R, 1], or [3, R, 1] for M-RoPE; choose the next tokens, see `Choice`."""
        if self.warm:
            return self._chosen(model, token_ids, positions, choice, inputs)
        start, (rows, length) = time.perf_counter(), self.hidden.shape
        chosen = self._chosen(model, token_ids, positions, choice, inputs)
        seconds, self.warm = time.perf_counter() - start, True
        logger.warning(f"Compiled the drawing step of {rows} rows and {length} tokens in {seconds:.1f} s.")
        return chosen

    def _chosen(self, model: Any, token_ids: Tensor, positions: Tensor, choice: Choice, inputs: Inputs) -> Chosen:
        if not self.captured:
            return choice(self._logits(model, token_ids, positions), *inputs)
        key = choice.key, tuple(None if each is None else (each.shape, each.dtype) for each in inputs)
        if key not in self.graphs:
            for oldest in list(self.graphs)[: 1 - _GRAPHS]:
                del self.graphs[oldest]
            self.graphs[key] = self._capture(model, choice, (token_ids, positions, *inputs))
        return self.graphs[key](token_ids, positions, *inputs)

    def _logits(self, model: Any, token_ids: Tensor, positions: Tensor) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=_SIZES):
            given = (self.static, self.hidden, self.place, token_ids, positions)
            output: Tensor = self.compiled(model, *given) if self.fused is None else self.fused(*given)
        return output

    def _capture(self, model: Any, choice: Choice, inputs: Inputs) -> Captured:
        def run(token_ids: Tensor, positions: Tensor, *others: Any) -> Chosen:
            return choice(self._logits(model, token_ids, positions), *others)

        state = [self.hidden, self.place, *(each.cumulative_length for each in self.static.layers)]
        return Captured(run, inputs, state, choice)


def _key(model: Any, layers: list[tuple[Tensor, Tensor]], length: int, fused: FusedLayers | None) -> tuple[Any, ...]:
    """Return what a kept step must have in common with a drawing: sizes, addresses of weights, active adapters."""
    shapes = [(keys.shape[:2], keys.shape[3:], keys.dtype, keys.device) for keys, _ in layers]
    adapters = [each for each in model.modules() if hasattr(each, "_disable_adapters")]
    state = [
        (each._disable_adapters, str(each.active_adapters), str(getattr(each, "scaling", ""))) for each in adapters
    ]
    mode = model.config.get_text_config()._attn_implementation, fused, torch.is_inference_mode_enabled()
    return length, tuple(shapes), addresses(model), tuple(state), mode


class CompiledSteps(HostSteps):
    """Decoding steps that are compiled once for each size, see `CompiledStep`."""

    def __init__(
        self, model: Any, cache: DynamicCache, mask: Tensor, positions: Tensor, on_fallback: Callable[[str], None]
    ) -> None:
        super().__init__(model, cache, mask, positions)
        self.on_fallback: Callable[[str], None] | None = on_fallback
        self.prompt_mask = mask
        self.step: CompiledStep | None = None

    @property
    def takes_many(self) -> bool:
        """Return whether several tokens can be fed at once: only before the first compiled step."""
        return self.step is None

    def _take(self, layers: list[tuple[Tensor, Tensor]], hidden: Tensor) -> CompiledStep:
        """Return a compiled step with these tokens; it is free for another drawing once this one is gone."""
        total = self.positions.shape[-1] - self.done + hidden.shape[1]
        total = -(-total // _SIZE_STEP) * _SIZE_STEP
        step = CompiledStep.for_drawing(self.model, layers, hidden, total)
        weakref.finalize(self, step.release, self.model)
        return step

    def _begin(self) -> CompiledStep:
        length = self.cache.get_seq_length()
        hidden = torch.zeros(len(self.prompt_mask), length, dtype=torch.bool, device=self.prompt_mask.device)
        hidden[:, : self.prompt_mask.shape[1]] = self.prompt_mask == 0
        return self._take([(layer.keys, layer.values) for layer in self.cache.layers], hidden)

    def choose(self, token_ids: Tensor, needed: int, choice: Choice, inputs: Inputs) -> Chosen:
        """See `Steps`; after the first compiled step it takes one token at a time."""
        if self.on_fallback is None or token_ids.shape[1] > 1:
            return super().choose(token_ids, needed, choice, inputs)
        first, positions = self.step is None, self.positions[..., self.done : self.done + 1].contiguous()
        try:
            self.step = self.step or self._begin()
            chosen = self.step(self.model, token_ids, positions, choice, inputs)
        except Exception as error:  # a compiler can raise anything; only the first step can still fall back
            if not first:
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            self.done += 1
            return chosen
        fused, self.step = self.step is not None and self.step.fused is not None, None
        if fused:  # the model's own forward may compile
            unfused.add(self.model)
            self.on_fallback(f"compiled without fused layers, {reason}")
            return self.choose(token_ids, needed, choice, inputs)
        self.on_fallback(f"not compiled, {reason}")
        self.on_fallback = None
        return super().choose(token_ids, needed, choice, inputs)

    def keep(self, rows: Tensor) -> None:
        """See `Steps`; the step is another one, for the new number of rows."""
        if self.step is None:
            self.prompt_mask = self.prompt_mask[rows]
            return super().keep(rows)
        self.positions = self.positions[..., rows, :]
        length = self.length + self.done
        self.step = self._take(self.step.layers(rows, length), self.step.hidden[rows, :length])
        return None
