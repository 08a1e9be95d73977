"""Renormalisation: rows of a pruned model scaled so that layers put out what the original's do, channel by channel.

REPAIR and RESCALE after pruning (Qu & Horvath, arXiv:2402.05966; Jordan et al., arXiv:2211.08403): with sigma and mu the standard
deviation and mean of a layer's outputs on a text, and stars for the original's, a row is multiplied by sigma* / sigma and a bias
becomes mu* + sigma* / sigma (b - mu); a layer without a bias is only scaled. Layers are taken in the order of the forward
pass, each measured with those before it corrected. Nothing is trained, and every zero stays a zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from compress.schemes import ALWAYS_IGNORED, Patterns
from weightworks.options import Options as Base

if TYPE_CHECKING:
    from weightworks.stream.whole import Outline, Subset

PAPER = "Qu & Horvath 2024, arXiv:2402.05966; Jordan et al. 2022, arXiv:2211.08403"
VERSION = 1


class Options(Base):
    """Options of renormalisation."""

    norms: bool = Field(
        False,
        description="also scale the gains of normalisation inside the blocks, by the same rule, channel by channel",
    )
    ignore: Patterns = Field(
        default=[], description="layers left as they are: globs, or regular expressions after re: (routers always are)"
    )

    @property
    def ignored(self) -> list[str]:
        """Patterns of all layers left as they are."""
        return [*ALWAYS_IGNORED, *self.ignore]


class Method:
    """Renormalisation, which the engine does; what may be changed is said here."""

    masks = False  # it makes none, and keeps those there are
    renormalises = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def scheme(self) -> None:
        return None

    def subset(self, outline: Outline) -> Subset:
        from weightworks.stream.whole import Subset

        names = {*outline.weights}
        names |= {name.removesuffix("weight") + "bias" for name in outline.weights}
        if self.options.norms:
            names |= {name for name in outline.norms if outline.inside(name)}
        return Subset(tuple(name for name in outline.skeleton.learnable if name in names))
