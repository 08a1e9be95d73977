"""What a model that was made smaller is worth in bytes and time, in true words: for the terminal and for the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SAME = 0.99  # of the work of a token is as good as all of it


def parameters(facts: Mapping[str, Any]) -> str:
    """How much smaller it is."""
    before, after = facts["parameters_in"], facts["parameters_out"]
    return f"{after:,}, {after / before:.1%} of {before:,}; on disk in the same share, without any special format"


def run_time(facts: Mapping[str, Any]) -> str:
    """What that saves in run time."""
    before, after = facts["multiply_adds_in"], facts["multiply_adds_out"]
    if after > SAME * before:  # but for the router, a little narrower
        return "none: a token passes as many experts as before; memory is saved"
    return (
        f"{after / before:.1%} of the multiplications of weights a token, on any engine: matrices are smaller or fewer, none "
        "holds zeros"
    )
