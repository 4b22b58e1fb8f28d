"""Writes docs/reference/configuration.md from the schema: every key with its type, default, range and docstring."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_prime.config import PrimeConfig, SftConfig, schema
from megatron_prime.config.ranges import RANGES

DOCUMENT = Path(__file__).parent.parent / "docs" / "reference" / "configuration.md"

INTRODUCTION = """# Configuration

Generated from `megatron_prime/config/schema.py` by `make docs`; edit the docstrings there.

A run is one YAML file. `base: other.yaml` (or a list) starts from other files, relative to the file; later files
win. `section.key=value` on the command line wins over files, with values in YAML (`null`, `[1, 2]`, `1e-6`).
`${section.key}` refers to another key. A section whose `kind` changes is replaced, not merged.
A section given in part keeps the defaults of the rest, as listed here.

`megatron-prime check CONFIG [key=value ...]` reports every unknown key, missing key, wrong type, number out of range
and contradiction at once. `required` marks keys without a default.
"""

TABLE_HEAD = "| Key | Type | Default | Range | Meaning |\n|---|---|---|---|---|"


def field_docstrings(section: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, by the field's name."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    docstrings = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            docstrings[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return docstrings


def type_text(hint: Any) -> str:
    """A type as a user of YAML would say it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_text(member) for member in arguments)
    return {int: "integer", float: "number", bool: "`true`, `false`", str: "text", types.NoneType: "`null`"}[hint]


def default_text(value: Any) -> str:
    """A default as it is written in YAML."""
    if value is dataclasses.MISSING:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, `MISSING` where it has none."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def rows(section: type, prefix: str, defaults: Any = None) -> Iterator[str]:
    """Table rows of a section, nested sections inline; ``defaults`` is the instance a partial section starts from."""
    docstrings, hints = field_docstrings(section), typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        default = getattr(defaults, field.name) if defaults is not None else default_of(field)
        if dataclasses.is_dataclass(hint):
            yield from rows(hint, f"{key}.", None if default is dataclasses.MISSING else default)  # type: ignore[arg-type]
            continue
        limits = f"{RANGES[key]}" if key in RANGES else ""
        yield f"| `{key}` | {type_text(hint)} | {default_text(default)} | {limits} | {docstrings.get(field.name, '')} |"


def section_text(section: type, field: dataclasses.Field[Any]) -> str:
    """Heading, sentence and table of one section."""
    default = default_of(field)
    kinds = typing.get_args(typing.get_type_hints(section).get("kind")) if field.name == "data" else ()
    heading = f"### `{field.name}`" + "".join(f" with `kind: {kind}`" for kind in kinds)
    table = "\n".join(rows(section, f"{field.name}.", None if default is dataclasses.MISSING else default))
    return f"{heading}\n\n{inspect.getdoc(section)}\n\n{TABLE_HEAD}\n{table}\n"


def document() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    described: set[Any] = set()
    for root, title in ((PrimeConfig, "PRIME runs (`kind: prime`)"), (SftConfig, "Supervised runs (`kind: sft`)")):
        hints = typing.get_type_hints(root)
        names = ", ".join(f"`{name}`" for name in hints if name != "kind")
        parts.append(f"## {title}\n\n{inspect.getdoc(root)} Sections: {names}.\n")
        for field in dataclasses.fields(root):
            for section in typing.get_args(hints[field.name]) or (hints[field.name],):
                if dataclasses.is_dataclass(section) and section not in described:
                    described.add(section)
                    parts.append(section_text(typing.cast(type, section), field))
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page, or with ``--check`` says whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    options = parser.parse_args(arguments)
    if options.check:
        current = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
        up_to_date = current == document()
        print(f"{DOCUMENT.name} is {'up to date' if up_to_date else 'out of date: run `make docs`'}")
        return 0 if up_to_date else 1
    DOCUMENT.write_text(document(), encoding="utf-8")
    print(f"wrote {DOCUMENT.name} from {schema.__name__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
