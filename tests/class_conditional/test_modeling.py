"""The class-conditional GPT against its specification: counts, first loss, rotation, guidance, cache, noise."""

import cmath
import math

import pytest
import torch

from tests.class_conditional.tiny import FIELDS, tiny_gpt
from unimm.class_conditional import SIZES, ClassConditionalConfig, ClassConditionalGPT
from unimm.class_conditional.modeling import grid_rotation, rotate
from unimm.errors import UserError
from unimm.sampling import ImageSampling

PUBLISHED_MILLIONS = {"B": 111, "L": 343, "XL": 775, "XXL": 1411, "2B": 2188, "3B": 3097}
"""LlamaGen's own names of its checkpoints: 111M, 343M, 775M, 1.4B, 3.1B. VFMTok's 2B, by hand: 48 layers of width d =
1920 and 4 d^2 + 3 d 5120 weights, two tables of 16384 and one of 1001 rows."""

GREEDY = {"do_sample": False}


def some_ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(64, (rows, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_published_ones(size):
    with torch.device("meta"):
        model = ClassConditionalGPT(ClassConditionalConfig.of_size(size))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == PUBLISHED_MILLIONS[size]


@pytest.mark.parametrize("training", [True, False])
def test_the_first_loss_is_ln_k(training):
    torch.manual_seed(0)
    model = ClassConditionalGPT(ClassConditionalConfig(**FIELDS)).train(training)
    loss = model(torch.tensor([0, 1, 4]), some_ids()).loss
    assert loss.item() == pytest.approx(math.log(64), abs=1e-6)
    assert model.head.weight.abs().max() == 0
    assert model.id_embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_rotation_against_a_plain_loop():
    rows, columns, width, theta = 3, 5, 12, 100.0
    x = torch.randn(1, 2, 1 + rows * columns, width)
    turned = rotate(x, grid_rotation((rows, columns), width, theta))
    for head in range(2):
        for position in range(1, 1 + rows * columns):
            place = divmod(position - 1, columns)
            for pair in range(width // 2):
                half, number = divmod(pair, width // 4)  # the first half of the pairs turns with the row
                angle = place[half] * theta ** (-2 * number / (width // 2))
                real, imaginary = x[0, head, position, 2 * pair : 2 * pair + 2].tolist()
                wanted = complex(real, imaginary) * cmath.exp(1j * angle)
                found = turned[0, head, position, 2 * pair : 2 * pair + 2].tolist()
                assert found == pytest.approx([wanted.real, wanted.imag], abs=1e-5)


def test_query_and_key_vanish_at_the_class():
    table = grid_rotation((4, 4), 16, 10000.0)
    assert torch.equal(table[0], torch.zeros(8, 2))
    assert torch.equal(table[1], torch.tensor([1.0, 0.0]).expand(8, 2))
    assert rotate(torch.randn(1, 1, 17, 16), table)[0, 0, 0].abs().max() == 0
    assert torch.equal(tiny_gpt().rotation.table, table)


def test_an_id_sees_only_what_stands_before_it():
    model, ids, labels = tiny_gpt(), some_ids(), torch.tensor([0, 1, 2])
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    before, after = model(labels, ids).logits, model(labels, changed).logits
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().amax(dim=(1, 2)).min() > 1e-3
    other_class = model(torch.tensor([3, 3, 3]), ids).logits
    assert (before - other_class).abs().amax(dim=2).min() > 1e-3


def test_interval_and_schedule_of_the_settings_count():
    model, labels = tiny_gpt(), [0, 1, 2]
    scales = {"guidance_scale": [3.0, 1.0, 2.0], **GREEDY}
    by_argument = model.generate(labels, ImageSampling(**scales), guidance_interval=(2, 7))
    by_settings = model.generate(labels, ImageSampling(**scales, guidance_interval=(2, 7)))
    assert torch.equal(by_settings, by_argument)
    linear = model.generate(labels, ImageSampling(**scales, guidance_schedule="linear"))
    plain = model.generate(labels, ImageSampling(**scales))
    assert torch.equal(linear[1], plain[1]) and not torch.equal(linear, plain)


@pytest.mark.parametrize("interval", [None, (2, 7), (0, 0)])
def test_guided_greedy_with_a_cache_is_teacher_forcing_without_one(interval):
    model, labels = tiny_gpt(), torch.tensor([0, 3, 4])
    drawn = model.generate(labels, ImageSampling(guidance_scale=[3.0, 1.0, 2.0], **GREEDY), guidance_interval=interval)
    given = model(labels, drawn).logits
    unconditional = model(torch.full((3,), 5), drawn).logits
    start, stop = interval or (0, 16)
    scale = torch.ones(3, 16, 1)
    scale[:, start:stop] = torch.tensor([3.0, 1.0, 2.0])[:, None, None]
    assert torch.equal(drawn, (unconditional + scale * (given - unconditional)).argmax(-1))
    if interval is None:
        assert not torch.equal(drawn[0], model.generate(labels, ImageSampling(**GREEDY))[0])


def test_attention_implementations_agree():
    model, ids, labels = tiny_gpt(), some_ids(), torch.tensor([0, 1, 5])
    expected = model(labels, ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(labels, ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_tenth_of_the_classes_is_dropped_in_training_and_none_outside_it():
    model = tiny_gpt(token_dropout=0.0, residual_dropout=0.0, feed_forward_dropout=0.0)
    dropped = model.drop_classes(torch.zeros(20_000, dtype=torch.int64))
    assert set(dropped.tolist()) == {0, 5}
    assert (dropped == 5).double().mean() == pytest.approx(0.1, abs=0.0085)  # 4 standard deviations
    ids, labels = some_ids(1).expand(64, -1), torch.zeros(64, dtype=torch.int64)
    assert len(model(labels, ids).logits[:, 0, 0].round(decimals=2).unique()) == 1
    assert len(model.train()(labels, ids).logits[:, 0, 0].detach().round(decimals=2).unique()) == 2


def test_image_k_depends_on_seed_and_k_only():
    model, sampling = tiny_gpt(), ImageSampling(guidance_scale=2.0, top_k=40, top_p=0.95)
    labels = [0, 1, 2, 3]
    together = model.generate(labels, sampling, seed=7)
    assert torch.equal(model.generate([2, 3], sampling, seed=7, first_image=2), together[2:])
    assert torch.equal(model.generate([2], sampling, seed=7, first_image=2), together[2:3])
    assert not torch.equal(model.generate(labels, sampling, seed=8), together)
    same_class = model.generate([1, 1], sampling, seed=7)
    assert not torch.equal(same_class[0], same_class[1])


def test_a_saved_model_gives_the_same_logits(tmp_path):
    model, ids, labels = tiny_gpt(), some_ids(), torch.tensor([0, 1, 5])
    model.save_pretrained(tmp_path)
    again = ClassConditionalGPT.from_pretrained(tmp_path)
    assert torch.equal(again(labels, ids).logits, model(labels, ids).logits)
    half = ClassConditionalGPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (half.head.weight.dtype, half.rotation.table.dtype) == (torch.bfloat16, torch.float32)


def test_bad_input_is_one_sentence_with_both_numbers():
    model, ids = tiny_gpt(), some_ids()
    with pytest.raises(UserError, match=r"4 x 4 = 16 ids.*\[3, 15\]"):
        model(torch.tensor([0, 1, 2]), ids[:, :15])
    with pytest.raises(UserError, match=r"class labels \[2\]"):
        model(torch.tensor([0, 1]), ids)
    with pytest.raises(UserError, match="Class labels run from 0 to 5; these run from 0 to 6"):
        model(torch.tensor([0, 6, 1]), ids)
    with pytest.raises(UserError, match="Image ids run from 0 to 63; these run from 64 to 64"):
        model(torch.tensor([0, 1, 2]), torch.full_like(ids, 64))
    with pytest.raises(UserError, match="Class labels run from 0 to 4; these run from 0 to 5"):
        model.generate([0, 5])
    with pytest.raises(UserError, match="from 9 to 3"):
        model.generate([0], guidance_interval=(9, 3))
    with pytest.raises(UserError, match="no size 'XS'.*XXL"):
        ClassConditionalConfig.of_size("XS")
    with pytest.raises(UserError, match="no field 'hiden_size'"):
        ClassConditionalConfig.of_size("B", hiden_size=3)
    with pytest.raises(UserError, match="30 is no multiple of 4 x 2"):
        ClassConditionalConfig(**FIELDS | {"hidden_size": 30})
