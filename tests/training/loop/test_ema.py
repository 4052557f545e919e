"""The running mean of weights: its formula by hand, and what it must not touch."""

import pytest
import torch
from torch import nn

from unimm.training.loop.ema import EMA


def make_model(seed: int = 0) -> nn.Sequential:
    """A trainable layer between a frozen layer and a batch norm with buffers."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].requires_grad_(False)
    model.register_buffer("codebook", torch.randn(5, 4))
    return model


def test_warm_up_and_lerp_by_hand() -> None:
    model = make_model()
    ema = EMA(model, decay=0.25)
    expected = model[1].weight.detach().double().clone()
    for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.25, 0.25)):
        assert ema.current_decay == pytest.approx(decay)
        with torch.no_grad():
            model[1].weight.add_(torch.randn(4, 4))
        ema.update(model)
        expected = decay * expected + (1 - decay) * model[1].weight.detach().double()
        assert ema.num_updates == step + 1
    assert torch.allclose(ema.shadow["1.weight"].double(), expected, atol=1e-6)


def test_only_trainable_tensors_are_averaged_and_the_rest_keep_every_bit() -> None:
    model = make_model()
    frozen = {name: model.state_dict()[name].clone() for name in ("0.weight", "0.bias", "codebook")}
    still = model[1].bias.detach().clone()
    ema = EMA(model, decay=0.999)
    assert set(ema.shadow) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    for _ in range(1000):
        ema.update(model)
    with ema.swapped(model):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())
    ema.copy_to(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())
    assert torch.equal(ema.shadow["1.bias"], still)  # a trainable tensor that does not move is not rounded either


def test_swapped_restores_the_weights_after_an_exception() -> None:
    model = make_model()
    ema = EMA(model)
    averaged = ema.shadow["1.weight"].clone()
    with torch.no_grad():
        model[1].weight.add_(1.0)
    own = model[1].weight.detach().clone()
    identity = model[1].weight
    with pytest.raises(RuntimeError, match="inside"), ema.swapped(model):
        assert torch.equal(model[1].weight, averaged)
        raise RuntimeError("inside")
    assert torch.equal(model[1].weight, own) and model[1].weight is identity
    assert model[1].weight.requires_grad


def test_half_precision_weights_are_averaged_in_fp32() -> None:
    model = make_model().to(torch.bfloat16)
    ema = EMA(model, decay=0.999)
    ema.num_updates = 100_000
    with torch.no_grad():
        model[1].weight.fill_(1.0)
        ema.shadow["1.weight"].zero_()
    for _ in range(1000):
        ema.update(model)
    assert ema.shadow["1.weight"].dtype == torch.float32
    assert torch.allclose(ema.shadow["1.weight"], torch.tensor(1 - 0.999**1000), atol=1e-4)
    ema.copy_to(model)
    assert model[1].weight.dtype == torch.bfloat16


def test_resume_equals_going_on() -> None:
    straight = make_model()
    ema = EMA(straight)
    restored_model, restored = make_model(), EMA(make_model(seed=1), decay=0.5)
    for step in range(6):
        if step == 3:
            restored.load_state_dict(ema.state_dict())
        with torch.no_grad():
            straight[1].weight.mul_(1.1)
            restored_model[1].weight.mul_(1.1)
        ema.update(straight)
        if step >= 3:
            restored.update(restored_model)
    assert restored.num_updates == 6 and restored.decay == ema.decay
    assert all(torch.equal(restored.shadow[name], tensor) for name, tensor in ema.shadow.items())


def test_another_model_or_decay_is_refused() -> None:
    model = make_model()
    ema = EMA(model)
    with pytest.raises(ValueError, match=r"\[0, 1\) and is 1.0"):
        EMA(model, decay=1.0)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="6 trainable tensors and this EMA averages 4"):
        ema.update(model)
    wider = EMA(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)))
    narrow = EMA(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match=r"\(5, 3\).*\(4, 3\)"):
        narrow.load_state_dict(wider.state_dict())
