"""Rows of a data set chosen for a recovery, from request to published folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from weightworks.engine.estimate import BYTES_A_SECOND, RUNTIME_BYTES, Estimate, refuse
from weightworks.engine.identity import digest_of, identity_of, origin
from weightworks.engine.machine import compute_dtype, free_memory, pick_device, resident, speeds
from weightworks.engine.measuring import Embed, Measuring, Parts, Through, sentence_embedder
from weightworks.errors import CalibrationError, MethodError, UsageError
from weightworks.plan.chosen import SELECTED
from weightworks.plan.stage import Outcome, finished, keep_inputs, opened, short_name, where
from weightworks.plan.texts import stored_dtype
from weightworks.plan.working import working
from weightworks.report.progress import Progress
from weightworks.report.selection import selection_page
from weightworks.stage import catalog
from weightworks.stage.selecting import CHOSEN, Choice, Pool
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.manifest import PROVENANCE
from weightworks.store.sources import file_digest, is_text_file
from weightworks.store.writer import CheckpointWriter, check_target
from weightworks.stream.calibration import describe, load_tokenizer
from weightworks.stream.examples import Examples, all_examples, read_rows
from weightworks.stream.passes import BATCH_TOKENS
from weightworks.stream.skeleton import CONTEXT_KEYS, UNLIMITED

SCORES, PAGE = "scores.jsonl", "report.html"
STATES_SHARE = 4  # hidden states of a part may take this share of memory; beyond it they go to a file
COMPARED = 6  # tensors of the size of a batch's logits that comparing two models holds
CHECKED = 256  # rows that must be the same tokens to both models' tokenizers
SLACK = 1.5  # work beside matrix products


@dataclass
class SelectJob:
    """A method about to choose rows. ``checkpoint`` is the pruned model, ``teacher`` the model as it was before."""

    label: str
    version: int
    method: Any
    settings: Settings
    checkpoint: Checkpoint
    teacher: Checkpoint | None
    target: Path
    progress: Progress
    device: torch.device
    rows: list[Any] = field(init=False)
    examples: Examples = field(init=False)
    parts: Parts = field(init=False)
    models: tuple[Through, Through] | None = field(init=False, default=None)  # original and model, where they are run
    embed: Embed | None = field(init=False, default=None)
    dtype: torch.dtype = field(init=False, default_factory=lambda: torch.float32)

    @property
    def options(self) -> Any:
        return self.method.options

    @property
    def watched(self) -> list[Checkpoint]:
        """What is read, and must not change meanwhile."""
        return [self.checkpoint, *([self.teacher] if self.teacher else [])]

    def __post_init__(self) -> None:
        settings = self.settings
        if settings.dataset in ("builtin", "self"):
            raise UsageError(
                f"{self.label}: rows are chosen from a data set, '{settings.dataset}' has none",
                hint="give --dataset FILE.jsonl, FILE.parquet or a hub data set",
            )
        self.rows = _read(settings.dataset)
        if self.method.measures:
            self._open()
        limit = min(settings.seq_len, *(_context(one) for one in (self.checkpoint, self.teacher) if one is not None))
        self.examples = all_examples(
            self.rows,
            describe(settings.dataset),
            self.checkpoint.root,
            seq_len=limit,
            count=settings.num_samples,
            seed=settings.seed,
            trust_remote_code=settings.trust_remote_code,
        )
        self.parts = Parts(self.examples.rows.starts.diff().tolist(), limit)
        if self.method.measures:
            self._same_tokens()

    def _open(self) -> None:
        """Open both models, and what embeds prompts."""
        if self.teacher is None:
            raise UsageError(
                f"{self.label} compares the model with what it was before",
                hint="name the original with --teacher, or choose by chance with --method random",
            )
        trust = self.settings.trust_remote_code
        original = Through.of("original", self.teacher, self.device, trust_remote_code=trust)
        model = Through.of("model", self.checkpoint, self.device, trust_remote_code=trust)
        if original.vocabulary != model.vocabulary:
            raise MethodError(
                f"{self.teacher.source} knows {original.vocabulary:,} tokens and {self.checkpoint.source} "
                f"{model.vocabulary:,}: their predictions cannot be compared",
                hint="give the model as it was before it was pruned as --teacher",
            )
        self.models = original, model
        self.dtype = compute_dtype(self.settings.dtype, stored_dtype(self.checkpoint), self.device)
        if (name := getattr(self.options, "embedding", "model")) != "model":
            self.embed = sentence_embedder(name, self.device)

    def _same_tokens(self) -> None:
        assert self.teacher is not None
        trust = self.settings.trust_remote_code
        theirs, mine = (load_tokenizer(one.root, trust_remote_code=trust) for one in (self.teacher, self.checkpoint))
        for text in self.examples.texts[:CHECKED]:
            if theirs.encode(text) != mine.encode(text):
                raise MethodError(
                    f"{self.teacher.source} and {self.checkpoint.source} have different tokenizers: they read other tokens in "
                    "the same row, so their predictions cannot be compared",
                    hint="give the model as it was before it was pruned as --teacher",
                )

    @property
    def count(self) -> int:
        """Rows that are to be chosen."""
        return int(self.options.count(len(self.examples.rows)))

    def identity(self) -> dict[str, Any]:
        """What the output's bytes depend on."""
        measured = {"dtype": str(self.dtype)} if self.method.measures else {}
        rows = {"rows": self.examples.digest, "of": len(self.rows), "seq_len": self.settings.seq_len}
        return identity_of(self, **rows, **measured)

    def resolved(self) -> dict[str, Any]:
        """The configuration as it will run."""
        facts: dict[str, Any] = {"method": self.label, "model": where(self.checkpoint), "output": str(self.target)}
        if self.teacher is not None:
            facts["teacher"] = where(self.teacher)
        facts |= {**self.options.resolved(), "rows": self.examples.told(), "to choose": self.count}
        if self.method.measures:
            facts["dtype"] = str(self.dtype).removeprefix("torch.")
        return facts | {"seed": self.settings.seed, "device": str(self.device)}


def run_select(
    name: str,
    model: str,
    options: dict[str, Any],
    settings: Settings,
    *,
    teacher: str | None = None,
    output_dir: Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    announce: Callable[[dict[str, Any]], None] = lambda resolved: None,
    called: Mapping[str, str] | None = None,
) -> Outcome:
    """Choose rows by the method ``select.name`` for ``model``, whose original is ``teacher``; else as
    :func:`~weightworks.plan.stage.run_stage`.

    The folder holds ``selected.jsonl`` (the rows chosen, best first, each with its scores), ``scores.jsonl`` (a line for every
    row of the data set), ``report.html`` and ``provenance.json``.
    """
    started, progress = time.monotonic(), progress or Progress(quiet=True)
    entry = catalog.find("select", name)
    module = entry.load()
    method = module.Method(module.Options.parse(options, where=entry.label))
    checkpoint = opened(model, settings, called)
    original = None if teacher is None else opened(teacher, settings, called)
    target = (output_dir or Path(f"{short_name(checkpoint)}-{name}")).absolute()
    keep_inputs(target, [checkpoint, *([original] if original else [])])
    device = pick_device(settings.device)
    job = SelectJob(entry.label, module.VERSION, method, settings, checkpoint, original, target, progress, device)
    announce(job.resolved())
    if not dry_run or target.exists():  # the identity takes reading every byte of the models, once
        identity = job.identity()
        if (done := finished(target, identity)) is not None and not settings.overwrite:
            return Outcome(target, None, done, cached=True, seconds=time.monotonic() - started)
    if not dry_run:
        check_target(target, overwrite=settings.overwrite)
    costs = _estimate(job)
    if dry_run:
        return Outcome(target, costs, None, seconds=time.monotonic() - started)
    refuse(costs, target)
    provenance = _execute(job, identity, costs)
    return Outcome(target, costs, provenance, seconds=time.monotonic() - started)


def _execute(job: SelectJob, identity: dict[str, Any], costs: Estimate) -> dict[str, Any]:
    """Measure, choose, write and publish; a failure or interruption leaves what is finished for the next run."""
    settings = job.settings
    writer = CheckpointWriter(job.target, (), identity, overwrite=settings.overwrite, resume=settings.resume)
    with working(job, writer):
        examples = job.examples
        pool = Pool(examples.texts, examples.tokens, settings.seed)
        if job.models is not None:
            measures = Measuring(
                *job.models, examples, job.parts, writer, job.progress, job.dtype, costs.on_disk, job.embed
            ).run()
            pool = Pool(examples.texts, examples.tokens, settings.seed, measures.embeddings, measures.degradation)
        choice = job.method.select(pool, job.count, job.progress.say)
        return _publish(job, writer, identity, pool, choice)


def _publish(
    job: SelectJob, writer: CheckpointWriter, identity: dict[str, Any], pool: Pool, choice: Choice
) -> dict[str, Any]:
    """Write rows, scores, page and provenance, and let the folder appear under its name; returns the provenance."""
    examples, scores = job.examples, scores_of(job.examples, pool, choice)
    by_place = {score["row"]: score for score in scores}
    lines = []
    for place in choice.order:
        number = examples.numbers[place]
        row = job.rows[number]
        told = {key: value for key, value in by_place[number].items() if key != "outcome"}
        lines.append({**(row if isinstance(row, dict) else {"text": row}), "selection": told})
    shortfalls = list(choice.shortfalls)
    if job.count > len(pool):
        shortfalls.append(f"{job.count} rows were asked for, {len(pool)} can be trained on")
    selection = {
        "rows": len(job.rows),
        "usable": len(pool),
        "dropped": examples.dropped,
        "asked": job.count,
        "chosen": len(choice.order),
        "tokens": int(pool.tokens.sum()),
        "tokens_chosen": int(pool.tokens[choice.order].sum()),
        **({} if pool.degradation is None else {"degradation": float(pool.degradation.mean())}),
        **choice.facts,
    }
    provenance = {
        "stage": digest_of(identity),
        "identity": identity,
        "source": {**origin(job.checkpoint), **({} if job.teacher is None else {"teacher": origin(job.teacher)})},
        "files": {},
        "calibration": {
            "dataset": job.settings.dataset,
            "dtype": str(job.dtype).removeprefix("torch."),
            "source": examples.source,
            "windows_requested": job.settings.num_samples,
            "seq_len": job.settings.seq_len,
            "digest": examples.digest,
        },
        "selection": selection,
        "fallbacks": shortfalls,
        "report": [],
    }
    writer.write_text(SELECTED, _lines(lines))
    writer.write_text(SCORES, _lines(scores))
    writer.write_text(PAGE, selection_page(job.target.name, provenance, scores, lines))
    provenance["files"] = {name: file_digest(writer.staging / name) for name in (SELECTED, SCORES, PAGE)}
    writer.write_text(PROVENANCE, json.dumps(provenance, indent=1, ensure_ascii=False) + "\n")
    writer.commit()
    return provenance


def scores_of(examples: Examples, pool: Pool, choice: Choice) -> list[dict[str, Any]]:
    """What is known of every row of the data set, in its order.

    ``row`` is its place there, from 0; ``outcome`` chosen or why not; ``rank`` its place among those chosen, from 1, else None.
    """
    ranks = {place: rank for rank, place in enumerate(choice.order, 1)}
    tokens = pool.tokens.tolist()
    rows: list[dict[str, Any]] = [
        {"row": number, "outcome": reason, "rank": None} for number, reason in examples.left_out.items()
    ]
    for place, number in enumerate(examples.numbers):
        rows.append(
            {
                "row": number,
                "outcome": choice.outcomes[place],
                "rank": ranks.get(place),
                "prompt_tokens": tokens[place][0],
                "answer_tokens": tokens[place][1],
                **({} if pool.degradation is None else {"degradation": float(pool.degradation[place])}),
                **{name: column[place] for name, column in choice.scores.items()},
            }
        )
    assert sum(row["outcome"] == CHOSEN for row in rows) == len(choice.order)
    return sorted(rows, key=lambda row: row["row"])


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _estimate(job: SelectJob) -> Estimate:
    """What it will take, from headers, structure and lengths."""
    limit = job.settings.memory_limit or free_memory() + resident()
    texts = sum(map(len, job.examples.texts))
    peak, phase = resident() + RUNTIME_BYTES + 3 * texts, "rows and their scores"
    seconds, on_disk, scratch = 1.0, False, 0
    if job.models is not None:
        width = max(one.width for one in job.models)
        states = 2 * job.parts.largest * width * job.dtype.itemsize
        on_disk = states > limit // STATES_SHARE
        outside = 4 * sum(_count(one, None) for one in job.models)
        block = job.dtype.itemsize * max(_count(one, k) for one in job.models for k in range(len(one.skeleton.blocks)))
        logits = 4 * COMPARED * BATCH_TOKENS * job.models[0].vocabulary
        landmarks = min(len(job.examples.rows), getattr(job.options, "landmarks", 0))
        clustering = 8 * (6 * landmarks**2 + 3 * landmarks * width)
        phases = {
            "a block and the hidden states of a part": block + (0 if on_disk else states),
            "logits of two models": outside + logits + (0 if on_disk else states),
            "similarities of landmarks": clustering + 4 * job.parts.largest * width,
        }
        phase = max(phases, key=lambda name: phases[name])
        peak += phases[phase]
        parameters = [
            sum(info.nbytes // info.dtype.itemsize for info in one.view.checkpoint.tensors.values())
            for one in job.models
        ]
        arithmetic = SLACK * 2.0 * sum(parameters) * job.parts.tokens
        stored = sum(one.view.checkpoint.nbytes for one in job.models)
        seconds = arithmetic / speeds()["float32"] + (len(job.parts) + 1) * stored / BYTES_A_SECOND
        scratch = 4 * len(job.examples.rows) * width + (2 * states if on_disk else 0)
    output = 4 * texts
    return Estimate(
        output_bytes=output,
        disk_bytes=output + scratch,
        peak_bytes=peak,
        peak_phase=phase,
        seconds=seconds,
        limit_bytes=limit,
        on_disk=on_disk,
        statistics_bytes=0,
        reload_blocks=0,
    )


def _read(dataset: str) -> list[Any]:
    """The rows of a data set; one that is not there or has none is an error that says which."""
    rows = read_rows(dataset)
    if not rows:
        there = Path(dataset).expanduser().exists() or not is_text_file(dataset)
        reason = "no rows to choose from" if there else "no such file"
        raise CalibrationError(f"{dataset}: {reason}", hint="give a .jsonl or .parquet file, or a hub data set")
    return rows


def _context(checkpoint: Checkpoint) -> int:
    """Tokens that a model can take, by its configuration."""
    config = checkpoint.config.get("text_config") or checkpoint.config
    return int(next((config[key] for key in CONTEXT_KEYS if config.get(key)), UNLIMITED))


def _count(model: Through, block: int | None) -> int:
    """Parameters of a block, or of what is outside of all."""
    return sum(model.skeleton.get(name).numel() for name in model.skeleton.names_of(block))
