"""Folders against stock transformers: the logits of what they store, and those of what it loads, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from weightworks.errors import VerificationError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.stream.reload import Rounded

LOADER = Path(__file__).parent / "stock_loader.py"


@dataclass(frozen=True)
class Loaded:
    """What stock transformers made of one folder: logits [windows, seq, vocabulary] and the kernel, or the error."""

    logits: torch.Tensor | None
    kernel: str
    error: str

    def difference(self, expected: torch.Tensor) -> float:
        """The largest difference to the ``expected`` logits, relative to the largest of them."""
        if self.logits is None:
            raise VerificationError(f"stock transformers cannot load the folder: {self.error}")
        return float((self.logits - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def stored_logits(model: nn.Module, folder: Path, tokens: torch.Tensor, *, dequantize: bool = False) -> torch.Tensor:
    """Float32 logits [windows, seq, vocabulary] of the weights in ``folder`` as our reader decodes them.

    ``model`` is the dense one, in float32; its weights are replaced. ``dequantize`` rounds decoded weights to the dtype
    of their scales, as such a load does; else layers round their inputs where the format says so.
    """
    view = DenseView(Checkpoint.open(folder))
    early = [name for name in view.packed_names if (form := view.format_of(name)) is not None and form.decodes_to]
    reader = Rounded(view, view.names if dequantize else early, inputs=not dequantize)
    missing, unexpected = model.load_state_dict({name: reader.read(name).float() for name in view.names}, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise VerificationError(f"{folder}: tensors missing {missing}, unexpected {unexpected}")
    hooks = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, given, rounded=rounded: (rounded(given[0]), *given[1:])
        )
        for name in view.packed_names
        if (rounded := reader.inputs(name)) is not None
    ]
    logits: torch.Tensor = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return logits


def load_apart(
    python: str | Path, folders: Mapping[str, tuple[Path, Mapping[str, Any]]], tokens: torch.Tensor, work: Path
) -> tuple[dict[str, Loaded], dict[str, str]]:
    """Load ``folders`` (path, and ``dequantize`` and ``dtype`` as provenance says under ``checks``; of GGUF files ``gguf_file``)
    in one fresh process of ``python`` that has nothing of this project.

    Returns what became of each by name, and the versions of the packages that loaded them. ``work`` takes the logits.
    """
    jobs = work / "jobs.json"
    listed = {
        name: {"dequantize": False, "dtype": "float32", **checks, "path": str(path)}
        for name, (path, checks) in folders.items()
    }
    jobs.write_text(json.dumps({"tokens": tokens.tolist(), "out": str(work), "folders": listed}))
    # GPTQModel starts a pool of workers a core, and on two cores does not come up with fewer than two.
    env = {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", **os.environ}
    done = subprocess.run([python, LOADER, jobs], capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        raise VerificationError(f"{python} {LOADER.name} ended with {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    loaded = {}
    for name, facts in found["seen"].items():
        path = work / f"{name}.safetensors"
        logits = load_file(path)["logits"] if "error" not in facts else None
        loaded[name] = Loaded(logits, facts.get("kernel", ""), facts.get("error", ""))
    return loaded, dict(found["versions"])
