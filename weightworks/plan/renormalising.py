"""A merge renormalised on a text: the text read, and what that takes."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from weightworks.engine.mergejob import MergeJob
from weightworks.engine.merging import Merging
from weightworks.errors import MethodError
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.calibration import Calibration, load_windows

WINDOWS, LENGTH = 16, 256  # of the text; moments of 4,096 tokens


class Renormalising:
    """What ``job`` was told of renormalisation (``--renormalise TEXT``); false if nothing."""

    def __init__(self, job: MergeJob) -> None:
        self.job, self.text = job, getattr(job.options, "renormalise", None)
        if self.text is not None and (job.vocabulary is not None or job.layout.config):
            what = "has vocabularies that differ" if job.vocabulary is not None else "stacks layers"
            raise MethodError(
                f"renormalise: a merge that {what} cannot be renormalised: its inputs do not read the same tokens, "
                "layer by layer",
                hint="leave out --renormalise",
            )

    def __bool__(self) -> bool:
        return self.text is not None

    @cached_property
    def windows(self) -> Calibration:
        """The windows of the text."""
        job, config = self.job, self.job.checkpoint.config
        longest = (config.get("text_config") or config).get("max_position_embeddings") or LENGTH
        return load_windows(
            str(self.text),
            job.checkpoint.root,
            num_samples=WINDOWS,
            seq_len=min(LENGTH, int(longest)),
            seed=job.settings.seed,
            trust_remote_code=job.settings.trust_remote_code,
        )

    def digests(self) -> dict[str, Any]:
        """What stands for the text in a run's identity."""
        return {"renormalised_on": self.windows.digest} if self else {}

    def run(self, writer: CheckpointWriter, merging: Merging) -> dict[str, Any]:
        """Find the corrections; returns what provenance says of them."""
        from weightworks.engine.renormalising import Renormalised, Renormaliser

        self.job.progress.say(f"renormalising on {self.windows.source}")
        merging.survey()
        what, corrections = Renormalised.of_merge(self.job, merging), merging.corrections
        facts = Renormaliser(what, writer, self.job.progress, self.windows.tokens, corrections).run()
        return {"text": self.windows.facts(), **facts}

    def states_bytes(self) -> int:
        """Bytes of the hidden states of the merge and of all models, float32."""
        config = self.job.checkpoint.config.get("text_config") or self.job.checkpoint.config
        return 4 * (len(self.job.models) + 1) * WINDOWS * LENGTH * int(config.get("hidden_size", 0))
