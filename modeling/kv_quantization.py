"""Keys and values that a model learns to live with in 2 to 4 bits.

In training they are quantized as a cache will hold them, and the gradient goes straight through (arXiv 1308.3432). What
all tokens have in common, a bias a channel, is kept apart and in full. Of the rest the channels of a token's head are
cut into groups; a group is turned by a Hadamard matrix (QuaRot, arXiv 2404.00456), so that no channel stands out, and
held as one code a channel and a scale of one byte. Keys are quantized before their positions turn them, as a bias
would be turned too. Nothing is quantized twice, and what the cache gives back is, to the bit, what attention sees
without one.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .segment_memory import HoldsRows, UnrotatedCache, UnrotatedLayer, kept_of

# The bits of a code, and the distance between the evenly spaced levels that loses least of a normal distribution, in
# its standard deviations (Max, "Quantizing for minimum distortion", 1960).
KV_QUANTIZATION = {"int2": (2, 0.9957), "int3": (3, 0.5860), "int4": (4, 0.3352)}
# The logarithmic grid of scales: so many steps a factor of two, and the byte of a scale of one.
SCALES_AN_OCTAVE, SCALE_OF_ONE = 8, 128


# ---- codes in bytes


def packing_unit(bits: int) -> int:
    """The fewest codes of so many bits that fill whole bytes."""
    return 8 // math.gcd(8, bits)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes below 2**bits, uint8 (..., n), in the bytes that hold them: (..., n * bits / 8), a whole number.

    bits: 1, 2, 3, 4 or 8.
    """
    unit = packing_unit(bits)
    word = torch.uint8 if unit * bits == 8 else torch.int32
    shifts = torch.arange(0, unit * bits, bits, dtype=word, device=codes.device)
    words = (codes.unflatten(-1, (-1, unit)).to(word) << shifts).sum(-1, dtype=word)
    if word == torch.uint8:
        return words
    places = torch.arange(0, unit * bits, 8, dtype=word, device=codes.device)
    return ((words[..., None] >> places) & 255).to(torch.uint8).flatten(-2)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes, uint8 (..., n), that `pack` put into those bytes."""
    unit, words = packing_unit(bits), packed
    if unit * bits > 8:
        places = torch.arange(0, unit * bits, 8, dtype=torch.int32, device=packed.device)
        words = (packed.unflatten(-1, (-1, len(places))).int() << places).sum(-1, dtype=torch.int32)
    shifts = torch.arange(0, unit * bits, bits, dtype=words.dtype, device=packed.device)
    return ((words[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)


def hadamard(states: torch.Tensor, size: int) -> torch.Tensor:
    """States turned within each `size` channels, a power of two; turning twice gives them back.

    By sums of pairs: a matmul would round otherwise for other numbers of tokens.
    """
    turned = states.unflatten(-1, (-1, *[2] * (size.bit_length() - 1)))
    for axis in range(-(size.bit_length() - 1), 0):
        first, second = turned.unbind(axis)
        turned = torch.stack((first + second, first - second), dim=axis)
    return turned.reshape(states.shape) * size**-0.5


def grid(device: torch.device) -> torch.Tensor:
    """The scale that each byte stands for, (256,), on a logarithmic grid."""
    return torch.exp2((torch.arange(256, dtype=torch.float32, device=device) - SCALE_OF_ONE) / SCALES_AN_OCTAVE)


def scale_bytes(distance: torch.Tensor, up: bool = False) -> torch.Tensor:
    """The bytes, as int64, of the nearest scales of the grid, or of the next ones above.

    By comparing, as a logarithm rounds otherwise in tensors of another length.
    """
    scales = grid(distance.device)
    edges = scales if up else scales[:-1] * 2 ** (0.5 / SCALES_AN_OCTAVE)
    return torch.bucketize(distance, edges).clamp(max=255)


def scale_of(scales: torch.Tensor) -> torch.Tensor:
    """The float32 scales that bytes stand for."""
    return grid(scales.device)[scales.long()]


# ---- the quantizer


class StraightThrough(torch.autograd.Function):
    """Gives `quantized`, and its gradient to the states; that of the bias leads it to their mean.

    No loss tells the bias where to be, as what it takes from the states it gives back. off: the bias less the mean of
    the states. It is as large as the states' gradients, so that it neither vanishes beside them nor outweighs them.
    """

    @staticmethod
    def forward(ctx, states, bias, quantized, off):
        ctx.save_for_backward(off)
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx, gradient):
        (off,) = ctx.saved_tensors
        return gradient, off * gradient.abs().mean(), None, None


class KVQuantizer(nn.Module):
    """Quantizes states, (batch, kv_heads, tokens, head_dim), in groups of a token's channels."""

    begins_later = False  # for as long as training goes on without it; the bias is led to its place already

    def __init__(self, kind: str, group_size: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.bits, self.step = KV_QUANTIZATION[kind]
        self.group_size, self.kv_heads = group_size, kv_heads
        self.bias = nn.Parameter(torch.zeros(kv_heads * head_dim))

    def init_weights(self) -> None:
        init.zeros_(self.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """What a cache will give back of these states, with their gradient."""
        with torch.no_grad():
            is_off = self.training and self.begins_later
            quantized = states if is_off else self._states(*self._codes(states), states.dtype)
            off = self.bias - states.float().mean(dim=(0, 2)).flatten()
        return StraightThrough.apply(states, self.bias, quantized, off)

    @torch.no_grad()
    def encode(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a cache holds: (..., head_dim * bits / 8) bytes of codes, and (..., head_dim / group_size) of scales."""
        codes, scales = self._codes(states)
        return pack(codes.to(torch.uint8).flatten(-2), self.bits), scales.to(torch.uint8)

    @torch.no_grad()
    def decode(self, packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The states that those bytes stand for."""
        codes = unpack(packed, self.bits).unflatten(-1, (-1, self.group_size))
        return self._states(codes.float(), scales, dtype)

    def _codes(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (..., groups, group_size), whole numbers in float32, and bytes of scales (..., groups), as int64."""
        turned = hadamard(states.float() - self._common(), self.group_size)
        groups = turned.unflatten(-1, (-1, self.group_size))
        scales = scale_bytes(groups.square().mean(-1).sqrt() * self.step)
        half = 2 ** (self.bits - 1)
        return (groups / scale_of(scales)[..., None]).floor().clamp(-half, half - 1) + half, scales

    def _states(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        levels = codes + (0.5 - 2 ** (self.bits - 1))
        turned = (levels * scale_of(scales)[..., None]).flatten(-2)
        return (hadamard(turned, self.group_size) + self._common()).to(dtype)

    def _common(self) -> torch.Tensor:
        """The bias, (kv_heads, 1, head_dim)."""
        return self.bias.float().view(self.kv_heads, 1, -1)


def build_quantizer(config, has_own: bool = True) -> nn.Module:
    """What a layer's keys, or its values, go through before attention sees them; has_own: or whether it has none."""
    if config.kv_quantization is None or not has_own:
        return nn.Identity()
    heads, head_dim = config.num_key_value_heads, config.head_dim
    return KVQuantizer(config.kv_quantization, config.kv_quantization_group, heads, head_dim)


def check_kv_quantization(config) -> None:
    """Raise ValueError for groups that do not divide a head, and heads that do not fill bytes."""
    kind, group, head_dim = config.kv_quantization, config.kv_quantization_group, config.head_dim
    if kind is None:
        if group is not None:
            raise ValueError(f"kv_quantization_group={group} is set but kv_quantization is not: set it, or drop both")
        return
    if kind not in KV_QUANTIZATION:
        raise ValueError(f"kv_quantization={kind!r}: choose one of {', '.join(KV_QUANTIZATION)}, or null for none")
    if set(config.layer_types) == {"linear_attention"}:
        raise ValueError(f"kv_quantization={kind!r}: no layer of layer_types has keys and values; leave it out")
    unit = packing_unit(KV_QUANTIZATION[kind][0])
    if head_dim % unit:
        raise ValueError(f"head_dim={head_dim}: {kind} fills bytes with {unit} codes at a time; choose a multiple")
    choices = [2**n for n in range(1, head_dim.bit_length()) if head_dim % 2**n == 0]
    if group not in choices:
        raise ValueError(
            f"kv_quantization_group={group} is no power of two that divides head_dim={head_dim}: "
            f"choose one of {', '.join(map(str, choices))}"
        )


# ---- the cache


class CodedCache(UnrotatedCache):
    """A cache that quantizes what it is given, once, and holds codes."""

    holds_codes = True  # attention looks for it, and leaves the quantizing to the cache

    def state_bits(self) -> int:
        """The size of all that is held, of all sequences and layers together."""
        return sum(layer.state_bits() for layer in self.layers if hasattr(layer, "state_bits"))


class CodedLayer(HoldsRows, UnrotatedLayer):
    """The codes and scales of the keys and values of all tokens, or of a sliding window's."""

    def __init__(self, sliding_window: int | None = None):
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding, self.is_croppable = sliding_window is not None, True
        self.record_past = False
        self.held: tuple[torch.Tensor, ...] = ()

    @property
    def length(self) -> int:
        return self.held[0].shape[-2] if self.held else 0

    def lazy_initialization(self, key_states, value_states) -> None:
        self.device, self.is_initialized = key_states.device, True

    def extend(self, key_states, value_states, quantizers):
        """As UnrotatedLayer's; quantizers: of keys and of values, the attention layer's."""
        for_keys, for_values = quantizers
        new = (*for_keys.encode(key_states), *for_values.encode(value_states))
        if self.held:
            new = tuple(torch.cat(parts, dim=-2) for parts in zip(self.held, new, strict=True))
        self.held = new
        return for_keys.decode(*new[:2], key_states.dtype), for_values.decode(*new[2:], value_states.dtype)

    def keep(self, turned, query_states, scaling):
        """Of a sliding window what the next tokens can see; copied, as a slice would keep the memory of the whole."""
        if self.is_sliding and not self.record_past:
            self.change_rows(lambda part: part[:, :, 1 - self.sliding_window :].clone())

    def state(self) -> dict[str, torch.Tensor]:
        """All that a sequence holds."""
        names = ("key_codes", "key_scales", "value_codes", "value_scales")
        return dict(zip(names, self.held, strict=bool(self.held)))

    def change_rows(self, change) -> None:
        self.held = tuple(change(part) for part in self.held)

    def get_max_length(self) -> int:
        return self.sliding_window or -1

    def reset(self) -> None:
        self.seen, self.held = 0, ()

    def activate_past_recording(self) -> None:
        """Let a window go beyond its size until the next `crop`, so that drafts can be taken back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; ValueError where a window has let go of what would be in it again."""
        kept = kept_of(self.seen, tokens_to_remove)
        length = self.length - (self.seen - kept)
        if self.is_sliding and length < min(kept, self.sliding_window - 1):
            raise ValueError("the window has let go of earlier tokens: call activate_past_recording() before")
        begin = max(0, length + 1 - self.sliding_window) if self.is_sliding else 0
        if (begin, length) != (0, self.length):
            self.change_rows(lambda part: part[:, :, begin:length].clone())
        self.seen = kept

    def offload(self) -> None:
        self.change_rows(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self.change_rows(lambda part: part.to(self.device, non_blocking=True))


def build_cache(config) -> Cache:
    """An empty cache of the kind that the configuration's layers fill, as generate() and the model take it."""
    plain = DynamicCache(config=config)
    return plain if config.kv_quantization is None else CodedCache(layers=[_coded(layer) for layer in plain.layers])


def _coded(layer):
    """The layer that holds codes in place of keys and values; what holds none of those stays."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return CodedLayer(layer.sliding_window)
    return CodedLayer() if type(layer) is DynamicLayer else layer


__all__ = [
    "CodedCache",
    "CodedLayer",
    "KVQuantizer",
    "build_cache",
    "build_quantizer",
    "check_kv_quantization",
    "hadamard",
    "pack",
    "unpack",
]
