"""What people read of a stage: its estimate, and what came of it."""

from __future__ import annotations

from typing import Any

from cli.render import duration, pairs, show, size
from weightworks.report.allocation import allocation
from weightworks.report.norms import norms
from weightworks.report.reduction import parameters
from weightworks.report.reduction import run_time as time_of_smaller
from weightworks.report.sparsity import factored_run_time, factors, run_time, sparsity, weight_on_disk
from weightworks.report.training import renormalised, training


def show_estimate(outcome: Any) -> None:
    """The estimate of a dry run."""
    if outcome.cached:
        show(f"nothing to do: {outcome.target} was made by this very command and is intact")
        return
    costs = outcome.estimate
    taught = {}
    if costs.taught_bytes:
        taught["teacher"] = f"streamed once, its hidden states on disk: {size(costs.taught_bytes)}"
    elif costs.teacher_bytes:
        taught["teacher"] = f"in memory, passed by every batch: {size(costs.teacher_bytes)}"
    pairs(
        {
            "time": f"about {duration(costs.seconds)}",
            "peak memory": f"about {size(costs.peak_bytes)} ({costs.peak_phase}); allowed {size(costs.limit_bytes)}",
            "activations": "on disk" if costs.on_disk else "recomputed" if costs.recompute else "in memory",
            **taught,
            "disk": f"{size(costs.disk_bytes)} while running",
            "output": f"{costs.output_bytes:,} bytes of weights",
        }
    )
    show("dry run: nothing was written")


def show_outcome(outcome: Any) -> None:
    """Where the result lies, what it is worth, what fell short."""
    facts = outcome.provenance
    if outcome.cached:
        show(f"already done: {outcome.target} was made by this very command and is intact")
    quality, checks = facts["quality"], facts["checks"]
    before, after = quality["dense"], quality["result"]
    count = facts["tensors"].get("output", facts["tensors"]["input"])
    summary = {"written": str(outcome.target), **worth(facts)}
    if "allocation" in facts:
        summary["bits chosen"] = allocation(facts["allocation"])
    summary |= {
        "perplexity": f"{before:.3f} -> {after:.3f} ({after / before - 1:+.2%}) on the built-in check text",
        "verified": f"{count} tensors accounted for, read back, loaded by {checks['loader']}: "
        f"perplexity {checks['perplexity_reloaded']:.4f}, in memory {checks['perplexity_in_memory']:.4f}"
        + (
            ""
            if checks["blocks_loaded"] == checks["blocks"]
            else f" ({checks['blocks_loaded']} of {checks['blocks']} blocks, to stay in memory)"
        ),
        **worst(facts["report"]),
        "took": duration(outcome.seconds),
    }
    pairs(summary)
    for line in outcome.fallbacks:
        show(f"  fallback: {line}")


def worst(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The tensors with the largest errors, where there are figures of that."""
    errors = {
        row["tensor"].removesuffix(".weight"): row[key]
        for row in rows
        for key in ("relative_weight_error", "relative_error")
        if key in row
    }
    shown = sorted(errors, key=lambda name: -errors[name])[:3]
    return {"worst tensors": ", ".join(f"{name} {errors[name]:.2%}" for name in shown)} if shown else {}


def worth(facts: dict[str, Any]) -> dict[str, str]:
    """What was gained in bytes, bits and time."""
    sizes = facts["size"]
    if "config" in facts:
        told = {
            "size": f"{size(sizes['bytes_out'])}, an adapter of rank {facts['config']['r']} for PEFT; the model stays"
        }
        return {**told, "training": training(facts["training"])}
    told = {"size": f"{size(sizes['bytes_out'])}, was {size(sizes['bytes_in'])} ({sizes['ratio']:.2f}x smaller)"}
    if "kept_weights" in sizes:
        told["sparsity"] = sparsity(sizes)
        told["on disk"] = weight_on_disk(sizes)
        told["run time gain"] = run_time(facts["identity"]["options"])
    if "factored_weights" in sizes:
        told["on disk"] = factors(sizes)
        told["run time gain"] = factored_run_time()
    if (reduction := facts.get("reduction")) is not None:
        told["removed"] = "; ".join(reduction["done"])
        told["parameters"] = parameters(reduction)
        told["run time"] = time_of_smaller(reduction)
    if "norms" in facts:
        told["norms tuned"] = norms(facts["norms"])
    if "training" in facts:
        told["training"] = training(facts["training"])
    if "renormalisation" in facts:
        told["rows renormalised"] = renormalised(facts["renormalisation"])
    if "quantized_weights" in sizes:
        told["bits a weight"] = f"{sizes['bits_a_weight']:.3f} in {facts['tensors']['transformed']} quantized tensors"
    return told
