"""How numbers become codes and scales of few bits, and are read back: what the quantized store is made of.

A group is numbers that share a scale, along the last axis here. A scale is one byte on a logarithmic grid, as in
modeling/kv_quantization.py, and so is a zero point, where there is one.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from modeling.kv_quantization import hadamard, pack, packing_unit, scale_bytes, scale_of, unpack

FAR = 120  # steps from zero at which a group may lie: its zero point is a byte
LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max


class Coded(NamedTuple):
    """Codes (..., n), uint8, the scales (..., 1), uint8, and zero points (..., 1), int8, or None."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


class Symmetric:
    """Evenly spaced levels on both sides of zero, up to the largest of a group."""

    def __init__(self, bits: int):
        self.bits, self.half = bits, 2 ** (bits - 1)

    def encode(self, groups: torch.Tensor) -> Coded:
        scales = scale_bytes(groups.abs().amax(-1, keepdim=True) / (self.half - 0.5), up=True)
        codes = (groups / scale_of(scales)).floor().clamp(-self.half, self.half - 1) + self.half
        return Coded(codes.to(torch.uint8), scales.to(torch.uint8), None)

    def decode(self, coded: Coded) -> torch.Tensor:
        return (coded.codes.float() + (0.5 - self.half)) * scale_of(coded.scales)


class Affine:
    """Evenly spaced levels from the smallest to the largest of a group; the zero point counts in levels."""

    def __init__(self, bits: int):
        self.bits, self.top = bits, 2**bits - 1

    def encode(self, groups: torch.Tensor) -> Coded:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        distance = torch.maximum((high - low) / self.top, torch.maximum(low.abs(), high.abs()) / FAR)
        scales = scale_bytes(distance)
        zeros = (-low / scale_of(scales)).round()
        codes = ((groups / scale_of(scales)).round() + zeros).clamp(0, self.top)
        return Coded(codes.to(torch.uint8), scales.to(torch.uint8), zeros.to(torch.int8))

    def decode(self, coded: Coded) -> torch.Tensor:
        return (coded.codes.float() - coded.zeros.float()) * scale_of(coded.scales)


class Float8:
    """Eight-bit floating point numbers, e4m3, scaled so that a group reaches the largest."""

    bits = 8

    def encode(self, groups: torch.Tensor) -> Coded:
        scales = scale_bytes(groups.abs().amax(-1, keepdim=True) / LARGEST_FLOAT8, up=True)
        codes = (groups / scale_of(scales)).to(torch.float8_e4m3fn).view(torch.uint8)
        return Coded(codes, scales.to(torch.uint8), None)

    def decode(self, coded: Coded) -> torch.Tensor:
        return coded.codes.view(torch.float8_e4m3fn).float() * scale_of(coded.scales)


class ByToken:
    """Codes states with a scale for each `group` channels of a token."""

    tokens = 1  # at a time

    def __init__(self, numbers: Symmetric | Affine | Float8, head_dim: int, group: int, turned: int):
        self.numbers, self.head_dim, self.group, self.turned = numbers, head_dim, group, turned

    def encode(self, states: torch.Tensor) -> Coded:
        """Bytes of the codes, (..., tokens, bytes), scales and zero points, (..., tokens, groups)."""
        groups = hadamard(states.float(), self.turned).unflatten(-1, (-1, self.group))
        coded = self.numbers.encode(groups)
        zeros = None if coded.zeros is None else coded.zeros[..., 0]
        return Coded(to_bytes(coded.codes.flatten(-2), self.numbers.bits), coded.scales[..., 0], zeros)

    def decode(self, coded: Coded) -> torch.Tensor:
        """The float32 states, (..., tokens, head_dim)."""
        codes = from_bytes(coded.codes, self.numbers.bits, self.head_dim).unflatten(-1, (-1, self.group))
        zeros = None if coded.zeros is None else coded.zeros[..., None]
        groups = self.numbers.decode(Coded(codes, coded.scales[..., None], zeros))
        return hadamard(groups.flatten(-2), self.turned)


class ByChannel:
    """Codes states with a scale for each channel of `tokens` tokens (KIVI, arXiv 2402.02750)."""

    def __init__(self, numbers: Symmetric | Affine, head_dim: int, tokens: int, turned: int):
        self.numbers, self.head_dim, self.tokens, self.turned = numbers, head_dim, tokens, turned

    def encode(self, states: torch.Tensor) -> Coded:
        """Bytes of the codes, (..., tokens, bytes), scales and zero points, (..., groups of tokens, head_dim)."""
        groups = hadamard(states.float(), self.turned).unflatten(-2, (-1, self.tokens)).transpose(-1, -2)
        coded = self.numbers.encode(groups)
        zeros = None if coded.zeros is None else coded.zeros[..., 0]
        codes = coded.codes.transpose(-1, -2).flatten(-3, -2)
        return Coded(to_bytes(codes, self.numbers.bits), coded.scales[..., 0], zeros)

    def decode(self, coded: Coded) -> torch.Tensor:
        """The float32 states, (..., tokens, head_dim)."""
        codes = from_bytes(coded.codes, self.numbers.bits, self.head_dim).unflatten(-2, (-1, self.tokens))
        zeros = None if coded.zeros is None else coded.zeros[..., None, :]
        groups = self.numbers.decode(Coded(codes, coded.scales[..., None, :], zeros))
        return hadamard(groups.flatten(-3, -2), self.turned)


def to_bytes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of a token, (..., head_dim), in the bytes that hold them; the last byte may have room left."""
    return pack(pad(codes, (0, -codes.shape[-1] % packing_unit(bits))), bits)


def from_bytes(packed: torch.Tensor, bits: int, head_dim: int) -> torch.Tensor:
    """The codes, (..., head_dim), that `to_bytes` put there."""
    return unpack(packed, bits)[..., :head_dim]
