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
from typing import Annotated, Any, Literal

from megatron_prime.config import PrimeConfig, SftConfig, schema
from megatron_prime.config.keys import annotations, hints_of, kinds, range_of, sections
from megatron_prime.config.section import Named
from megatron_prime.sockets import BUILT_IN

DOCUMENT = Path(__file__).parent.parent / "docs" / "reference" / "configuration.md"

INTRODUCTION = """# Configuration

Generated from `megatron_prime/config/schema.py` by `make docs`; edit the fields and their docstrings there.

A run is one YAML file. `base: other.yaml` (or a list) starts from other files, relative to the file; later files
win. `section.key=value` on the command line wins over files, with values in YAML (`null`, `[1, 2]`, `1e-6`).
`${section.key}` refers to another key. A section whose `kind` changes is replaced, not merged.
A section given in part keeps the defaults of the rest, as listed here.

`megatron-prime check CONFIG [key=value ...]` reports every unknown key, missing key, wrong type and number out of range
at once; where there is none of these, every contradiction and missing file. `required` marks keys without a default.
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
    if named := [found for found in annotations(hint) if isinstance(found, Named)]:
        return ", ".join(f"`{choice}`" for choice in BUILT_IN[named[0].key]) + " or `package.module:function`"
    if origin is Annotated:
        return type_text(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return "mapping"
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
    docstrings, hints = field_docstrings(section), hints_of(section)
    for field in dataclasses.fields(section):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        default = getattr(defaults, field.name) if defaults is not None else default_of(field)
        if inner := sections(hint):
            yield from rows(inner[0], f"{key}.", None if default is dataclasses.MISSING else default)
            continue
        columns = [f"`{key}`", type_text(hint), default_text(default), range_of(hint), docstrings.get(field.name, "")]
        yield f"| {' | '.join(columns)} |"


def section_text(section: type, field: dataclasses.Field[Any], kind: str | None) -> str:
    """Heading, sentence and table of one section; ``kind`` is what chooses it."""
    default = default_of(field)
    heading = f"### `{field.name}`" + (f" with `kind: {kind}`" if kind else "")
    table = "\n".join(rows(section, f"{field.name}.", None if default is dataclasses.MISSING else default))
    return f"{heading}\n\n{inspect.getdoc(section)}\n\n{TABLE_HEAD}\n{table}\n"


def document() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    described: set[Any] = set()
    for root, title in ((PrimeConfig, "PRIME runs (`kind: prime`)"), (SftConfig, "Supervised runs (`kind: sft`)")):
        hints = hints_of(root)
        names = ", ".join(f"`{name}`" for name in hints if name != "kind")
        parts.append(f"## {title}\n\n{inspect.getdoc(root)} Sections: {names}.\n")
        for field in dataclasses.fields(root):
            found = sections(hints[field.name])
            names = list(kinds(hints[field.name])) if len(found) > 1 else [None] * len(found)
            for kind, section in zip(names, found, strict=True):
                if section not in described:
                    described.add(section)
                    parts.append(section_text(section, field, kind))
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
