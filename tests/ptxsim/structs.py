"""Fills the Params structs of host launchers from their C++ headers, so that tests can't drift from the layout."""

from __future__ import annotations

import ctypes as c
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SCALARS = {
    "bool": c.c_bool,
    "char": c.c_char,
    "float": c.c_float,
    "double": c.c_double,
    "int": c.c_int,
    "unsigned": c.c_uint,
    "size_t": c.c_size_t,
    **{f"int{n}_t": getattr(c, f"c_int{n}") for n in (8, 16, 32, 64)},
    **{f"uint{n}_t": getattr(c, f"c_uint{n}") for n in (8, 16, 32, 64)},
}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)


def _block(text: str, start: int) -> str:
    """The text between the brace at `start` and its partner."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + 1 : i]
    raise ValueError("unbalanced braces")


class Headers:
    """Plain structs and enums of a header and of the headers it includes from `root`.

    Understood: scalar, pointer, enum and nested struct members, with default initialisers; member functions are
    skipped. Anything else raises ValueError, which is what a Params struct should not contain.
    """

    def __init__(self, header: Path | str, root: Path | str) -> None:
        self.root = Path(root)
        self.enums: dict[str, dict[str, int]] = {}
        self.structs: dict[str, type[c.Structure]] = {}
        self._enum_types: dict[str, Any] = {}
        self._defaults: dict[str, dict[str, str]] = {}
        self._seen: set[Path] = set()
        self._read(Path(header))

    def _read(self, path: Path) -> None:
        path = path.resolve()
        if path in self._seen or not path.exists():
            return
        self._seen.add(path)
        text = _COMMENT.sub("", path.read_text())
        for included in re.findall(r'#include "([^"]+)"', text):
            self._read(self.root / included)
        for match in re.finditer(
            r"\benum class (\w+)\s*(?::\s*([\w:]+))?\s*\{|(template\s*<[^>]*>\s*)?\bstruct (\w+)\s*\{", text
        ):
            enum, underlying, template, struct = match.groups()
            if enum:
                self._enum(enum, underlying, _block(text, match.end() - 1))
            elif not template:
                self._struct(struct, _block(text, match.end() - 1))

    def _enum(self, name: str, underlying: str | None, body: str) -> None:
        values: dict[str, int] = {}
        for entry in filter(None, (e.strip() for e in body.split(","))):
            key, _, value = entry.partition("=")
            values[key.strip()] = int(value, 0) if value else (max(values.values()) + 1 if values else 0)
        self.enums[name] = values
        self._enum_types[name] = _SCALARS[(underlying or "int").removeprefix("std::")]

    def _type(self, name: str) -> Any:
        name = name.removeprefix("std::")
        for table in (_SCALARS, self._enum_types, self.structs):
            if name in table:
                return table[name]
        raise KeyError(name)

    def _struct(self, name: str, body: str) -> None:
        fields, defaults = [], {}
        while (brace := re.search(r"\)[^;{}]*\{", body)) is not None:  # member functions
            start = max(body.rfind(";", 0, brace.start()), body.rfind("}", 0, brace.start())) + 1
            end = brace.end() + len(_block(body, brace.end() - 1)) + 1
            body = body[:start] + body[end:]
        try:
            for declaration in filter(None, (d.strip() for d in body.split(";"))):
                if "(" in declaration or declaration.startswith(("static", "using")):
                    continue
                match = re.match(r"(?:const\s+)?([\w:]+)\s*(.*)", declaration, re.S)
                kind, names = match.group(1), match.group(2)
                for entry in names.split(","):
                    member, _, default = entry.partition("=")
                    size = re.search(r"\[(\d+)\]", member)
                    ctype = c.c_void_p if "*" in member else self._type(kind)
                    member = re.sub(r"\[.*|[*\s]", "", member)
                    fields.append((member, ctype * int(size.group(1)) if size else ctype))
                    if default:
                        defaults[member] = default.strip()
        except KeyError:
            return  # not a plain struct: an error only if somebody asks for it
        self.structs[name] = type(name, (c.Structure,), {"_fields_": fields})
        self._defaults[name] = defaults

    def _value(self, text: Any, ctype: Any) -> Any:
        """A default initialiser or a test's value as a ctypes value."""
        if not isinstance(text, str):
            return text
        if text in ("true", "false"):
            return text == "true"
        if text == "nullptr":
            return None
        enum, _, key = text.rpartition("::")
        for name, values in self.enums.items():
            if (enum == name or (not enum and self._enum_types[name] is ctype)) and key in values:
                return values[key]
        return float(text) if ctype in (c.c_double, c.c_float) else int(text, 0)

    def make(self, name: str, pointer: Callable[[Any], int], **values: Any) -> c.Structure:
        """A filled struct. `pointer` turns arrays into addresses (Session.pointer).

        Values: numbers, enumerators by name ("kFloat16"), arrays for pointers, dictionaries for nested structs.
        """
        if name not in self.structs:
            raise ValueError(f"{name} is not a plain struct of scalars, pointers, enums and plain structs")
        cls = self.structs[name]
        unknown = set(values) - {field for field, _ in cls._fields_}
        if unknown:
            raise TypeError(f"{name} has no member {', '.join(sorted(unknown))}")
        result = cls()
        for field, ctype in cls._fields_:
            value = values.get(field)
            if isinstance(ctype, type) and issubclass(ctype, c.Structure):
                setattr(result, field, self.make(ctype.__name__, pointer, **(value or {})))
            elif ctype is c.c_void_p:
                setattr(result, field, value if isinstance(value, int) or value is None else pointer(value))
            elif field in values or field in self._defaults[name]:
                setattr(result, field, self._value(values.get(field, self._defaults[name].get(field)), ctype))
        return result
