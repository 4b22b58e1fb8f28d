"""YAML files to checked types and back: inheritance, overrides, validation."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic.dataclasses import dataclass

from megatron_prime.config.schema import AnyConfig
from megatron_prime.config.schema_verifier import VerifierSection
from megatron_prime.config.section import Section
from megatron_prime.config.validation import validate
from megatron_prime.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Reads a configuration.

    Args:
        path: YAML file. ``base: other.yaml`` (or a list of files) starts from other files, relative to
            the file itself; later files win. ``${a.b}`` refers to another key.
        overrides: ``a.b=value`` with values in YAML (``null``, ``[1, 2]``); these win over the files.

    Returns:
        The configuration with every default filled in.

    Raises:
        ConfigError: with *all* unknown keys, missing keys, wrong types and numbers out of range, each by its full key
            path.
    """
    merged = _merge(_read(Path(path), ()), _parse_overrides(overrides))
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(merged), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key or path}: {reason}") from error
    return validate(AnyConfig, {"kind": "prime", **resolved})  # type: ignore[dict-item]


def load_verifier_section(path: str | Path | None, overrides: Sequence[str] = ()) -> VerifierSection:
    """Reads section `verifier` alone, from a configuration that may lack all others.

    Args:
        path: YAML file as in `load_config`; None: only what the overrides say.
        overrides: ``verifier.key=value``.

    Raises:
        ConfigError: overrides of other sections, unknown keys, wrong types and numbers out of range.
    """
    foreign = [item for item in overrides if not item.startswith("verifier.")]
    if foreign:
        raise ConfigError([f"{item}: only verifier.key=value has an effect here" for item in foreign])
    merged = _merge({} if path is None else _read(Path(path), ()), _parse_overrides(overrides))
    return validate(_VerifierOnly, {"verifier": merged.get("verifier", {})}).verifier


@dataclass(kw_only=True, slots=True)
class _VerifierOnly(Section):
    verifier: VerifierSection = dataclasses.field(default_factory=VerifierSection)


def to_dict(config: AnyConfig) -> dict[str, Any]:
    """The configuration as nested plain mappings, every key present, in the order of the schema."""
    return dataclasses.asdict(config)


def save_config(config: AnyConfig, path: str | Path) -> None:
    """Writes the resolved configuration as YAML that `load_config` reads back as an equal one."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(_escape(to_dict(config)))), encoding="utf-8")


def _escape(value: Any) -> Any:
    """Keeps a literal ``${`` from being read as a reference."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    if isinstance(value, str):
        # OmegaConf halves the backslashes before ``${``; an odd one makes it literal.
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    return value


def _read(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    """The file merged over its bases; ``children`` are the files that led here."""
    path = path.resolve()
    if path in children:
        chain = " -> ".join(p.name for p in (*children, path))
        raise ConfigError(f"base: {path.name} inherits from itself ({chain}); remove one `base:` of the circle")
    if not path.is_file():
        wanted_by = f" (named by `base:` in {children[-1]})" if children else ""
        raise ConfigError(f"{path}: no such file{wanted_by}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); it must be text in UTF-8") from error
    content = _parse_yaml(text, str(path))
    merged: dict[str, Any] = {}
    for base in _bases(content.pop("base", None), path):
        merged = _merge(merged, _read(path.parent / base, (*children, path)))
    return _merge(merged, content)


def _bases(value: Any, path: Path) -> list[str]:
    bases = [value] if isinstance(value, str) else value or []
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"base: {value!r} in {path} is no file; name one, or a list of them")
    return bases


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.create(text or "{}"))
    except (yaml.YAMLError, OmegaConfBaseException, AssertionError) as error:
        # OmegaConf asserts that the text is a mapping or a list.
        reason = str(error) or "expected a mapping of keys"
        raise ConfigError(f"{source}: not a YAML mapping: {reason}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: expected a mapping of keys at the top, got a list")
    return content  # type: ignore[return-value]


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    malformed = [item for item in overrides if not item.partition("=")[0].strip() or "=" not in item]
    if malformed:
        raise ConfigError([f"{item}: not an override; write section.key=value" for item in malformed])
    merged: dict[str, Any] = {}
    for item in overrides:
        key, _, text = item.partition("=")
        # Parsed under a fixed name, so that the value follows the rules of a file.
        value = _parse_yaml(f"value: {text}", f"override {item}").get("value")
        for name in reversed(key.strip().split(".")):
            value = {name: value}
        merged = _merge(merged, value)  # type: ignore[arg-type]
    return merged


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` wins key by key; a section whose ``kind`` changes is replaced, for its keys are others."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        same_kind = isinstance(old, dict) and isinstance(value, dict) and _same_kind(old, value)
        merged[key] = _merge(old, value) if same_kind else value  # type: ignore[arg-type]
    return merged


def _same_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" not in new or "kind" not in old or old["kind"] == new["kind"]
