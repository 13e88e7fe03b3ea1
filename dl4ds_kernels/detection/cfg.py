"""Darknet's network description: ``[section]`` headers and ``key=value`` lines.

Spaces mean nothing, lines that start with ``#`` or ``;`` are comments; of a key given twice the first counts, as in darknet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

# The sections of YOLOv1's files, under the names that darknet accepts for them.
_TYPES = {
    "net": "net", "network": "net", "conv": "convolutional", "convolutional": "convolutional", "max": "maxpool",
    "maxpool": "maxpool", "avg": "avgpool", "avgpool": "avgpool", "conn": "connected", "connected": "connected",
    "local": "local", "dropout": "dropout", "batchnorm": "batchnorm", "crop": "crop", "soft": "softmax",
    "softmax": "softmax", "detection": "detection",
}  # fmt: skip


class CfgError(ValueError):
    """The text is not a network description that this package can build; the message names line and key."""


@dataclass(frozen=True)
class Section:
    """One ``[type]`` with its options as text, and the line it starts on."""

    type: str
    line: int
    options: dict[str, str] = field(default_factory=dict)

    def integer(self, key: str, default: int | None = None) -> int:
        """Option as an integer; CfgError if it is missing without default or not a number."""
        value = self.number(key, default)
        if not abs(value) < 2**31 or value != int(value):  # darknet's are C ints
            raise CfgError(f"cfg: [{self.type}] of line {self.line}: {key}: expected an integer, got {self.options[key]!r}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """Option as a number; CfgError if it is missing without default or not a number."""
        text = self.options.get(key)
        if text is None:
            if default is None:
                raise CfgError(f"cfg: [{self.type}] of line {self.line}: {key}: expected a value, got none")
            return default
        try:
            return float(text)
        except ValueError:
            raise CfgError(f"cfg: [{self.type}] of line {self.line}: {key}: expected a number, got {text!r}") from None

    def text(self, key: str, default: str) -> str:
        """Option as it stands."""
        return self.options.get(key, default)


def parse_cfg(text: str) -> list[Section]:
    """The sections of a description, the first of which must be ``[net]``.

    Raises: CfgError for a line that is neither section, option nor comment, an option before any section, an unknown section
    type, or a description without ``[net]`` and at least one layer.
    """
    sections: list[Section] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = "".join(raw.split())
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            kind = _TYPES.get(line[1:-1]) if line.endswith("]") else None
            if kind is None:
                known = ", ".join(sorted(set(_TYPES.values())))
                raise CfgError(f"cfg: line {number}: expected a section of {known}, got {raw.strip()!r}")
            sections.append(Section(kind, number))
        else:
            key, equals, value = line.partition("=")
            if not equals or not key or not value:
                raise CfgError(f"cfg: line {number}: expected key=value, got {raw.strip()!r}")
            if not sections:
                raise CfgError(f"cfg: line {number}: expected [net] before the first option, got {raw.strip()!r}")
            sections[-1].options.setdefault(key, value)
    if not sections or sections[0].type != "net":
        raise CfgError(f"cfg: first section: expected [net], got {f'[{sections[0].type}]' if sections else 'an empty text'}")
    if len(sections) < 2:
        raise CfgError("cfg: expected at least one layer behind [net], got none")
    return sections


def read_cfg(path: str | Path) -> list[Section]:
    """:func:`parse_cfg` of a file. Raises: CfgError, also for a file that cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CfgError(f"cfg: cannot read {path}: {error}") from None
    return parse_cfg(text)
