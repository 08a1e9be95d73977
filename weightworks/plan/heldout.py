"""Merges tried on held-out text: candidates averaged as they are read, streamed block by block, each score journalled."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from weightworks.engine.estimate import BYTES_A_SECOND
from weightworks.engine.machine import speeds
from weightworks.engine.mergejob import MergeJob
from weightworks.engine.mixture import MergedView
from weightworks.errors import CalibrationError, NotFiniteError
from weightworks.score._subjects import TextOptions, shared_length
from weightworks.score._windows import streamed, windows_of
from weightworks.score.perplexity import geometric
from weightworks.stage.merging import Fit, HeldOut
from weightworks.store.dense import DenseView
from weightworks.store.sources import file_digest
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.calibration import read_texts
from weightworks.stream.passes import Windows, shell, token_losses
from weightworks.stream.skeleton import build

WINDOW = 2048  # tokens, or what the models can take: as scores of texts have it
LOGITS = 4  # tensors of the size of a batch's logits that a gradient step holds
STATES = 40  # of the size of its hidden states, a block
CHARACTERS = 3  # of text a token, at least
UNKNOWN = 1 << 18  # tokens of a text that is no file
OUTSIDE = "outside the blocks"


def held_out(job: MergeJob) -> HeldOut | None:
    """What the merge's method wants of held-out text; None: nothing."""
    return job.method.held_out(len(job.models)) if hasattr(job.method, "held_out") else None


def digests(wanted: HeldOut | None) -> dict[str, Any]:
    """What stands for the texts in a run's identity. Refuses a text to choose by that is the one to report on.

    The result of choosing the best of several on a text says too much of it when measured on the same text.
    """
    if wanted is None:
        return {}
    if wanted.report is not None and (reason := overlap(wanted.text, wanted.report)):
        raise CalibrationError(
            f"the text to choose by, {wanted.text}, {reason} the text to report on, {wanted.report}: "
            "the soup would be measured on what it was fitted to",
            hint="report on text that had no part in the choice",
        )
    texts = {"score": wanted.text, "report": wanted.report}
    return {"held_out": {role: _content(text) for role, text in texts.items() if text is not None}}


def overlap(one: str, other: str) -> str:
    """How the texts share their content, white space aside: ``is the same as``, ``contains``, ``is contained in``; or ""."""
    mine, theirs = (" ".join(" ".join(read_texts(text)).split()) for text in (one, other))
    if mine == theirs:
        return "is the same as"
    return "contains" if theirs in mine else "is contained in" if mine in theirs else ""


def _content(text: str) -> str:
    """The sha256 of a local file; the name of a data set."""
    path = Path(text).expanduser()
    return file_digest(path) if path.is_file() else text


@dataclass
class HeldOutBench:
    """The bench of ``job`` on the texts ``wanted``; scores are steps of the ``writer``'s journal."""

    job: MergeJob
    writer: CheckpointWriter
    wanted: HeldOut

    @property
    def names(self) -> list[str]:
        return [item.name for item in self.job.models]

    def perplexity(self, members: Sequence[int], found: Any = None) -> float:
        """See :class:`~weightworks.stage.merging.Bench`."""
        return self.score(self.wanted.text, members, found)

    def score(self, text: str, members: Sequence[int], found: Any = None) -> float:
        """The perplexity of ``text``; NaN where it cannot be had, for the reason that the journal holds."""
        facts = json.dumps([text, list(members), found])
        step = f"score {hashlib.sha256(facts.encode()).hexdigest()[:16]}"
        if step not in self.writer.steps:
            value, reason = self._score(text, members, found)
            self.writer.done(step, {"members": list(members), "perplexity": value, "reason": reason})
            shown = reason or f"{value:.4f}"
            self.job.progress.say(f"{' + '.join(self.names[k] for k in members)}: {shown}", detail=not reason)
        known = self.writer.steps[step]["perplexity"]
        return math.nan if known is None else float(known)

    def _score(self, text: str, members: Sequence[int], found: Any) -> tuple[float | None, str]:
        job = replace(self.job)
        job.choose(members)
        windows = self.windows(text)
        try:
            with (
                streamed(MergedView(job, found), windows, job.settings) as last,
                shell(last.skeleton, last.view, job.device),
            ):
                losses = token_losses(
                    last.skeleton,
                    Windows(windows),
                    last.states,
                    returns_tuple=last.returns_tuple,
                    device=job.device,
                )
        except NotFiniteError as error:
            return None, str(error)
        value = geometric([losses])[0]
        return (value, "") if math.isfinite(value) else (None, "its perplexity is not finite")

    def windows(self, text: str) -> torch.Tensor:
        """Windows int64 [n, seq] of ``text``, by the tokenizer of the reference."""
        options = TextOptions(texts=[text], seq_len=WINDOW, max_tokens=self.wanted.tokens)
        view = DenseView(self.job.checkpoint)
        length = shared_length({"": view}, WINDOW)
        return windows_of(view, options, length, self.job.settings)[text]

    def whole(self, members: Sequence[int]) -> WholeModels:
        """See :class:`~weightworks.stage.merging.Bench`; whether they fit was asked before the run began."""
        return WholeModels(self.job, members, self.windows(self.wanted.text))


def costs(job: MergeJob, wanted: HeldOut) -> tuple[int, float]:
    """Bytes that fitting takes with all models in memory (0: it streams), and the seconds that scores take.

    In memory: float32 stacks, the mixed model and its gradient, and what a step on one batch keeps.
    """
    parameters = sum(math.prod(part.spec.shape) for part in job.merged)
    config = job.checkpoint.config.get("text_config") or job.checkpoint.config
    width = int(config.get("vocab_size", 0)) * LOGITS
    width += int(config.get("hidden_size", 0)) * int(config.get("num_hidden_layers", 0)) * STATES
    held = 4 * parameters * (len(job.models) + 2) + 4 * WINDOW * width
    tokens = 0
    for text in (wanted.text, wanted.report):
        path = Path(text or "").expanduser()
        most = path.stat().st_size // CHARACTERS if path.is_file() else UNKNOWN
        tokens += 0 if text is None else min(wanted.tokens or most, most)
    read = 2 * sum(spec.nbytes for spec in job.specs) * len(job.models)
    seconds = wanted.scores * (2 * parameters * tokens / speeds()["float32"] + read / BYTES_A_SECOND)
    return held if wanted.whole else 0, seconds


class WholeModels:
    """See :class:`~weightworks.stage.merging.Whole`."""

    def __init__(self, job: MergeJob, members: Sequence[int], windows: torch.Tensor) -> None:
        self.windows = windows
        self.skeleton = skeleton = build(DenseView(job.checkpoint), trust_remote_code=job.settings.trust_remote_code)
        views = []
        for number in members:
            alone = replace(job)
            alone.choose([number])
            views.append(MergedView(alone))
        self.stacks: Mapping[str, torch.Tensor] = {
            name: torch.stack([skeleton.assemble(view, name, torch.float32).cpu() for view in views])
            for name in skeleton.pieces
            if skeleton.get(name).is_floating_point()
        }
        self.fixed = {
            name: skeleton.assemble(views[0], name, torch.float32)
            for name in skeleton.pieces
            if name not in self.stacks
        }

    @cached_property
    def blocks(self) -> Mapping[str, str]:
        """The block of each parameter."""
        names = [(f"{prefix}.", prefix) for prefix, _ in self.skeleton.blocks]
        return {
            name: next((block for prefix, block in names if name.startswith(prefix)), OUTSIDE) for name in self.stacks
        }

    @cached_property
    def tensors(self) -> Mapping[str, Sequence[str]]:
        """The checkpoint's tensors of each parameter."""
        return {name: [piece.tensor for piece in self.skeleton.pieces[name]] for name in self.stacks}

    def logits(self, parameters: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """See :class:`~weightworks.stage.merging.Whole`."""
        output = torch.func.functional_call(
            self.skeleton.model, {**self.fixed, **parameters}, kwargs={"input_ids": tokens, "use_cache": False}
        )
        logits: torch.Tensor = output.logits
        return logits


def fit(job: MergeJob, writer: CheckpointWriter, wanted: HeldOut) -> tuple[Fit, dict[str, Any]]:
    """Have the method choose, tell ``job`` of it, and score the choice on the text to report on; returns the choice and
    what provenance says of it."""
    bench = HeldOutBench(job, writer, wanted)
    job.progress.say(f"choosing among {len(job.models)} models by {wanted.text}")
    if "chosen" not in writer.steps:
        choice = job.method.fit(bench)
        writer.done("chosen", {"members": list(choice.members), "found": choice.found, "facts": dict(choice.facts)})
    known = writer.steps["chosen"]
    choice = Fit(known["members"], known["found"], known["facts"])
    names = bench.names
    facts = {key: value for key, value in choice.facts.items() if key != "lines"}
    alone = {number: bench.perplexity([number]) for number in range(len(names))}
    windows = bench.windows(wanted.text)
    selection: dict[str, Any] = {
        "text": wanted.text,
        "digest": _content(wanted.text),
        "windows": list(windows.shape),
        "members": [names[number] for number in choice.members],
        "candidates": {names[number]: _number(value) for number, value in alone.items()},
        "rejected": [names[number] for number, value in alone.items() if not math.isfinite(value)],
        **facts,
    }
    lines = [*choice.facts["lines"], f"chosen: {', '.join(selection['members'])}"]
    if wanted.report is not None:
        job.progress.say(f"scoring the choice on {wanted.report}")
        selection["report"] = _reported(bench, choice, selection["rejected"], wanted.report)
        lines += [f"{value:10.4f}  {name}" for name, value in selection["report"]["perplexity"].items()]
    for line in lines:
        job.progress.say(line)
    job.choose(choice.members)
    job.selection = selection
    return choice, selection


def _reported(bench: HeldOutBench, choice: Fit, rejected: Sequence[str], text: str) -> dict[str, Any]:
    """Perplexities of the text that had no part in the choice: of the result, and of every candidate."""
    scores = {"the result": bench.score(text, choice.members, choice.found)}
    for number, name in enumerate(bench.names):
        if name not in rejected:
            scores[name] = bench.score(text, [number])
    return {
        "text": text,
        "digest": _content(text),
        "windows": list(bench.windows(text).shape),
        "perplexity": {name: _number(value) for name, value in scores.items()},
    }


def _number(value: float) -> float | None:
    """``value`` as JSON can hold it."""
    return value if math.isfinite(value) else None
