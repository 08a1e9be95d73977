"""Loads folders with stock transformers and writes the logits they give for fixed tokens; nothing of this project.

    PYTHON stock_loader.py JOBS.json

Run by :mod:`weightworks.testing.stored`, with the interpreter of whatever environment has the packages a format needs.
JOBS holds ``tokens`` (windows of one length), ``out`` (a folder for NAME.safetensors with ``logits``) and ``folders``:
name -> ``path``, ``dequantize`` and ``dtype``, of GGUF files also ``gguf_file`` (its name in the folder) and perhaps ``config``
(a folder whose configuration it is loaded with). The last line printed is JSON: ``versions`` of what took part, and by name the
``kernel``, the class that multiplies with packed weights, or the ``error``.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, GPTQConfig

PACKAGES = ("torch", "transformers", "compressed-tensors", "optimum", "gptqmodel")


def run(path: str, tokens: torch.Tensor, *, dequantize: bool, dtype: str) -> tuple[torch.Tensor, str]:
    """The logits of one folder, loaded as a user loads it, and what multiplied with its packed weights.

    What runs in another ``dtype`` only is decoded by a first call in that, and then computes in float32.
    """
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **options)
    if dtype != "float32":
        model(tokens)
        torch.nn.Module.float(model)  # the model's own refuses: weights are said to be of their dtype
    return model(tokens).logits.float().contiguous(), kernel(model)


def run_gguf(path: str, tokens: torch.Tensor, file: str, config: str | None) -> tuple[torch.Tensor, str]:
    """The same of a GGUF file in the folder; by the configuration in it, or that of another folder."""
    options = {} if config is None else {"config": AutoConfig.from_pretrained(config)}
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=file, dtype=torch.float32, **options)
    return model(tokens).logits.contiguous(), kernel(model)


def run_by_torch(path: str, tokens: torch.Tensor) -> tuple[torch.Tensor, str]:
    """The same with gptqmodel's plain kernel: the one it picks for a processor does not take every group size."""
    bits = json.loads((Path(path) / "config.json").read_text())["quantization_config"]["bits"]
    config = GPTQConfig(bits=bits, backend="torch")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
    return model(tokens).logits.float().contiguous(), f'{kernel(model)}, asked for by backend="torch"'


def kernel(model: Any) -> str:
    """The classes of the layers that hold packed codes; ``Linear`` if none does."""
    names = {type(module).__name__ for module in model.modules() if hasattr(module, "qweight")}
    return ", ".join(sorted(names)) or "Linear"


def versions() -> dict[str, str]:
    """Installed versions of the packages that take part."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    tokens = torch.tensor(jobs["tokens"])
    seen: dict[str, dict[str, str]] = {}
    for name, folder in jobs["folders"].items():
        try:
            try:
                if "gguf_file" in folder:
                    logits, by = run_gguf(folder["path"], tokens, folder["gguf_file"], folder.get("config"))
                else:
                    logits, by = run(folder["path"], tokens, dequantize=folder["dequantize"], dtype=folder["dtype"])
            except RuntimeError as error:
                if "qGroupSize" not in str(error):
                    raise
                logits, by = run_by_torch(folder["path"], tokens)
        except Exception as error:  # whatever a loader raises is the finding
            seen[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        save_file({"logits": logits}, Path(jobs["out"]) / f"{name}.safetensors")
        seen[name] = {"kernel": by}
    sys.stdout.write(json.dumps({"versions": versions(), "seen": seen}) + "\n")


if __name__ == "__main__":
    main()
