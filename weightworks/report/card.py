"""The model card: what the checkpoint is, how it was made, what it costs in quality, how to load it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weightworks.report.allocation import allocation
from weightworks.report.norms import norms
from weightworks.report.reduction import parameters
from weightworks.report.reduction import run_time as time_of_smaller
from weightworks.report.sparsity import factored_run_time, factors, run_time, sparsity, weight_on_disk
from weightworks.report.training import renormalised, training
from weightworks.store.checkpoint import Checkpoint

TEMPLATE = """---
{front}
---

# {name}

{sentence} Made with [weightworks]; every figure below and the digests of all files are in `provenance.json`.

| | |
|---|---|
{facts}

## Loading

```python
{snippet}
```

## How it was made

```
{command}
```

{fallbacks}"""


def model_card(source: Checkpoint, name: str, provenance: dict[str, Any], dequantize: bool) -> str:
    """The card of an output folder called ``name``."""
    identity, options = provenance["identity"], provenance["identity"]["options"]
    bits = bits_of(options)
    quality = provenance.get("quality", {})
    size = provenance["size"]
    reduction = provenance.get("reduction")
    factored = "factored_weights" in size
    done = (
        _smaller(identity["method"], reduction) if reduction else _done(identity["method"], options, factored=factored)
    )
    sentence = f"`{source.name}` {done}."
    rows = [("weights on disk", f"{size['bytes_out']:,} bytes, {size['bytes_in'] / size['bytes_out']:.2f}x smaller")]
    if "kept_weights" in size:
        rows += [("sparsity", sparsity(size)), ("size", weight_on_disk(size)), ("run time gain", run_time(options))]
    if factored:
        rows += [("size", factors(size)), ("run time gain", factored_run_time())]
    if reduction is not None:
        rows += [("parameters", parameters(reduction)), ("run time", time_of_smaller(reduction))]
    if "quantized_weights" in size:
        rows.append(("bits a weight", f"{size['bits_a_weight']:.3f} in quantized layers, scales included"))
    if "allocation" in provenance:
        rows.append(("bits chosen", allocation(provenance["allocation"])))
    if quality:
        rows.append(
            ("perplexity on the built-in check text", f"{quality['dense']:.3f} before, {quality['result']:.3f} after")
        )
    if "norms" in provenance:
        rows.append(("norms tuned", norms(provenance["norms"])))
    if "training" in provenance:
        rows.append(("training", training(provenance["training"])))
    if (renormalisation := provenance.get("renormalisation")) is not None:
        rows.append(("rows renormalised", renormalised(renormalisation)))
    if provenance.get("calibration"):
        facts = provenance["calibration"]
        what = "training text" if "training" in provenance else "calibration"
        rows.append((what, f"{facts['source']}, {facts['windows']} windows of {facts['seq_len']} tokens"))
    if (rotation := provenance.get("rotation")) is not None:
        heads = f", and the values of attention in {rotation['value_heads']} blocks" if rotation["value_heads"] else ""
        rows.append(("rotated", f"the residual stream{heads}; gains of norms are folded into weights"))
    if (smoothing := provenance.get("smoothing")) is not None:
        done = f"{smoothing['norms']} norms handed part of their scale on to {smoothing['weights']} weights"
        done += f", {smoothing['rows']} linears that of their rows" if "rows" in smoothing else ""
        rows.append(("smoothed", f"{done}; {len(smoothing['left'])} others have nothing to hand it on"))
    rows.append(("checked with", provenance["checks"]["loader"]))
    if "quantized_weights" in size:
        rows.append(("format", str(provenance.get("format", options.get("format")))))
    degraded = provenance["fallbacks"]
    listed = "\n".join(f"- {line}" for line in degraded)
    return _filled(
        front=front_matter(
            source,
            bits,
            pruned="kept_weights" in size or factored or reduction is not None,
            mixed=budgeted(options),
        ),
        name=name,
        sentence=sentence,
        facts="\n".join(f"| {key} | {value} |" for key, value in rows),
        snippet=snippet(name, dequantize, provenance["checks"].get("dtype")),
        command=command(provenance, source),
        fallbacks=f"## Fallbacks\n\nOn these tensors the method could not be applied as asked:\n\n{listed}\n"
        if degraded
        else "",
    )


def hardware(options: Mapping[str, Any]) -> str | None:
    """The hardware format that weights were quantized to, or that their inputs are rounded; None for plain integers."""
    name = options.get("scheme")
    return None if name is None or re.fullmatch(r"W\dA16(_ASYM)?", name) else str(name)


def budgeted(options: Mapping[str, Any]) -> bool:
    """Whether bits were chosen layer by layer. Pruning has a ``budget`` too, which is another."""
    bound = "max_perplexity_increase"
    return bound in options and (options.get("budget") is not None or options[bound] is not None)


def bits_of(options: Mapping[str, Any]) -> int | None:
    """Bits a weight, by the options or by the scheme's name."""
    if budgeted(options):
        return None
    named = re.match(r"W(\d)A", options.get("scheme") or "")
    found = options.get("bits") or (named and named.group(1))
    return int(found) if found else None


def _done(label: str, options: Mapping[str, Any], *, factored: bool) -> str:
    """What a method did, in a few words."""
    kind, method = label.split(".")
    bits, group = bits_of(options), options.get("group_size")
    grid = "one scale a row" if group == -1 else f"groups of {group}"
    if kind == "recover":
        how = "renormalised" if method == "renormalise" else "trained"
        return f"{how} to win back what pruning cost, zeros held ({method})"
    if budgeted(options):
        held = (
            f"a budget of {options['budget']}"
            if options.get("budget")
            else f"+{options['max_perplexity_increase']} of perplexity"
        )
        return f"quantized within {held}, bits chosen layer by layer ({method})"
    if kind != "prune" and (hardware(options) is not None or group is None):
        return f"quantized to {options.get('scheme')} ({method})"
    if kind != "prune":
        return f"quantized to {bits} bits ({method}, {grid})"
    pattern = options.get("pattern", "unstructured")
    if factored:
        return f"made products of block-diagonal factors and cores of {pattern.replace(':', ' in every ')} ({method})"
    amount = (
        f"by {options['sparsity']:.4g}" if pattern == "unstructured" else f"to {pattern.replace(':', ' of every ')}"
    )
    return f"pruned {amount} ({method})" + (f" and quantized to {bits} bits ({grid})" if bits else "")


def _smaller(label: str, reduction: Mapping[str, Any]) -> str:
    """What a method removed, in a few words."""
    return f"made smaller ({label.rsplit('.', maxsplit=1)[-1]}): {'; '.join(reduction['done'])}"


def merge_card(models: Sequence[Checkpoint], base: Checkpoint | None, name: str, provenance: dict[str, Any]) -> str:
    """The card of a merge called ``name``."""
    method = provenance["identity"]["method"].split(".")[-1]
    names = [model.name for model in models]
    sentence = f"{_joined([f'`{one}`' for one in names])} merged by {method}"
    sentence += f", relative to `{base.name}`." if base is not None else "."
    size, quality, facts = provenance["size"], provenance.get("quality") or {}, provenance.get("diagnosis") or {}
    rows = [("weights on disk", f"{size['bytes_out']:,} bytes")]
    selection, members = provenance.get("selection"), names
    if selection is not None:
        members = [model.name for model in models if model.source in selection["members"]]
        rows += _chosen(selection, members)
    if (alignment := provenance.get("alignment")) is not None:
        rows.append(("units aligned", _aligned(alignment)))
    if (renormalisation := provenance.get("renormalisation")) is not None:
        rows.append(("rows renormalised", renormalised(renormalisation)))
    if quality:
        before = f"{quality['dense']:.3f} for `{base.name if base else members[0]}`, "
        rows.append(("perplexity on the built-in check text", f"{before}{quality['result']:.3f} merged"))
    if facts:
        norms = ", ".join(f"{one} {norm:.4g}" for one, norm in zip(members, facts["delta_norms"], strict=False))
        rows.append(("norms of the task vectors", norms))
        rows.append(("elements on which models disagree in sign", f"{facts['sign_conflicts']:.1%}"))
    rows.append(("checked with", provenance["checks"]["loader"]))
    known = [one for source in [*([base] if base else []), *models] for one in made_of(source)]
    lines = ["base_model:", *(f"- {one}" for one in dict.fromkeys(known))]
    lines += ["library_name: transformers", "tags:", "- weightworks", "- merge"]
    if license_ := source_license((base or models[0]).root):
        lines.append(f"license: {license_}")
    degraded = provenance["fallbacks"]
    listed = "\n".join(f"- {line}" for line in degraded)
    return _filled(
        front="\n".join(lines),
        name=name,
        sentence=sentence,
        facts="\n".join(f"| {key} | {value} |" for key, value in rows),
        snippet=snippet(name, False),
        command=merge_command(provenance, names, None if base is None else base.name),
        fallbacks=f"## Not as it seems\n\n{listed}\n" if degraded else "",
    )


def trained_adapter_card(base: Checkpoint, name: str, provenance: dict[str, Any]) -> str:
    """The card of a LoRA adapter called ``name`` that was trained on ``base``, or solved for it."""
    how = "trained on" if "training" in provenance else "solved for"
    sentence = f"{how} `{base.name}`, which stays as it is ({provenance['identity']['method'].split('.')[-1]})"
    return adapter_card([], base, name, provenance, sentence, command(provenance, base))


def adapter_card(
    names: Sequence[str],
    base: Checkpoint | None,
    name: str,
    provenance: dict[str, Any],
    sentence: str | None = None,
    line: str | None = None,
) -> str:
    """The card of a LoRA adapter called ``name``, made of other adapters or extracted from a checkpoint; ``sentence`` and the
    command ``line`` are told where it was made otherwise."""
    identity, size, rows = provenance["identity"], provenance["size"], provenance["report"]
    method = identity["method"].split(".")[-1]
    known = str(provenance["config"]["base_model_name_or_path"] or (base.name if base is not None else "unknown"))
    what = _joined([f"`{one}`" for one in names or [known]])
    if sentence is None:
        sentence = f"{what} relative to `{known}`" if method == "extract" else f"{what} merged by {method}"
    ranks = sorted({row["rank"] for row in rows if row.get("rank")})
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "none"
    facts = [("adapter file", f"{size['bytes_out']:,} bytes, rank {shown}")]
    if (share := provenance.get("residual")) is not None:
        against = "the difference" if method == "extract" else "the weighted sum"
        facts.append((f"distance from {against}", f"{share['total']:.3%} of its norm, {share['stored']:.3%} as stored"))
    for key, value in (provenance.get("quality") or {}).items():
        facts.append((f"perplexity on the built-in check text, {key}", f"{value:.3f}"))
    if "training" in provenance:
        facts.append(("training", training(provenance["training"])))
    facts.append(("checked with", provenance["checks"]["loader"]))
    degraded = provenance["fallbacks"]
    listed = "\n".join(f"- {text}" for text in degraded)
    front = [f"base_model: {known}", "library_name: peft", "tags:", "- weightworks", "- lora"]
    front += [] if line else ["- merge"]
    loading = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM\n",
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{known}"), "{name}")',
    ]
    words = (
        ["merge extract-lora", *([base.name] if base else [])]
        if method == "extract"
        else ["merge lora --method", method]
    )
    words += [*map(shlex.quote, names)]
    words += ["--base", shlex.quote(base.name)] if base is not None and method != "extract" else []
    return _filled(
        front="\n".join(front),
        name=name,
        sentence=f"A LoRA adapter: {sentence}.",
        facts="\n".join(f"| {key} | {value} |" for key, value in facts),
        snippet="\n".join(loading),
        command=line or " ".join([*words, *flags({**identity["options"], "seed": identity["seed"]})]),
        fallbacks=f"## Not as it seems\n\n{listed}\n" if degraded else "",
    )


def _chosen(selection: Mapping[str, Any], members: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Rows on what was chosen by which text, and what it is worth on a text that had no part in it."""
    text = f"`{Path(selection['text']).name}` (sha256 {selection['digest'][:12]})"
    tried = ", ".join(_figure(value) for value in selection["candidates"].values())
    yield "members", _joined([f"`{one}`" for one in members])
    yield (
        "chosen by",
        f"{selection['way']}, perplexity on {text}: {_figure(selection['perplexity'])}; candidates {tried}",
    )
    if (report := selection.get("report")) is not None:
        result, *others = report["perplexity"].values()
        where = f"perplexity on `{Path(report['text']).name}`, which had no part in the choice"
        yield where, f"{_figure(result)}; candidates {', '.join(map(_figure, others))}"


def _aligned(alignment: Mapping[str, Any]) -> str:
    """How many parts of the models were put in another order."""
    parts = [row for rows in alignment["models"].values() for row in rows]
    moved = [row["gain"] for row in parts if row["gain"] >= alignment["least_gain"]]
    gains = f", nearer by a cosine of up to {max(moved):.3f}" if moved else "; no other order was nearer"
    return f"in {len(moved)} of {len(parts)} parts of blocks{gains}"


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def merge_command(provenance: dict[str, Any], names: Sequence[str], base: str | None) -> str:
    """The command line that makes the merge again, every option spelled out."""
    identity = provenance["identity"]
    method = identity["method"].split(".")[-1].replace("_", "-")
    words = [f"merge {method}", *map(shlex.quote, names), *([f"--base {shlex.quote(base)}"] if base else [])]
    return " ".join([*words, *flags({**identity["options"], "seed": identity["seed"]})])


def flags(values: Mapping[str, Any]) -> Iterator[str]:
    """Options as they are typed."""
    for key, value in values.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            yield flag if value else "--asym" if key == "sym" else "--no-" + flag[2:]
        elif isinstance(value, list) and all(isinstance(item, int | float) for item in value):
            yield from [f"{flag} {','.join(map(str, value))}"] if value else []
        elif isinstance(value, list):
            yield from (f"{flag} {shlex.quote(item)}" for item in value)
        elif value is not None:
            yield f"{flag} {shlex.quote(str(value))}"


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _filled(**values: str) -> str:
    return TEMPLATE.format(**values).rstrip() + "\n"


def made_of(source: Checkpoint) -> list[str]:
    """The names of a source's model and adapters."""
    return [source.name] if source.as_stored else source.name.split("+")


def front_matter(source: Checkpoint, bits: int | None, *, pruned: bool = False, mixed: bool = False) -> str:
    names = made_of(source)
    known = [f"base_model: {names[0]}"] if len(names) == 1 else ["base_model:", *(f"- {name}" for name in names)]
    lines = [*known, "library_name: transformers", "tags:", "- weightworks"]
    if bits is not None or mixed:
        lines += ["- quantized", "- mixed-precision" if mixed else f"- {bits}-bit"]
    if pruned:
        lines += ["- pruned"]
    license_ = source_license(source.root)
    return "\n".join(lines + ([f"license: {license_}"] if license_ else []))


def source_license(root: Path) -> str | None:
    """The licence the source's own card declares."""
    path = root / "README.md"
    if not path.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*(\S+)\s*$", front.group(1), re.MULTILINE) if front else None
    return found.group(1) if found else None


def snippet(name: str, dequantize: bool, dtype: str | None = None) -> str:
    """Python lines that load the folder with transformers; ``dtype`` is the only one it runs in."""
    if dtype is not None and not dequantize:
        return (
            "import torch\nfrom transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype=torch.{dtype})'
        )
    if dequantize:
        return (
            "from transformers import AutoModelForCausalLM, CompressedTensorsConfig\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}", '
            "quantization_config=CompressedTensorsConfig(dequantize=True))"
        )
    return f'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{name}")'


def command(provenance: dict[str, Any], source: Checkpoint) -> str:
    """The command line that makes the folder again, every option spelled out."""
    identity = provenance["identity"]
    stage, method = identity["method"].split(".")
    words = [f"compress {stage} {source.name} --method {method}"]
    if (teacher := provenance["source"].get("teacher")) is not None:
        words.append(f"--teacher {shlex.quote(teacher['name'])}")
    data = provenance.get("calibration", {})
    asked = {
        "dataset": data.get("dataset"),
        "num_samples": data.get("windows_requested"),
        "seq_len": data.get("seq_len"),
        "dtype": data.get("dtype"),
    }
    return " ".join([*words, *flags({**identity["options"], **asked, "seed": identity["seed"]})])
