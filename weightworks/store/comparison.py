"""Two checkpoints compared tensor by tensor, packed weights decoded, never more than a few rows of dense ones held."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch

from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView

ROW_BYTES = 64 << 20  # of dense float32 rows held at a time


def compare(a: str, b: str, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Per tensor: ``state`` (equal, differs, shape, only in A, only in B) and, where shapes agree, how far apart.

    ``max`` and ``mean`` are of |A - B|, ``relative`` is ||A - B|| / ||A||, ``cosine`` the angle's; sums in float64.
    """
    left, right = (DenseView(Checkpoint.open(source, allow_pickle=allow_pickle)) for source in (a, b))
    rows = []
    for name in sorted({*left.names, *right.names}):
        if name not in right.names or name not in left.names:
            rows.append({"name": name, "state": "only in A" if name in left.names else "only in B"})
        elif left.shape(name) != right.shape(name):
            rows.append({"name": name, "state": f"shape {list(left.shape(name))} against {list(right.shape(name))}"})
        else:
            rows.append(_distance(left, right, name))
    counts = Counter(str(row["state"]).split(" [")[0] for row in rows)
    return {"a": a, "b": b, "counts": dict(counts), "tensors": rows}


def _distance(left: DenseView, right: DenseView, name: str) -> dict[str, Any]:
    shape = left.shape(name)
    rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    step = max(1, ROW_BYTES // max(4 * width, 1))
    if left.is_packed(name) or right.is_packed(name) or not shape:
        step = max(rows, 1)  # a packed weight is decoded whole
    top, total, square, norm_a, norm_b, dot = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, rows, step):
        x, y = (_rows(view, name, start, min(start + step, rows), whole=step >= rows) for view in (left, right))
        d = (x - y).abs()
        top = max(top, float(d.max())) if d.numel() else top
        total += float(d.sum())
        square += float(d.square().sum())
        norm_a, norm_b, dot = (
            norm_a + float(x.square().sum()),
            norm_b + float(y.square().sum()),
            dot + float((x * y).sum()),
        )
    return {
        "name": name,
        "state": "equal" if top == 0 else "differs",
        "max": top,
        "mean": total / max(math.prod(shape), 1),
        "relative": math.sqrt(square / norm_a) if norm_a else math.inf if square else 0.0,
        "cosine": dot / math.sqrt(norm_a * norm_b) if norm_a and norm_b else 1.0 if norm_a == norm_b else 0.0,
    }


def _rows(view: DenseView, name: str, start: int, stop: int, *, whole: bool) -> torch.Tensor:
    return (view.read(name) if whole else view.checkpoint.read_rows(name, start, stop)).double()
