"""The base class of every option set: frozen, strict, no unknown keys."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from weightworks.errors import UsageError, nearest


class Options(BaseModel):
    """Options of one method. A field gives type, default, bounds, and (``description``) one sentence of meaning.

    The command line, the recipe schema, the documentation page and the cache key are all made from the fields.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    @classmethod
    def parse(cls, values: dict[str, Any], *, where: str) -> Self:
        """Validate ``values``; every mistake goes into one :class:`UsageError`, near names suggested.

        ``where`` names the owner in the message, for example ``quantize.gptq``.
        """
        if problems := cls.problems(values, where=where):
            raise UsageError("; ".join(problems), hint=f"see: compress methods {where.rsplit('.', maxsplit=1)[-1]}")
        return cls(**values)

    @classmethod
    def problems(cls, values: dict[str, Any], *, where: str) -> list[str]:
        """What is wrong with ``values``, a sentence each."""
        return [text for _, text in cls.complaints(values, where=where)]

    @classmethod
    def complaints(cls, values: dict[str, Any], *, where: str) -> list[tuple[str, str]]:
        """What is wrong with ``values``: the option at fault (empty: several together) and a sentence, each."""
        try:
            cls(**values)
        except ValidationError as error:
            return [(str((*problem["loc"], "")[0]), cls._explain(problem, where)) for problem in error.errors()]
        return []

    @classmethod
    def _explain(cls, problem: Any, where: str) -> str:
        name = ".".join(str(part) for part in problem["loc"]) or "options"
        if problem["type"] == "extra_forbidden":
            return f"{where} has no option '{name}' ({nearest(name, cls.model_fields)})"
        if problem["type"] == "missing":
            return f"{where}: option '{name}' is required"
        seen = problem.get("input")
        text = problem["msg"].removeprefix("Value error, ")
        if name == "options":
            return f"{where}: {text}"
        return f"{where}: option '{name}' = {seen!r}: {text[0].lower()}{text[1:]}"

    def resolved(self) -> dict[str, Any]:
        """All options with their final values, in field order, as JSON-compatible data."""
        return self.model_dump(mode="json")
