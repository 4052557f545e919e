"""Every way through the steps of drawing, held to forwards without cache, batch or padding."""

import shutil
import warnings
import weakref
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.generation.streamers import BaseStreamer

from tests.mllm import tiny
from unimm.errors import UserError
from unimm.mllm import attach, decoding
from unimm.mllm.decoding import CompiledSteps, HostSteps, PlainSteps, compiled, fused, known
from unimm.testing.hosts import tiny_host

TEXTS = ["a photo of a red circle", "two", "an image of two green squares"]
SCALES = [4.0, 0.0, 1.5]


def inputs(processor: Any, texts: list[str] = TEXTS) -> dict[str, Tensor]:
    return dict(processor(text=[processor.drawing_prompt(text) for text in texts], return_tensors="pt", padding=True))


def draw(model: Any, processor: Any, texts: list[str] = TEXTS, **options: Any) -> Any:
    options = {"seed": 3, **options}
    return model.generate(**inputs(processor, texts), generation_mode="image", **options)


@torch.no_grad()
def slow_logits(model: Any, prompt: Tensor, drawn: Tensor, scales: list[float]) -> Tensor:
    """Guided logits [M, K] before each of the drawn ids, one forward for each side."""
    given, other = (
        model(torch.cat([start, drawn[:-1]])[None], vocabulary="image").logits[0, -len(drawn) :]
        for start in (prompt, torch.tensor(model.config.null_prompt))
    )
    scale = torch.tensor(scales, dtype=given.dtype)[:, None]
    return torch.where(scale > 0, other + scale * (given - other), given)


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2_5_vl", "qwen3_vl", "internvl"])
@torch.no_grad()
def test_one_forward_of_all_ids_has_the_logits_of_a_forward_of_each_beginning(family: str) -> None:
    """What the tests of drawing take as right."""
    model, processor = tiny.attached(family)
    drawn = torch.randint(32, (16,)) + model.visual_vocabulary.base
    prompt = inputs(processor, TEXTS[:1])["input_ids"][0]
    steps = [model(torch.cat([prompt, drawn[:n]])[None], vocabulary="image").logits[0, -1] for n in range(16)]
    found = slow_logits(model, prompt, drawn, [0.0] * 16)
    torch.testing.assert_close(found, torch.stack(steps), atol=1e-5 * float(found.abs().max()), rtol=1e-5)


def assert_exact(model: Any, processor: Any, scales: Callable[[int], list[float]], **options: Any) -> Tensor:
    """Hold the logits of a drawing of `TEXTS` to the slow ones; scales(n) are those of prompt n, token by token."""
    output = draw(model, processor, return_dict_in_generate=True, output_logits=True, **options)
    batch = inputs(processor)
    for n, (ids, mask) in enumerate(zip(*batch.values(), strict=True)):
        expected = slow_logits(model, ids[mask.bool()], output.sequences[n], scales(n))
        found = torch.stack([step[n] for step in output.logits])
        torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
    assert output.past_key_values.get_seq_length() == batch["input_ids"].shape[1] + 15
    return output.sequences


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The kinds of steps that were made."""
    kinds: list[type] = []
    original = decoding.steps_after

    def spy(*args: Any) -> Any:
        steps = original(*args)
        kinds.append(type(steps))
        return steps

    monkeypatch.setattr("unimm.mllm.generation.steps_after", spy)
    return kinds


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_plain_steps_are_exact(family: str, tied: bool, used: list[type], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny.unified(family, tied=tied)
    for name, weight in model.named_parameters():  # initialized to 1 and 0, which would hide a forgotten one
        if "norm" in name or "bias" in name:
            nn.init.normal_(weight, mean=1.0, std=0.3)
    plain = assert_exact(model, processor, lambda n: [SCALES[n]] * 16, guidance_scale=SCALES)
    monkeypatch.setattr(decoding, "is_plain", lambda model: False)
    assert torch.equal(assert_exact(model, processor, lambda n: [SCALES[n]] * 16, guidance_scale=SCALES), plain)
    assert used == [PlainSteps, HostSteps]


@pytest.mark.parametrize("mode", ["1d", "2d"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_hosts_with_m_rope_are_exact(family: str, mode: str, used: list[type]) -> None:
    host, texts = tiny_host(family)
    model, processor = attach(host, tiny.image_tokenizer(), texts, image_position_mode=mode)
    assert_exact(model, processor, lambda n: [SCALES[n]] * 16, guidance_scale=SCALES)
    assert used == [HostSteps]


def test_sliding_windows_are_exact(used: list[type]) -> None:
    torch.manual_seed(0)
    config = tiny.language_model("qwen2").config.to_dict() | {
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    model, processor = attach(Qwen2ForCausalLM(Qwen2Config(**config)), tiny.image_tokenizer(), tiny.text_tokenizer())
    drawn = assert_exact(model, processor, lambda n: [3.0] * 16, guidance_scale=3.0)
    assert used == [HostSteps]
    with pytest.warns(UserWarning, match="cannot take back"):
        assert torch.equal(draw(model, processor, guidance_scale=3.0, parallel_tokens=4), drawn)


@pytest.mark.parametrize("plain", [True, False])
def test_intervals_and_schedules_are_exact(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny.unified()
    if not plain:
        monkeypatch.setattr(decoding, "is_plain", lambda model: False)
    inside = [0.0] * 3 + [4.0] * 5 + [0.0] * 8
    assert_exact(model, processor, lambda n: inside, guidance_scale=4.0, guidance_interval=(3, 8))
    rising = [1 + 3 * (step + 1) / 16 for step in range(16)]
    assert_exact(model, processor, lambda n: rising, guidance_scale=4.0, guidance_schedule="linear")
    mixed = [rising[:9] + [0.0] * 7, [0.0] * 16, [0.0] * 16]
    scales = {"guidance_scale": [4.0, 0, 1], "guidance_schedule": "linear", "guidance_interval": [0, 9]}
    assert_exact(model, processor, lambda n: mixed[n], **scales)


def test_no_row_is_computed_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every step: no unconditional ones at scales up to 1 and behind the interval."""
    model, processor = tiny.unified()
    rows: list[int] = []
    original = PlainSteps.logits
    monkeypatch.setattr(PlainSteps, "logits", lambda self, ids, n: (rows.append(len(ids)), original(self, ids, n))[1])
    draw(model, processor, guidance_scale=[1.0, 0.0, 1.0])
    draw(model, processor, guidance_scale=2.0, guidance_interval=(0, 5))
    assert rows == [3] * 15 + [6] * 4 + [3] * 11


def test_negative_prompts_of_unguided_prompts_are_not_read() -> None:
    model, processor = tiny.unified()
    read: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    ids, mask = inputs(processor).values()
    negative = {"negative_prompt_ids": ids, "negative_prompt_attention_mask": mask}
    drawn = draw(model, processor, guidance_scale=[0.0, 3.0, 2.0], **negative)
    assert read == [5] * 16
    for n in (1, 2):
        alone = {name: value[n : n + 1] for name, value in negative.items()}
        again = draw(model, processor, TEXTS[n : n + 1], guidance_scale=[0.0, 3.0, 2.0][n], **alone)
        assert torch.equal(again[0], drawn[n])


class Bent(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


def changed(model: Any, how: str) -> Any:
    text = model.model.language_model
    if how == "hook":
        text.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 1.5)
    elif how == "forward":
        original = text.layers[0].forward
        text.layers[0].forward = lambda *args, **kwargs: original(*args, **kwargs) * 1.1
    elif how == "module":
        text.layers[0].self_attn.v_proj.__class__ = Bent
    elif how == "adapter":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, text)
    elif how == "double":
        model.double()
    elif how == "rope":
        text.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        text.rotary_emb = type(text.rotary_emb)(text.config)
    return model


@pytest.mark.parametrize("how", ["hook", "forward", "module", "adapter", "double", "rope"])
def test_what_plain_steps_do_not_know_the_model_does_itself(how: str, used: list[type]) -> None:
    model, processor = tiny.unified()
    before = draw(model, processor, do_sample=False)
    model = changed(model, how)
    after = assert_exact(model, processor, lambda n: [0.0] * 16, do_sample=False)
    assert used == [PlainSteps, HostSteps]
    assert how in ("double", "rope") or not torch.equal(before, after)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_neighbours_and_batches_do_not_matter(family: str) -> None:
    model, processor = tiny.attached(family)
    options = {"guidance_scale": 3.0, "temperature": 0.9, "top_k": 20}
    alone = torch.cat([draw(model, processor, [text], **options) for text in TEXTS])
    assert torch.equal(draw(model, processor, **options), alone)
    assert torch.equal(draw(model, processor, TEXTS[::-1], **options), alone.flip(0))
    others = [*TEXTS, "one", "yes no is there", "blue", "green ring", "a"]
    assert torch.equal(draw(model, processor, others, **options)[:3], alone)
    several = draw(model, processor, others, num_return_sequences=3, **options).view(8, 3, 16)
    assert torch.equal(several[:3, 0], alone) and len(several.flatten(0, 1).unique(dim=0)) == 24


def test_weights_that_changed_are_seen() -> None:
    """Packed weights live for one call."""
    model, processor = tiny.unified()
    before = draw(model, processor, do_sample=False)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.down_proj.weight.mul_(-3)
    after = assert_exact(model, processor, lambda n: [0.0] * 16, do_sample=False)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("family", ["qwen3", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_compiled_steps_give_the_same_ids(
    family: str, used: list[type], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    model, processor = tiny.attached(family)
    options = {"guidance_scale": SCALES, "guidance_interval": (0, 12)}
    expected = draw(model, processor, **options)
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **kwargs: original(step, backend="eager", dynamic=False))
    assert torch.equal(draw(model, processor, compile=True, **options), expected)
    assert used[1:] == [CompiledSteps] and not [w for w in recwarn if "not compiled" in str(w.message)]


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **kwargs: original(step, backend="eager", dynamic=False))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[compiled.CompiledStep]:
    """The compiled steps that are made, in their order."""
    found: list[compiled.CompiledStep] = []
    original = compiled.CompiledStep.__init__
    monkeypatch.setattr(
        compiled.CompiledStep, "__init__", lambda self, *given: (found.append(self), original(self, *given))[1]
    )
    return found


def test_a_compiled_step_serves_the_next_drawing_of_its_size(
    eager_compiler: None, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU its cache and graph stay where they are: a new one would be compiled and captured again."""
    said: list[str] = []
    monkeypatch.setattr(compiled.logger, "warning", said.append)
    model, processor = tiny.unified()
    for seed, texts, scale in ((3, TEXTS[:1], 2.0), (4, TEXTS[1:2], 2.0), (5, TEXTS[:1], 1.0), (6, TEXTS[2:], 2.0)):
        options = {"seed": seed, "guidance_scale": scale}
        expected = draw(model, processor, texts, **options)
        assert torch.equal(draw(model, processor, texts, compile=True, **options), expected)
    assert len(made) == 2, "one with two rows, one with one row"
    assert ["of 2 rows and 64 tokens" in said[0], "of 1 rows and 64 tokens" in said[1], len(said)] == [True, True, 2]


def test_drawings_at_the_same_time_do_not_share_a_compiled_step(eager_compiler: None, made: list[Any]) -> None:
    model, processor = tiny.unified()
    expected = [draw(model, processor, TEXTS[:1], seed=seed) for seed in (3, 4)]

    class Interrupting(BaseStreamer):
        def __init__(self) -> None:
            self.calls, self.inner = 0, torch.empty(0)

        def put(self, value: Tensor) -> None:
            self.calls += 1
            if self.calls == 8:
                self.inner = draw(model, processor, TEXTS[:1], seed=4, compile=True)

        def end(self) -> None:
            pass

    streamer = Interrupting()
    assert torch.equal(draw(model, processor, TEXTS[:1], seed=3, compile=True, streamer=streamer), expected[0])
    assert torch.equal(streamer.inner, expected[1]) and len(made) == 2


def test_a_compiled_step_is_left_when_weights_move_or_adapters_switch(eager_compiler: None, made: list[Any]) -> None:
    """A CUDA graph reads the addresses that it was captured with, and runs the operations of then."""
    model, processor = tiny.unified()
    draw(model, processor, TEXTS[:1], compile=True)
    with torch.no_grad():
        model.lm_head.weight[384:].mul_(-1)  # in place: the same addresses
    expected = draw(model, processor, TEXTS[:1])
    assert torch.equal(draw(model, processor, TEXTS[:1], compile=True), expected) and len(made) == 1
    model.model.language_model.norm.weight = nn.Parameter(-model.model.language_model.norm.weight)
    expected = draw(model, processor, TEXTS[:1])
    assert torch.equal(draw(model, processor, TEXTS[:1], compile=True), expected) and len(made) == 2
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    with adapted.disable_adapter():
        assert torch.equal(draw(model, processor, TEXTS[:1], compile=True), expected) and len(made) == 3
    expected = draw(model, processor, TEXTS[:1])
    assert torch.equal(draw(model, processor, TEXTS[:1], compile=True), expected) and len(made) == 4


def alive(reference: Any) -> Tensor:
    tensor: Tensor | None = reference()
    assert tensor is not None, "a graph reads a tensor that is gone"
    return tensor


class Recorded(TorchDispatchMode):
    """A stand-in for a CUDA graph: records operations, and replays them on the memory that they were recorded with.

    As a graph, it keeps what was made while recording, and not what it reads beside that.
    """

    made: ClassVar[list["Recorded"]] = []

    def __init__(self) -> None:
        super().__init__()
        self.made.append(self)
        self.calls: list[tuple[Any, Any, Any]] = []
        self.own: dict[int, Tensor] = {}
        self.replays = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "a graph cannot wait for a value"
        output = function(*args, **(kwargs or {}))
        given = tree_map_only(Tensor, lambda x: x if id(x) in self.own else weakref.ref(x), (args, kwargs or {}))
        self.own |= {id(each): each for each in tree_leaves(output) if isinstance(each, Tensor)}
        self.calls.append((function, given, output))
        return output

    def replay(self) -> None:
        self.replays += 1
        for function, given, output in self.calls:
            args, kwargs = tree_map_only(weakref.ref, alive, given)
            again = function(*args, **kwargs)
            for kept, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@pytest.fixture
def graphs(made: list[compiled.CompiledStep], monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """The CUDA graphs that are captured, in their order."""

    @contextmanager
    def graph(recorded: Recorded, **options: Any) -> Any:  # a real one runs nothing while it is captured
        step = made[-1]
        state = [step.hidden, step.place, *(layer.cumulative_length for layer in step.static.layers)]
        before = [each.clone() for each in state]
        with recorded:
            yield
        for each, old in zip(state, before, strict=True):
            each.copy_(old)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {"Stream": lambda: stream, "current_stream": lambda: stream}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name, other in {
        "device": lambda _: nullcontext(),
        "stream": lambda _: nullcontext(),
        "CUDAGraph": Recorded,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, other)
    monkeypatch.setattr(
        compiled.CompiledStep, "captured", property(lambda self: True, lambda self, value: None), raising=False
    )
    monkeypatch.setattr(torch, "compile", lambda step, **kwargs: step)
    monkeypatch.setattr(Recorded, "made", [])
    return Recorded.made


def test_a_captured_step_draws_the_same(graphs: list[Recorded], made: list[Any]) -> None:
    """One graph for drawings that choose alike; other prompts, scales, seeds and forced tokens are inputs of it."""
    model, processor = tiny.attached("qwen3")
    base = model.visual_vocabulary.base
    forced = torch.full((3, 16), -1)
    forced[1, 4:7], forced[0, 2] = base + 5, base + 1
    for options, count in [
        ({"guidance_scale": 2.0}, 1),
        ({"guidance_scale": 3.0, "seed": 4}, 1),
        ({"guidance_scale": 3.0, "guidance_schedule": "linear", "forced_token_ids": forced}, 1),
        ({"guidance_scale": 3.0, "temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.01}, 2),
        ({"guidance_scale": SCALES}, 3),  # a batch of which one prompt is not guided
        ({"guidance_scale": SCALES, "guidance_interval": (3, 9)}, 4),  # the same one, then one with fewer rows
        ({"guidance_scale": 3.0, "do_sample": False}, 5),  # a step of six rows again: two of other sizes came after it
        ({"guidance_scale": 2.0, "seed": 5}, 6),
    ]:
        expected = draw(model, processor, **EVERYTHING, **options)
        found = draw(model, processor, compile=True, **EVERYTHING, **options)
        assert torch.equal(found.sequences, expected.sequences), options
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), atol=1e-4, rtol=1e-4)
        assert len(graphs) == count, options
    assert [len(step.hidden) for step in made] == [6, 5, 3, 6]


def test_a_step_keeps_few_graphs(graphs: list[Recorded], made: list[Any]) -> None:
    model, processor = tiny.attached("qwen3")
    for temperature in (0.5, 0.6, 0.7, 0.8, 0.9, 0.9):
        draw(model, processor, compile=True, temperature=temperature)
    (step,) = made
    assert len(step.graphs) == 4 and [graph.replays for graph in graphs] == [15, 15, 15, 15, 30]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_fused_steps_are_exact(
    family: str, tied: bool, eager_compiler: None, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step of a GPU, on a CPU: grouped queries, biases, norms, padded prompts, weights that change in place."""
    model, processor = tiny.unified(family, tied=tied)
    for name, weight in model.named_parameters():  # initialized to 1 and 0, which would hide a forgotten one
        if "norm" in name or "bias" in name:
            nn.init.normal_(weight, mean=1.0, std=0.3)
    monkeypatch.setattr(fused, "is_fused", known.is_known)
    options = {"guidance_scale": SCALES, "guidance_interval": (0, 12), **EVERYTHING}
    for _ in range(2):
        expected = draw(model, processor, **options)
        found = draw(model, processor, compile=True, **options)
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-5)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.9)
    first, second = (step.fused for step in made)  # one with all rows, one without the unguided ones
    assert first and second and first.layers is second.layers
    model.model.language_model.layers[0].register_forward_hook(lambda *given: None)
    draw(model, processor, compile=True, **options)
    assert [step.fused for step in made[2:]] == [None, None]


@pytest.mark.parametrize("layers", [known.is_known, lambda model: False])
def test_a_step_from_inference_mode_is_not_taken_outside(
    layers: Any, eager_compiler: None, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that are made there cannot be written in place elsewhere."""
    model, processor = tiny.unified()
    monkeypatch.setattr(fused, "is_fused", layers)
    expected = draw(model, processor, guidance_scale=2.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Drawing goes on in a slower way")
        with torch.inference_mode():
            assert torch.equal(draw(model, processor, guidance_scale=2.0, compile=True), expected)
        for _ in range(2):
            assert torch.equal(draw(model, processor, guidance_scale=2.0, compile=True), expected)
    assert len(made) == 2


def test_a_fused_step_that_fails_is_compiled_without(
    eager_compiler: None, made: list[Any], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    model, processor = tiny.unified()
    expected = draw(model, processor, guidance_scale=2.0)
    monkeypatch.setattr(fused, "is_fused", known.is_known)

    def fail(*given: Any) -> Any:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(fused, "_logits", fail)
    for _ in range(2):
        assert torch.equal(draw(model, processor, guidance_scale=2.0, compile=True), expected)
    said = [str(warning.message) for warning in recwarn if "slower" in str(warning.message)]
    assert len(said) == 1 and "compiled without fused layers, RuntimeError: no kernel for this" in said[0]
    assert [step.fused is None for step in made] == [False, True]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_fused_step_is_compiled_by_inductor(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Flex attention refuses on a CPU what it would take on a GPU, such as a bias that is computed beside it."""
    torch._dynamo.reset()
    model, processor = tiny.unified()
    expected = draw(model, processor, guidance_scale=2.0)
    monkeypatch.setattr(fused, "is_fused", known.is_known)
    assert torch.equal(draw(model, processor, guidance_scale=2.0, compile=True), expected)
    assert not [warning for warning in recwarn if "slower" in str(warning.message)]
    torch._dynamo.reset()


def test_what_is_not_known_is_not_fused() -> None:
    model, _ = tiny.unified()
    assert known.is_known(model) and not fused.is_fused(model), "on a CPU"
    assert known.is_known(model.to(torch.bfloat16))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert not known.is_known(adapted.base_model.model)
    assert not known.is_known(tiny.attached("qwen2_5_vl")[0])
    other, _ = tiny.unified()
    other.model.language_model.layers[0].self_attn.register_forward_hook(lambda *given: None)
    assert not known.is_known(other)
    mixed, _ = tiny.unified()
    mixed.model.language_model.layers[1].to(torch.bfloat16)
    assert not known.is_known(mixed)


def test_a_compiler_that_fails_is_said_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny.unified()
    expected = draw(model, processor, guidance_scale=2.0, guidance_interval=(0, 5))

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda step, **kwargs: fail)
    with pytest.warns(UserWarning, match="not compiled, RuntimeError: no compiler here"):
        drawn = draw(model, processor, compile=True, guidance_scale=2.0, guidance_interval=(0, 5))
    assert torch.equal(drawn, expected)


OPTIONS: list[dict[str, Any]] = [
    {"do_sample": False, "guidance_scale": None},
    {"guidance_scale": SCALES, "temperature": 0.05, "num_return_sequences": 2},
    {"guidance_scale": 3.0, "guidance_interval": (2, 7), "top_k": 2},
    {"guidance_scale": 2.0, "guidance_schedule": "linear", "top_p": 0.5},
]
EVERYTHING = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}


@cache
def one_by_one(family: str, precise: bool) -> list[tuple[Tensor, Tensor]]:
    """Return the drawn ids and their logits for each of `OPTIONS`, token by token."""
    model, processor = tiny.attached(family)
    model = model.double() if precise else model
    outputs = [draw(model, processor, **EVERYTHING, **options) for options in OPTIONS]
    return [(output.sequences, torch.stack(output.logits)) for output in outputs]


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2_5_vl"])
@pytest.mark.parametrize("tokens", [2, 5, 64, "auto"])
def test_tokens_in_parallel_are_the_same_tokens(family: str, tokens: Any) -> None:
    """In float64, where the last bits of differently shaped products decide no choice."""
    model, processor = tiny.attached(family)
    for precise in (False, True):
        model = model.double() if precise else model
        for options, (ids, logits) in zip(OPTIONS, one_by_one(family, precise), strict=True):
            found = draw(model, processor, parallel_tokens=tokens, **EVERYTHING, **options)
            assert torch.equal(found.sequences, ids)
            torch.testing.assert_close(torch.stack(found.logits), logits, atol=1e-4, rtol=1e-4)
            assert len(found.scores) == 16


def test_right_guesses_save_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that always draws the same id: every guess is right."""
    model, processor = tiny.unified(tied=False)
    with torch.no_grad():
        model.lm_head.weight[384:] = 0
        model.model.language_model.norm.weight.zero_()  # all logits are equal, the first id wins
    forwards: list[int] = []
    original = PlainSteps.logits
    monkeypatch.setattr(
        PlainSteps, "logits", lambda self, ids, n: (forwards.append(ids.shape[1]), original(self, ids, n))[1]
    )
    drawn = draw(model, processor, do_sample=False, parallel_tokens=4)
    assert (drawn == 384).all() and forwards == [4, 4, 4, 3]


def test_what_cannot_be_parallel_is_said() -> None:
    model, processor = tiny.unified()
    for wrong in (0, -1, 1.5, "fast"):
        with pytest.raises(UserError, match="parallel_tokens is"):
            draw(model, processor, parallel_tokens=wrong)
    with pytest.raises(UserError, match="compile=True draws one token at a time"):
        draw(model, processor, parallel_tokens=2, compile=True)


@pytest.mark.slow
def test_a_step_is_compiled_once_for_all_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny.unified()
    graphs: list[int] = []
    original = torch.compile

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(len(examples))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda step, **kwargs: original(step, backend=backend, dynamic=False))
    for seed in range(3):
        draw(model, processor, [TEXTS[seed]], compile=True, seed=seed, guidance_scale=2.0)
        if not seed:
            first = len(graphs)
    assert 0 < first == len(graphs)
