"""Inputs of a merge whose vocabularies differ, brought to one before anything else sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from weightworks.engine.mergejob import Input
from weightworks.errors import MethodError
from weightworks.stage.settings import Settings
from weightworks.store.dense import DenseView
from weightworks.store.heads import HeadView
from weightworks.store.sources import Digests, cache_folder
from weightworks.store.tokenizerfile import FILE, Vocabulary
from weightworks.store.vocabulary import Alignment, Member, align, views
from weightworks.stream.skeleton import build
from weightworks.stream.vocabulary import vocabulary_tensors


def matched(
    models: Sequence[Input], base: Input | None, options: Any, settings: Settings
) -> tuple[list[Input], Input | None, Alignment | None]:
    """``models`` and ``base`` with the rows of their vocabularies in one order, and how they were matched.

    None stands for inputs that agree: of one vocabulary and one number of rows. Where an input has no ``tokenizer.json`` nothing
    is known of its tokens, and rows are taken as they come. Raises :class:`MethodError` if a union is asked for then.
    """
    inputs = [*([base] if base else []), *models]
    alike = _shapes_agree(inputs)
    if alike and _same_files(inputs):
        return list(models), base, None
    found = [Vocabulary.read(item.checkpoint.root) for item in inputs]
    if unknown := [item.name for item, one in zip(inputs, found, strict=True) if one is None]:
        if options.vocabulary == "union":
            raise MethodError(
                f"--vocabulary union: {', '.join(unknown)} has no {FILE}, so its tokens are not known",
                hint="save its fast tokenizer beside it",
            )
        return list(models), base, None
    known = [one for one in found if one is not None]
    if alike and all(one.ids == known[0].ids for one in known):
        return list(models), base, None
    members = [_member(item, one, settings) for item, one in zip(inputs, known, strict=True)]
    alignment = align(members, options.vocabulary)
    weights = options.each("weights", len(models)) if "weights" in type(options).model_fields else []
    usable = weights if weights and all(weight > 0 for weight in weights) else [1.0] * len(models)
    seen = views(alignment, has_base=base is not None, weights=usable)
    made = [replace(item, reader=view) for item, view in zip(inputs, seen, strict=True)]
    return (made[1:], made[0], alignment) if base else (made, None, alignment)


def _shapes_agree(inputs: Sequence[Input]) -> bool:
    """Whether tensors that several inputs have are of one shape."""
    known = inputs[0].tensors
    return all(
        spec.shape == known[name].shape for item in inputs for name, spec in item.tensors.items() if name in known
    )


def _same_files(inputs: Sequence[Input]) -> bool:
    """Whether all have the very same ``tokenizer.json``, or none has one."""
    paths = [item.checkpoint.root / FILE for item in inputs]
    digests = Digests(cache_folder() / "digests.json")
    same = len({digests.file(path) if path.is_file() else None for path in paths}) == 1
    digests.save()
    return same


def _member(item: Input, vocabulary: Vocabulary, settings: Settings) -> Member:
    skeleton = build(DenseView(item.checkpoint), trust_remote_code=settings.trust_remote_code)
    rows = int(skeleton.model.get_input_embeddings().weight.shape[0])
    tensors = vocabulary_tensors(skeleton)
    copies = item.reader.copies if isinstance(item.reader, HeadView) else {}
    return Member(
        item.name, item.reader, vocabulary, rows, tensors | {name for name, of in copies.items() if of in tensors}
    )
