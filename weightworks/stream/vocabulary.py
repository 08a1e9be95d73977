"""Which tensors have a row a token, by the model's structure; and whether a written tokenizer has the ids it should."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from weightworks.errors import VerificationError
from weightworks.stream.skeleton import Skeleton


def vocabulary_tensors(skeleton: Skeleton) -> frozenset[str]:
    """The checkpoint's tensors whose first axis is the vocabulary: of the input embedding and of the output head."""
    model = skeleton.model
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    rows = modules[0].weight.shape[0]
    return frozenset(
        piece.tensor
        for name, pieces in skeleton.pieces.items()
        for piece in pieces
        if any(module in skeleton.holders(name) for module in modules if module is not None)
        and skeleton.get(name).shape[:1] == (rows,)
    )


def check_ids(path: Path, ids: Mapping[str, int]) -> None:
    """Load a ``tokenizer.json`` as transformers will, and compare the ids of all tokens.

    Raises :class:`VerificationError` with those that differ.
    """
    try:
        loaded = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises plain exceptions
        raise VerificationError(f"{path}: tokenizers cannot load what was written ({error})") from None
    wrong = [
        f"{token!r} has id {loaded.get(token)}, not {number}"
        for token, number in ids.items()
        if loaded.get(token) != number
    ]
    if wrong:
        raise VerificationError(f"{path}: {len(wrong)} tokens did not get their ids: {'; '.join(wrong[:5])}")
