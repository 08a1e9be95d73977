"""What a text is about, and a filter that keeps the concepts of chosen texts consistent.

Concepts are key phrases by RAKE (Rose et al. 2010): runs of words without stop words or punctuation; a word's score is its degree
(words it stands in phrases with, itself among them) over its frequency, a phrase's the sum over its words. The filter is
PASER's concept consistency graph: concepts are nodes, those of one accepted text are all joined.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

LONGEST = 4  # words of a phrase; longer ones are never met again
PIECE = re.compile(r"[^\w\s'\u2019-]+|\n")  # what ends a phrase
WORD = re.compile(r"[^\W\d_][\w'\u2019-]*")
STOP = frozenset(
    """
a about above after again against all almost alone along already also although always am among an and another any
anybody anyone anything are around as at away back be became because become been before began behind being below beneath
beside besides between beyond both but by came can cannot come could did do does doing done down during each either else
enough even ever every everybody everyone everything few first for from further gave get give go goes going gone got had
has have having he her here hers herself him himself his how however i if in indeed into is it its itself just last
least less let like little made make many may me might mine more most much must my myself near neither never next no
nobody none nor not nothing now of off often on once one only onto or other others ought our ours ourselves out over own
perhaps quite rather said same say says see seem seemed seems several shall she should since so some somebody someone
something somewhat still such take than that the thee their theirs them themselves then there therefore these they thing
things this those thou though through thus thy till to together too took toward towards two under until unto up upon us
used very was we well went were what whatever when whence where whether which while who whole whom whose why will with
within without would yes yet you your yours yourself
""".split()  # noqa: SIM905 (a list of 230 strings is harder to read)
)


def concepts(text: str, most: int) -> tuple[str, ...]:
    """The ``most`` key phrases of ``text`` by score, lower-case and in the singular; ties in the order of the text."""
    phrases = list(dict.fromkeys(found := _phrases(text)))
    frequency, degree = Counter[str](), Counter[str]()
    for phrase in found:
        for word in phrase:
            frequency[word] += 1
            degree[word] += len(phrase)
    scores = {phrase: sum(degree[word] / frequency[word] for word in phrase) for phrase in phrases}
    return tuple(" ".join(phrase) for phrase in sorted(phrases, key=lambda phrase: -scores[phrase])[:most])


def _phrases(text: str) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    run: list[str] = []
    for piece in PIECE.split(text.lower()):
        for word in WORD.findall(piece):
            if word not in STOP and len(word) > 2 and len(run) < LONGEST:
                run.append(_singular(word))
            elif run:
                found.append(tuple(run))
                run = []
        if run:
            found.append(tuple(run))
            run = []
    return found


def _singular(word: str) -> str:
    """``word`` without the s of a plural or a genitive."""
    word = re.sub(r"['\u2019]s?$", "", word)
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


class ConceptGraph:
    """Concepts accepted so far, and which of them were accepted together."""

    def __init__(self) -> None:
        self._neighbours: dict[str, set[str]] = {}

    @property
    def nodes(self) -> int:
        return len(self._neighbours)

    @property
    def edges(self) -> int:
        return sum(map(len, self._neighbours.values())) // 2

    def conflict(self, found: Sequence[str]) -> tuple[str, str] | None:
        """Two of the concepts ``found`` that are both known and were never together; None if there are none such."""
        known = [concept for concept in found if concept in self._neighbours]
        for place, one in enumerate(known):
            for other in known[place + 1 :]:
                if other != one and other not in self._neighbours[one]:
                    return one, other
        return None

    def accept(self, found: Sequence[str]) -> bool:
        """Take in the concepts of a text, all joined, unless they are in conflict; whether they were."""
        if self.conflict(found) is not None:
            return False
        for one in found:
            self._neighbours.setdefault(one, set()).update(other for other in found if other != one)
        return True
