"""Seeds and noise of sampled image ids.

A sample is `argmax(scores + Gumbel noise)` (the Gumbel-max trick), and the noise of image k is a function of (seed, k)
alone, so an image does not depend on the rest of the batch.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from unimm.errors import UserError


class Noise:
    """Counter-based Gumbel noise: a pure function of (seed, position, code). `argmax(scores + noise)` is a sample from
    softmax(scores).

    The random bits come from Philox4x64-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405), identical on
    every device; the key is the image's seed, the counter runs over positions and codes. S images, K codes.

    Args:
        seeds: of the S images.
        size: K.
        length: number of positions, beyond which `next` computes nothing ahead; None if it is unknown.
    """

    def __init__(
        self, seeds: Sequence[int], size: int, device: torch.device | str = "cpu", length: int | None = None
    ) -> None:
        self.seeds, self.size, self.device, self.length = list(seeds), size, torch.device(device), length
        self.blocks = -(-size // _PER_BLOCK)  # generator blocks per position
        numbers = _CHUNK if self.device.type == "cpu" else 4 * _CHUNK  # few launches on a GPU, in half a gigabyte
        self.chunk = max(1, numbers // (len(self.seeds) * self.blocks * _PER_BLOCK))
        self._start, self._kept = 0, torch.empty(len(self.seeds), 0, size)
        on_cpu = self.device.type == "cpu"
        self._bits = (
            partial(_philox_numpy, self.seeds) if on_cpu else partial(_philox_torch, philox_keys(self.seeds).to(device))
        )

    def at(self, start: int, stop: int) -> Tensor:
        """Return the noise of positions start..stop-1, [S, stop - start, K] in float32."""
        first, count = start * self.blocks, (stop - start) * self.blocks
        uniform = self._bits(first, count)
        # u = (bits + 1/2) / 2^32; -log1p(-u) resolves the small exponentials, which become the largest noise
        uniform.mul_(-(2.0**-32)).sub_(2.0**-33).clamp_min_(2.0**-24 - 1).log1p_().neg_().log_().neg_()
        return uniform.view(len(self.seeds), stop - start, -1)[..., : self.size]

    def next(self, start: int, stop: int) -> Tensor:
        """Return the same as `at`, computed ahead in chunks, for callers that advance position by position."""
        if not self._start <= start <= stop <= self._start + self._kept.shape[1]:
            end = start + self.chunk if self.length is None else min(start + self.chunk, self.length)
            self._start, self._kept = start, self.at(start, max(stop, end))
        return self._kept[:, start - self._start : stop - self._start]

    def step(self, position: int) -> Tensor:
        """Return the noise of one position, [S, K], see `next`."""
        return self.next(position, position + 1)[:, 0]


_PER_BLOCK = 8  # 32-bit numbers per counter
_CHUNK = 1 << 21  # numbers computed at once: 8 MB, small enough for the CPU cache
_LOW = 0xFFFFFFFF
_FACTORS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def _philox_numpy(seeds: Sequence[int], first: int, count: int) -> Tensor:
    """Return the numbers of `count` counters starting at `first` for each seed, [S, 8 * count] in float32."""
    found = np.empty((len(seeds), 8 * count), dtype=np.float32)
    for row, seed in zip(found, seeds, strict=True):
        # numpy increments the counter before the first block, hence first - 1
        generator = np.random.Philox(key=seed, counter=(first - 1) % 2**256)
        row[:] = generator.random_raw(4 * count).view(np.uint32)
    return torch.from_numpy(found)


def _philox_torch(keys: Tensor, first: int, count: int) -> Tensor:
    """Return the same as `_philox_numpy` on the device of `keys` [2, S], see `philox_keys`: few operations for all."""
    counters = keys.new_zeros(4, 1, count)
    counters[0] = torch.arange(first, first + count, device=keys.device)
    words = philox4x64(counters, keys[..., None]).movedim(0, -1).flatten(1)  # [S, 4 * count]
    return torch.stack([words & _LOW, (words >> 32) & _LOW], dim=-1).flatten(1).to(torch.float32)


def philox_keys(seeds: Sequence[int]) -> Tensor:
    """Return the keys of seeds as 64-bit words in int64, [2, S]."""
    return torch.tensor([[_signed(seed >> shift & 2**64 - 1) for seed in seeds] for shift in (0, 64)])


def philox4x64(counters: Tensor, keys: Tensor, rounds: int = 10) -> Tensor:
    """Compute Philox4x64 of counters [4, ...] and keys [2, ...], both as 64-bit words in int64; return [4, ...]."""
    a, b, c, d = counters
    for number in range(rounds):
        low, high = (keys[n] + _signed(number * _WEYL[n] % 2**64) for n in range(2))  # int64 overflow wraps
        (hi_a, lo_a), (hi_c, lo_c) = _product(a, _FACTORS[0]), _product(c, _FACTORS[1])
        a, b, c, d = hi_c ^ b ^ low, lo_c, hi_a ^ d ^ high, lo_a
    return torch.stack(torch.broadcast_tensors(a, b, c, d))


def _product(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 64 bits of unsigned words times `factor`; int64 overflow keeps the low bits."""
    low, high = words & _LOW, (words >> 32) & _LOW
    f_low, f_high = factor & _LOW, factor >> 32
    middle = high * f_low + ((low * f_low >> 32) & _LOW)
    cross = (middle & _LOW) + low * f_high
    return high * f_high + ((middle >> 32) & _LOW) + ((cross >> 32) & _LOW), words * _signed(factor)


def _signed(word: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit word."""
    return word - 2**64 if word >= 2**63 else word


def image_seed(seed: int, k: int) -> int:
    """Return the seed of image k of a request with `seed`."""
    digest = hashlib.sha256(f"{seed}/{k}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def per_image_seeds(requests: Sequence[Hashable], seed: int | Sequence[int] | None, repeats: int) -> list[int]:
    """Return one seed per sequence, from (seed, k): k counts the images of a request over the whole batch."""
    if seed is None:
        seed = int(torch.randint(2**62, (1,)))
    seeds = [seed] * len(requests) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(requests):
        raise UserError(f"seed has {len(seeds)} values, give 1 or one per prompt, {len(requests)}")
    drawn: Counter[Hashable] = Counter()
    result = []
    for request in zip(seeds, requests, strict=True):
        for _ in range(repeats):
            result.append(image_seed(request[0], drawn[request]))
            drawn[request] += 1
    return result


def request_keys(prompts: Tensor, pixel_values: Tensor | None, counts: list[int]) -> list[Hashable]:
    """Return one key per prompt [B, L]; prompts with equal text and equal images share it."""
    digests = [b""] * len(prompts)
    if pixel_values is not None:
        images = pixel_values.detach().float().cpu().split(counts)
        digests = [hashlib.sha256(each.numpy().tobytes()).digest() for each in images]
    return list(zip(map(tuple, prompts.tolist()), digests, strict=True))
