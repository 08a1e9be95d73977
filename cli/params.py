"""Option classes turned into command-line parameters: one declaration, no second list.

A command of a kind (``quantize``) offers the options of all its methods; which of them the chosen method has is checked
when it is chosen, so an option it lacks is refused by name.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union, get_args, get_origin

import typer

from weightworks.errors import UsageError

if TYPE_CHECKING:  # help that lists no options does without pydantic
    from pydantic.fields import FieldInfo

    from weightworks.options import Options

MODEL = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="a local folder, or org/name[@revision] on the hub; MODEL+ADAPTER adds LoRA"),
]
JSON = Annotated[bool, typer.Option("--json", help="the report as one JSON object on stdout")]
QUIET = Annotated[bool, typer.Option("-q", "--quiet", help="errors only")]
VERBOSE = Annotated[bool, typer.Option("-v", "--verbose", help="more detail")]
ALIASES = {"num_samples": ["--nsamples"], "output_dir": ["-o"]}
OPPOSITES = {"sym": "--asym"}
NUMBERS = list[float]  # typed as one word, commas between


def parameters(classes: dict[str, type[Options]], panel: str) -> list[inspect.Parameter]:
    """Keyword parameters for the fields of ``classes`` (by owner), a field of one name once; all default to None.

    None stands for "not given", so that a method's own default applies and presets can tell what was typed.
    """
    fields: dict[str, tuple[FieldInfo, list[str]]] = {}
    for owner, options in classes.items():
        for name, field in options.model_fields.items():
            fields.setdefault(name, (field, []))[1].append(owner)
    return [_parameter(name, field, owners, classes, panel) for name, (field, owners) in fields.items()]


def given(values: dict[str, Any], options: type[Options] | None = None) -> dict[str, Any]:
    """The options that were typed; those of ``options`` that are lists of numbers as such."""
    typed = {name: value for name, value in values.items() if value not in (None, [])}
    for name, field in (options.model_fields if options else {}).items():
        if name in typed and _shape(field.annotation)[0] is NUMBERS:
            typed[name] = numbers(name, typed[name])
    return typed


def numbers(name: str, text: str) -> list[float]:
    """``0.5,0.3,0.2`` as numbers."""
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        flag = "--" + name.replace("_", "-")
        raise UsageError(
            f"{flag} {text}: not numbers with commas between", hint=f"such as {flag} 0.5,0.3,0.2"
        ) from None


def command(
    function: Callable[..., Any], extra: list[inspect.Parameter], called: Callable[..., Any]
) -> Callable[..., Any]:
    """``called`` with the parameters of ``function`` and ``extra`` ones, all handed over as keywords."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    hints = typing.get_type_hints(function, include_extras=True)
    own = [p.replace(annotation=hints.get(p.name, p.annotation)) for p in own]

    def run(**values: Any) -> Any:
        return called(**values)

    run.__doc__, run.__name__ = function.__doc__, function.__name__
    run.__signature__ = inspect.Signature([*own, *extra])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*own, *extra]}
    return run


def _parameter(
    name: str, field: FieldInfo, owners: list[str], classes: dict[str, type[Options]], panel: str
) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    kind, choices = _shape(field.annotation)
    help_ = field.description or ""
    if len(owners) < len(classes):
        help_ += f" [{', '.join(owners)}]"
    if choices:
        help_ += f" ({'|'.join(choices)})"
    default = field.get_default(call_default_factory=True)
    if default not in (None, []):
        shown = " ".join(map(str, default)) if isinstance(default, list) else ("sym" if name == "sym" else str(default))
        help_ += f"; default: {shown}" if not isinstance(default, bool) or name == "sym" else ""
    if kind is bool:
        opposite = OPPOSITES.get(name, f"--no-{name.replace('_', '-')}")
        flags = [f"{flag}/{opposite}"]  # both, whatever the default: the command on a card spells every option out
    else:
        flags = [*ALIASES.get(name, []), flag]
    metavar = "X,Y,..." if kind is NUMBERS else None
    option = typer.Option(*flags, metavar=metavar, help=help_, rich_help_panel=panel, show_default=False)
    plain = str if kind is NUMBERS else kind
    annotation: Any = Annotated[list[str], option] if kind is list else Annotated[Optional[plain], option]  # noqa: UP045
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _shape(annotation: Any) -> tuple[Any, list[str]]:
    """Plain type of a field's annotation, and its choices if it is a Literal."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _shape(next(arg for arg in args if arg is not type(None)))
    if origin is Literal:
        return type(args[0]), [str(arg) for arg in args]
    if origin is list:
        return (list if args == (str,) else NUMBERS), []
    return annotation, []
