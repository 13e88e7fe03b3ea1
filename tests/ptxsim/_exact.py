"""Exact rational reference for floating-point instructions: independent of the host's arithmetic and of the simulator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Format:
    """A binary interchange format: exponent and fraction bits."""

    exponent: int
    fraction: int

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def sign(self) -> int:
        return 1 << (self.exponent + self.fraction)

    @property
    def infinity(self) -> int:
        return self.sign - (1 << self.fraction)

    @property
    def nan(self) -> int:
        return self.sign - 1

    def decode(self, bits: int) -> float | Fraction:
        """The value of a bit pattern: a Fraction when finite and not zero, else a float (signed zero, inf, nan)."""
        negative, magnitude = bool(bits & self.sign), bits & (self.sign - 1)
        if magnitude > self.infinity:
            return math.nan
        if magnitude == self.infinity:
            return -math.inf if negative else math.inf
        if magnitude == 0:
            return -0.0 if negative else 0.0
        exponent, fraction = magnitude >> self.fraction, magnitude & ((1 << self.fraction) - 1)
        if exponent:
            fraction += 1 << self.fraction
        scale = max(exponent, 1) - self.bias - self.fraction
        value = Fraction(fraction) * Fraction(2) ** scale
        return -value if negative else value

    def encode(self, value: float | Fraction, mode: str = "rn") -> int:
        """Rounds to a bit pattern; mode: rn, rna, rz, rm (down) or rp (up). NaN is canonical."""
        if isinstance(value, float):
            if math.isnan(value):
                return self.nan
            sign = self.sign if math.copysign(1, value) < 0 else 0
            if math.isinf(value):
                return sign | self.infinity
            if value == 0:
                return sign
            value = Fraction(value)
        negative, size = value < 0, abs(value)
        exponent = size.numerator.bit_length() - size.denominator.bit_length()
        if Fraction(2) ** exponent > size:
            exponent -= 1
        exponent = max(exponent, 1 - self.bias)
        quantum = Fraction(2) ** (exponent - self.fraction)
        whole, rest = divmod(size, quantum)
        rest /= quantum
        up = {
            "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1),
            "rna": rest >= Fraction(1, 2),
            "rz": False,
            "rm": rest > 0 and negative,
            "rp": rest > 0 and not negative,
        }[mode]
        whole = int(whole) + up
        bits = ((exponent + self.bias - 1) << self.fraction) + whole
        if bits >= self.infinity:
            finite = mode == "rz" or (mode == "rm" and not negative) or (mode == "rp" and negative)
            bits = self.nan - (1 << self.fraction) if finite else self.infinity
        return bits | (self.sign if negative else 0)


F16, BF16, F32, F64 = Format(5, 10), Format(8, 7), Format(8, 23), Format(11, 52)
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}


def _special(*values: float | Fraction) -> bool:
    return any(isinstance(v, float) for v in values)


def _negative(value: float | Fraction) -> bool:
    return math.copysign(1, value) < 0 if isinstance(value, float) else value < 0


def add(a, b, mode: str = "rn"):
    """a + b, with IEEE rules for zeros, infinities and NaN."""
    if _special(a, b):
        finite = [0 if isinstance(v, float) and v == 0 else v for v in (a, b)]
        if not any(isinstance(v, float) for v in finite):
            if finite == [0, 0]:
                both = _negative(a) and _negative(b)
                mixed = _negative(a) != _negative(b) and mode == "rm"
                return -0.0 if both or mixed else 0.0
            return finite[0] + finite[1]
        return sum(v for v in (_float(a), _float(b)) if not math.isfinite(v))
    total = a + b
    return total if total else (-0.0 if mode == "rm" else 0.0)


def _float(value: float | Fraction) -> float:
    return value if isinstance(value, float) else math.copysign(1.0, value)  # only its sign matters beside inf and nan


def mul(a, b):
    """a * b, with IEEE rules."""
    return _float(a) * _float(b) if _special(a, b) else a * b


def fma(a, b, c, mode: str = "rn"):
    """a * b + c with one rounding."""
    return add(mul(a, b), c, mode)


def div(a, b):
    """a / b, with IEEE rules."""
    if not _special(a, b):
        return a / b
    x, y = _float(a), _float(b)
    if math.isnan(x) or math.isnan(y) or (x == 0 and y == 0) or (math.isinf(x) and math.isinf(y)):
        return math.nan
    sign = math.copysign(1.0, x) * math.copysign(1.0, y)
    return math.copysign(math.inf, sign) if y == 0 or math.isinf(x) else math.copysign(0.0, sign)


def sqrt_bits(bits: int, fmt: Format, mode: str = "rn") -> int:
    """Correctly rounded square root of a bit pattern."""
    value = fmt.decode(bits)
    if isinstance(value, float):
        return bits if value == 0 else fmt.encode(math.inf if value == math.inf else math.nan)
    if value < 0:
        return fmt.nan
    shift = 2 * (fmt.fraction + 40 + abs(value.numerator.bit_length() - value.denominator.bit_length()))
    scaled = (value.numerator << shift) // value.denominator
    root = math.isqrt(scaled)
    exact = root * root == scaled and (value.numerator << shift) % value.denominator == 0
    return fmt.encode(Fraction(2 * root + (0 if exact else 1), 2) / Fraction(2) ** (shift // 2), mode)
