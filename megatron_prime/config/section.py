"""What all sections of a configuration share: strict types, ranges at the field, defaults of a section given in part.

A section is a pydantic dataclass that derives from `Section`. It is validated wherever it is made, from YAML or in
code, and refuses unknown keys and every silent conversion but two: whole numbers and texts such as ``"1e-6"`` are
taken for a float.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError, core_schema

from megatron_prime import sockets


def _number(value: object) -> object:
    """YAML leaves some ways to write a number as text, and so do quotes."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
AboveOne = Annotated[Number, Field(gt=1)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
FractionBelowOne = Annotated[Number, Field(ge=0, lt=1)]
FractionAboveZero = Annotated[Number, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


@dataclasses.dataclass(frozen=True)
class Named:
    """Marks a text as a part's short name or ``package.module:function`` (`sockets`).

    Args:
        key: of `sockets.BUILT_IN`, which is where the choices stand.
    """

    key: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._validate, handler(source))

    def _validate(self, name: str) -> str:
        if problem := sockets.names_problem(self.key, name):
            raise PydanticCustomError("name", "{reason}", {"reason": problem.removeprefix(f"{self.key}: ")})
        return name


class MayChange:
    """Marks a key, or a section with all of its keys, that a run may be resumed with another value of."""


MAY_CHANGE = MayChange()


@dataclass(kw_only=True, slots=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class Section:
    """Base of all sections.

    Raises:
        pydantic.ValidationError: when made with unknown keys, wrong types or numbers out of range; names all of them.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        schema = handler(source)
        inner: Any = schema
        while inner["type"] != "dataclass":
            inner = inner["schema"]
        # Strict are the values; a section itself comes out of YAML as a mapping.
        inner["strict"] = False
        return schema

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        """A section given in part keeps the rest of its field's default, which may differ from its class's."""
        if not isinstance(value, Mapping):
            return value
        completed = dict(value)
        for field in dataclasses.fields(cls):
            given, factory = value.get(field.name), field.default_factory
            if not isinstance(given, Mapping) or factory is dataclasses.MISSING:
                continue
            default = factory()
            if isinstance(default, Section):
                completed[field.name] = _values(default) | dict(given)
        return completed


def _values(section: Any) -> dict[str, Any]:
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
