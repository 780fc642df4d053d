"""PTX types as numpy arrays of bits, and conversions between the bits of bfloat16, float16 and float32."""

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
WIDTH = {"pred": 1, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "f16x2": 32, "bf16x2": 32, "tf32": 32, "b128": 128}
WIDTH |= {f"{kind}{width}": width for width in (8, 16, 32, 64) for kind in "bus"}
"""Bits of each type."""


class EmulationError(Exception):
    """A kernel did what a GPU does not allow or does not define, or what the emulator does not know."""


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(is_nan, np.uint16(0x7FFF), rounded)


def float16_to_float32(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def float32_to_float16(values: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(values, np.float32).astype(np.float16).view(np.uint16)


def to_float32(kind: str, bits: np.ndarray) -> np.ndarray:
    """Values of "bf16" or "f16" from their bits."""
    return bfloat16_to_float32(bits) if kind == "bf16" else float16_to_float32(bits)


def from_float32(kind: str, values: np.ndarray) -> np.ndarray:
    return float32_to_bfloat16(values) if kind == "bf16" else float32_to_float16(values)


def halves(kind: str, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two 16-bit values in each 32-bit register, the lower one first."""
    pairs = np.asarray(pairs)
    return to_float32(kind, (pairs & 0xFFFF).astype(np.uint16)), to_float32(kind, (pairs >> 16).astype(np.uint16))
