"""The JSON Schema of recipes, for editors: made from the option classes, so that it says what the reader accepts.

It is a little more lenient: whether names exist, sources are there and options go together only the reader can tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from weightworks.options import Options
from weightworks.plan.matrix import MANY, RUN_WIDE, roles_of
from weightworks.stage import catalog
from weightworks.stage.settings import Settings

Schema = dict[str, Any]
DRAFT = "https://json-schema.org/draft/2020-12/schema"
NAME = r"^[A-Za-z_][\w.-]*$"
VARIABLE: Schema = {"$ref": "#/$defs/variable"}
NULL: Schema = {"type": "null"}  # in a recipe that extends another, takes away what that has
ABOUT = ("description", "default")
ANY = "any"  # stands for the method where it is not given: in a matrix, or in the recipe that is extended


def schema() -> Schema:
    """The schema of recipes with all methods that can be used here, plug-ins among them."""
    entries = catalog.methods()
    own = {label: entry.load().Options for label, entry in entries.items()}
    definitions: dict[str, Schema] = {
        "variable": {"type": "string", "pattern": r"\$\{.+\}", "description": "a variable, or a text with some"},
        "use": _use(entries),
        "settings": {"properties": {name: part for name, part in _options(Settings).items() if name not in RUN_WIDE}},
        "stage": _stage(entries),
        "complete": _complete(own),
    }
    for label, options in own.items():
        properties = {name: _ref("settings", name) for name in definitions["settings"]["properties"]}
        definitions[f"with.{label}"] = _mapping({**properties, **_options(options)})
    definitions[f"with.{ANY}"] = _mapping(_united({label: definitions[f"with.{label}"]["properties"] for label in own}))
    for label in (*own, ANY):
        definitions[f"matrix.{label}"] = _matrix(label, definitions[f"with.{label}"]["properties"])
    return {
        "$schema": DRAFT,
        "title": "recipe",
        "description": "Stages that compress, merge and score checkpoints; see docs/recipes.md",
        **_mapping(_top()),
        "type": "object",
        "if": {"required": ["extends"]},
        "else": {
            "required": ["version", "sources", "stages"],
            "properties": {
                "sources": {"minProperties": 1, "additionalProperties": {"type": "string", "minLength": 1}},
                "stages": {"minProperties": 1, "additionalProperties": {"$ref": "#/$defs/complete"}},
            },
        },
        "$defs": definitions,
    }


def _top() -> dict[str, Schema]:
    text: Schema = {"type": "string", "minLength": 1}
    return {
        "version": {"const": 1, "description": "of the format"},
        "extends": {
            "description": "recipes that this one changes, relative to this file; later ones prevail",
            "anyOf": [text, {"type": "array", "items": text}],
        },
        "vars": {
            "description": "values by name, used as ${name}",
            "type": ["object", "null"],
            "additionalProperties": {"type": ["string", "number", "boolean", "null", "array"]},
        },
        "sources": {
            "description": "checkpoints by name: folders, relative to the working directory, or hub ids org/name[@revision]",
            "type": ["object", "null"],
            "propertyNames": {"pattern": NAME},
            "additionalProperties": {"type": ["string", "null"]},
        },
        "stages": {
            "description": "what is done, by name, in any order",
            "type": ["object", "null"],
            "propertyNames": {"pattern": NAME},
            "additionalProperties": {"$ref": "#/$defs/stage"},
        },
        "report": {
            "description": "score stages whose results the report page compares",
            "anyOf": [{"type": "array", "items": text, "uniqueItems": True}, VARIABLE, NULL],
        },
    }


def _use(entries: Mapping[str, catalog.Entry]) -> Schema:
    return {
        "description": "the method, KIND.NAME; compress methods NAME tells all about it",
        "anyOf": [
            {"enum": [*entries], "enumDescriptions": [entry.summary for entry in entries.values()]},
            VARIABLE,
        ],
    }


def _stage(entries: Mapping[str, catalog.Entry]) -> Schema:
    """A stage, perhaps one that changes that of another recipe; what its options may be depends on its method."""
    several = {"type": "array", "minItems": 1, "items": {"type": "string"}}
    properties: dict[str, Schema] = {
        "use": {"$ref": "#/$defs/use"},
        "from": {
            "description": "what it reads: a source or stage, a list of them, or either by role",
            "type": ["string", "array", "object"],
            "anyOf": [{"type": "string"}, several, {"additionalProperties": {"anyOf": [{"type": "string"}, several]}}],
        },
        "with": {
            "description": "options of the method, and settings such as seed and dataset",
            "type": ["object", "null"],
        },
        "matrix": {
            "description": "options with a list of values each: a stage for every combination",
            "type": ["object", "null"],
        },
    }
    by_method = [
        {
            "if": {"required": ["use"], "properties": {"use": {"const": label}}},
            "then": {"properties": {"from": _from(entry), **_choice(label)}},
        }
        for label, entry in entries.items()
    ]
    without: Schema = {"if": {"not": {"required": ["use"]}}, "then": {"properties": _choice(ANY)}}
    return {**_mapping(properties), "allOf": [*by_method, without]}


def _complete(own: Mapping[str, type[Options]]) -> Schema:
    """What a stage of a recipe that extends none must have: a method, inputs, and options that have no default."""
    needed = {
        label: [name for name, field in options.model_fields.items() if field.is_required()]
        for label, options in own.items()
    }
    options = [
        {
            "if": {"required": ["use"], "properties": {"use": {"const": label}}},
            "then": {"allOf": [{"anyOf": [_has("with", name), _has("matrix", name)]} for name in names]},
        }
        for label, names in needed.items()
        if names
    ]
    return {
        "type": "object",
        "required": ["from"],
        "anyOf": [{"required": ["use"]}, _has("matrix", "use")],
        **({"allOf": options} if options else {}),
    }


def _has(key: str, option: str) -> Schema:
    return {"required": [key], "properties": {key: {"type": "object", "required": [option]}}}


def _choice(label: str) -> dict[str, Schema]:
    return {key: _ref(f"{key}.{label}") for key in ("with", "matrix")}


def _from(entry: catalog.Entry) -> Schema:
    """Inputs of a method: those of its first role as such, or all by role."""
    roles = roles_of(entry)
    by_role: dict[str, Schema] = {}
    for role, wanted in roles.items():
        names: Schema = {"type": "array", "minItems": 1, "items": {"type": "string"}}
        if wanted != MANY:
            names["maxItems"] = 1
        by_role[role] = {"description": wanted, "anyOf": [{"type": "string"}, names]}
    return {"anyOf": [*by_role[next(iter(roles))]["anyOf"], {**_mapping(by_role), "type": "object"}]}


def _options(which: type[Options]) -> dict[str, Schema]:
    """The schema of every option; instead of a value, a variable may stand there."""
    found = {}
    for name, part in which.model_json_schema()["properties"].items():
        about = {key: part[key] for key in ABOUT if key in part}
        value = {key: inner for key, inner in part.items() if key not in (*ABOUT, "title")}
        kinds = value["anyOf"] if set(value) == {"anyOf"} else [value]
        found[name] = {**about, "anyOf": [*(kind for kind in kinds if kind != NULL), VARIABLE, NULL]}
    return found


def _matrix(label: str, options: Iterable[str]) -> Schema:
    """A list of values instead of each option."""
    properties: dict[str, Schema] = {
        name: {"anyOf": [{"type": "array", "minItems": 1, "items": _ref(f"with.{label}", name)}, VARIABLE, NULL]}
        for name in options
    }
    if label == ANY:
        uses: Schema = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/use"}}
        properties["use"] = {"description": "methods of one kind", "anyOf": [uses, VARIABLE, NULL]}
    return _mapping(properties)


def _united(properties: Mapping[str, Mapping[str, Schema]]) -> dict[str, Schema]:
    """Options of all methods: a value is right if it is so for one of the methods that have the option."""
    owners: dict[str, list[str]] = {}
    for label, options in properties.items():
        for name in options:
            if all(properties[other][name] != options[name] for other in owners.setdefault(name, [])):
                owners[name].append(label)
    return {
        name: {"anyOf": [_ref(f"with.{label}", name) for label in labels]} for name, labels in sorted(owners.items())
    }


def _mapping(properties: dict[str, Schema]) -> Schema:
    """A mapping of these keys only, or null. Options may be spelled with ``-``; editors offer those with ``_``."""
    dashed: Schema = {f"^{name.replace('_', '-')}$": part for name, part in properties.items() if "_" in name}
    found: Schema = {"type": ["object", "null"], "properties": properties, "additionalProperties": False}
    return {**found, "patternProperties": dashed} if dashed else found


def _ref(definition: str, option: str | None = None) -> Schema:
    return {"$ref": f"#/$defs/{definition}" + (f"/properties/{option}" if option else "")}
