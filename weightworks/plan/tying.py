"""Inputs of a merge some of which share embedding and head, and others not, brought to one before anything else sees them.

A shared tensor is merged once. Where inputs differ all are taken apart: the head of one that shares it is its embedding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from weightworks.engine.mergejob import Input
from weightworks.stage.settings import Settings
from weightworks.store.dense import DenseView
from weightworks.store.heads import HeadView, equal
from weightworks.stream.skeleton import build

HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.weight$")  # to tell whether a closer look is needed


@dataclass(frozen=True)
class Tying:
    """What was done: ``tied`` is what the result's configuration says (None: as the reference's), ``copies`` are heads
    that were left out, with the reason, ``notes`` what a user should know."""

    tied: bool | None = None
    copies: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Ends:
    """The embedding's tensor, what the head's is called, whether it is there, and whether it is the embedding."""

    embedding: str
    head: str
    stored: bool
    tied: bool


def alike(models: Sequence[Input], base: Input | None, settings: Settings) -> tuple[list[Input], Input | None, Tying]:
    """``models`` and ``base`` with heads of their own, or with none."""
    inputs = [*([base] if base else []), *models]
    stored = [any(HEAD.search(name) for name in item.tensors) for item in inputs]
    if not any(stored) or (all(stored) and not any(_says_tied(item) for item in inputs)):
        return list(models), base, Tying()
    ends = [_ends(item, settings) for item in inputs]
    if all(one.tied for one in ends):
        made, tying = _once(inputs, ends)
    elif any(one.tied for one in ends):
        made, tying = _apart(inputs, ends)
    else:
        made, tying = inputs, Tying(False if any(_says_tied(item) for item in inputs) else None)
    return (made[1:], made[0], tying) if base else (made, None, tying)


def _says_tied(item: Input) -> bool:
    config = item.checkpoint.config
    return bool(config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False)))


def _ends(item: Input, settings: Settings) -> _Ends:
    """What embedding and head of ``item`` are; a head that is stored counts as shared only if it is the embedding."""
    skeleton = build(DenseView(item.checkpoint), trust_remote_code=settings.trust_remote_code)
    model = skeleton.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    own = {
        id(module): pieces[0].tensor
        for name, pieces in skeleton.pieces.items()
        for module in skeleton.holders(name)
        if skeleton.get(name).shape == getattr(module, "weight", skeleton.get(name)).shape
    }
    first, called = own[id(embedding)], f"{names[id(head)]}.weight"
    if own[id(head)] != first:
        return _Ends(first, own[id(head)], stored=True, tied=False)
    stored = called in item.tensors
    return _Ends(first, called, stored, tied=not stored or equal(item.reader, first, called))


def _once(inputs: Sequence[Input], ends: Sequence[_Ends]) -> tuple[list[Input], Tying]:
    """All share: heads that are stored all the same are left out."""
    made, copies = [], {}
    for item, one in zip(inputs, ends, strict=True):
        if one.stored:
            copies[f"{item.name}: {one.head}"] = f"a copy of {one.embedding}, with which it is shared"
        view = HeadView(item.reader, hidden=frozenset({one.head}))
        made.append(replace(item, reader=view) if one.stored else item)
    return made, Tying(True, copies)


def _apart(inputs: Sequence[Input], ends: Sequence[_Ends]) -> tuple[list[Input], Tying]:
    """Some share: each of those is seen with a head that is its embedding."""
    head = next(one.head for one in ends if not one.tied)
    made, notes = [], []
    for item, one in zip(inputs, ends, strict=True):
        if one.tied:
            notes.append(
                f"{item.name} shares embedding and head and others do not: the result has both, its head is its embedding"
            )
        view = HeadView(item.reader, copies={head: one.embedding})
        made.append(replace(item, reader=view) if one.tied and not one.stored else item)
    return made, Tying(False, notes=notes)
