"""The page of a report: right figures, nothing from elsewhere, nothing that runs, and it fits on a phone."""

from __future__ import annotations

import copy
import functools
import hashlib
import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from weightworks.report.charts import pareto_front, place
from weightworks.report.figures import block_and_kind, duration, figure, short_names, size
from weightworks.report.graph import graph, shorten
from weightworks.report.page import report_page, report_table
from weightworks.report.tables import file_names

LINEARS = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (768, 256),
    "mlp.up_proj": (768, 256),
    "mlp.down_proj": (256, 768),
}


def noise(*words: object) -> float:
    """A number in [0, 1) that depends on ``words`` alone."""
    return int(hashlib.sha256(repr(words).encode()).hexdigest()[:8], 16) / 2**32


def rows(stage: str, method: str, level: float, *, blocks: int = 6, **facts: Any) -> list[dict[str, Any]]:
    """A report a tensor: errors grow with depth, and ``down_proj`` is worst. A fact may depend on block and kind."""
    found = []
    for block in range(blocks):
        for k, (kind, shape) in enumerate(LINEARS.items()):
            error = level * (1 + 0.4 * block) * (1 + 0.35 * k) * (0.8 + 0.4 * noise(stage, block, kind))
            key = "relative_weight_error" if method.endswith("rtn") else "relative_error"
            own = {name: value(block, kind) if callable(value) else value for name, value in facts.items()}
            found.append(
                {
                    "tensor": f"model.layers.{block}.{kind}.weight",
                    "shape": list(shape),
                    "method": method,
                    "bytes_in": math.prod(shape) * 2,
                    "bytes_out": int(math.prod(shape) * own.get("bits", 16) / 8 * 1.03),
                    key: error,
                    "tokens": 32768,
                    "damping": 0.01,
                    **own,
                }
            )
    return found


def example() -> dict[str, Any]:
    """What a sweep over a small model might report: fourteen stages, some cached, one failed."""
    stages: list[dict[str, Any]] = []

    def add(name: str, use: str, given: Any, state: str, **facts: Any) -> None:
        key = hashlib.sha256(name.encode()).hexdigest()
        stages.append({"name": name, "use": use, "from": given, "state": state, "key": key, **facts})

    def mixed(block: int, kind: str) -> int:
        return 8 if kind.endswith("down_proj") and block in (0, 5) else 4 if kind.startswith("self") else 2 + block % 2

    add("base", "source", {}, "source", folder="/models/tiny-llama", bytes=10_500_000)
    add("tuned", "source", {}, "source", folder="/models/tiny-llama-code", bytes=10_500_000)
    add("soup", "merge.soup", {"models": ["base", "tuned"]}, "cached", bytes=10_500_000, reason="unchanged")
    add(
        "sparse",
        "prune.sparsegpt",
        {"model": ["soup"]},
        "ran",
        seconds=9.4,
        peak_bytes=713e6,
        bytes=10_500_000,
        reason="input changed: soup",
        options={"sparsity": 0.5, "pattern": "unstructured"},
        rows=rows("sparse", "prune.sparsegpt", 0.02, sparsity=lambda b, k: 0.4 + 0.2 * noise(b, k)),
    )
    add(
        "healed",
        "recover.perp",
        {"model": ["sparse"], "teacher": ["base"]},
        "ran",
        seconds=31.7,
        peak_bytes=913e6,
        bytes=10_500_000,
        reason="input changed: sparse",
        options={"steps": 200},
    )
    for k, bits in enumerate((2, 3, 4)):
        for j, group in enumerate((32, 128)):
            name = f"small[bits={bits},group_size={group}]"
            told = [
                {"fallbacks": ["damping raised from 0.01 to 0.1"]} if bits == 2 and n in (5, 12) else {}
                for n in range(42)
            ]
            made = rows(name, "quantize.gptq", 0.06 / 4**k * (1 + 0.3 * j), bits=bits)
            add(
                name,
                "quantize.gptq",
                {"model": ["healed"]},
                "cached" if j else "ran",
                reason="" if j else "options changed: bits",
                seconds=None if j else 11.0 + k,
                peak_bytes=None if j else 702e6,
                bytes=2_100_000 + 950_000 * (k + 1) - 120_000 * j,
                bits_a_weight=bits + 16 / group,
                options={"bits": bits, "group_size": group, "sym": True, "scheme": None},
                rows=[{**row, **more} for row, more in zip(made, told, strict=True)],
                folder=f"/work/sweep/{name}",
            )
    add(
        "rounded",
        "quantize.rtn",
        {"model": ["base"]},
        "ran",
        seconds=1.2,
        peak_bytes=301e6,
        bytes=5_790_000,
        bits_a_weight=4.125,
        rows=rows("rounded", "quantize.rtn", 0.004, bits=4),
    )
    add(
        "mixed",
        "quantize.llm_fp4",
        {"model": ["healed"]},
        "ran",
        seconds=14.8,
        peak_bytes=722e6,
        bytes=4_480_000,
        bits_a_weight=3.37,
        rows=rows("mixed", "quantize.llm_fp4", 0.011, bits=mixed),
        fallbacks=["lm_head.weight: tied to the embedding, left as it is"],
    )
    add(
        "experts",
        "quantize.gptq",
        {"model": ["tuned"]},
        "failed",
        reason="new",
        seconds=0.4,
        error="model.layers.3.mlp.up_proj.weight: not a number at [17, 4]\nhint: look at the checkpoint with compress verify",
    )
    models = [
        "base",
        "soup",
        "sparse",
        "healed",
        *(s["name"] for s in stages if s["name"].startswith("small")),
        "rounded",
        "mixed",
    ]
    add("scores", "score.perplexity", {"models": models}, "ran", seconds=12.6, peak_bytes=402e6)
    add(
        "tasks", "score.harness", {"models": ["base", "healed", "mixed", "experts"]}, "skipped", reason="experts failed"
    )
    values = dict(zip(models, (35.86, 35.71, 41.3, 37.2, 58.7, 66.1, 39.9, 40.8, 37.6, 37.9, 38.4, 39.1), strict=True))
    sizes = {stage["name"]: stage.get("bytes") for stage in stages}
    scored, tasked = [], []
    for name, value in values.items():
        base = name == "base"
        change = None if base else value / 35.86 - 1
        scored.append(
            {
                "model": name,
                "bytes": sizes[name],
                "content": hashlib.sha256(name.encode()).hexdigest(),
                "metrics": {
                    "perplexity": {
                        "value": value,
                        "error": None,
                        "change": change,
                        "change_error": None if base else 0.0011 + 0.004 * noise(name),
                    }
                },
                "by_text": {"perplexity": {"prose.test.txt": value * 0.87, "code.test.txt": value * 1.15}},
            }
        )
        accuracy = 0.62 - 0.004 * (value - 35.86)
        tasked.append(
            {
                "model": name,
                "bytes": sizes[name],
                "metrics": {
                    "local_cloze acc": {
                        "value": accuracy,
                        "error": 0.012,
                        "change": None if base else accuracy - 0.62,
                        "change_error": 0.006,
                    }
                },
            }
        )
    return {
        "version": 1,
        "recipe": {
            "name": "sweep",
            "path": "recipes/sweep.yaml",
            "text": "version: 1\nsources:\n  base: examples/tiny-llama\nstages:\n  small:\n    use: quantize.gptq\n"
            "    from: healed\n    matrix: {bits: [2, 3, 4], group_size: [32, 128]}\nreport: [scores]\n",
        },
        "weightworks": "0.1.0",
        "environment": {"torch": "2.13.0", "numpy": "2.4.6", "machine": "x86_64", "threads": 1, "device": "cpu"},
        "seconds": 83.1,
        "peak_bytes": 913_000_000,
        "stages": stages,
        "scores": [
            {
                "stage": "scores",
                "use": "score.perplexity",
                "baseline": "base",
                "metrics": {"perplexity": {"better": "lower"}},
                "models": scored,
            },
            {
                "stage": "cloze",
                "use": "score.harness",
                "baseline": "base",
                "metrics": {"local_cloze acc": {"better": "higher"}},
                "models": tasked,
            },
        ],
        "compare": [],
    }


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return example()


@pytest.fixture(scope="module")
def page(report: dict[str, Any]) -> str:
    return report_page(report)


def small(**facts: Any) -> dict[str, Any]:
    """A report of two stages and one score, which takes little time; ``facts`` go to the first stage."""
    made = rows("tiny", "quantize.gptq", 0.01, blocks=2, bits=lambda block, kind: 3 + block)
    one = {"name": "tiny", "use": "quantize.gptq", "from": {"model": ["base"]}, "state": "ran", "bytes": 3_500_000}
    return {
        "recipe": {"name": "small"},
        "stages": [
            {"name": "base", "use": "source", "state": "source", "bytes": 9_000_000},
            {**one, "rows": made, **facts},
        ],
        "scores": [
            {
                "stage": "scores",
                "baseline": "base",
                "metrics": {"perplexity": {"better": "lower"}},
                "models": [
                    {"model": "base", "metrics": {"perplexity": {"value": 30.0}}},
                    {"model": "tiny", "metrics": {"perplexity": {"value": 33.0, "change": 0.1, "change_error": 0.01}}},
                ],
            }
        ],
    }


def seen(text: str) -> str:
    """What can be read on a page, roughly: no tags, no style, no script."""
    text = re.sub(r"<(style|script)\b.*?</\1>", " ", text, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", " ", text))


# What it says ---------------------------------------------------------------------------------------------------------


def test_verdict_is_one_line(page: str) -> None:
    assert "14 stages: 8 ran, 4 cached, 1 failed, 1 skipped · 83 s · peak memory 913 MB · 5 fallbacks" in seen(page)


def test_everything_asked_for_is_there(page: str, report: dict[str, Any]) -> None:
    text = seen(page)
    for stage in report["stages"]:
        assert stage["name"] in text
        assert stage["key"] in page
    for said in (
        "experts failed",
        "not a number at [17, 4]",
        "model.layers.0.mlp.up_proj.weight: damping raised from 0.01 to 0.1",
        "lm_head.weight: tied to the embedding, left as it is",
        "ran · 9.4 s · 10.5 MB",
        "40.1% to 59.7%, mean",
        "2 to 8, mean 3.33",
        "matrix: {bits: [2, 3, 4], group_size: [32, 128]}",
        "2.13.0",
        "lower is better",
        "higher is better",
        "prose.test.txt",
    ):
        assert said in text, said
    assert page.count('role="img"') == 2 + 9  # a chart a metric, and one a stage that has errors


def test_nothing_to_tell_is_told_in_a_word() -> None:
    text = seen(report_page({"stages": [{"name": "a", "use": "source", "state": "source"}]}))
    assert "Fallbacks: none." in text
    assert "0 stages · no fallbacks" in text
    assert "0 stages" in seen(report_page({}))


def test_a_fallback_told_twice_is_shown_once() -> None:
    row = {"tensor": "model.layers.0.q.weight", "fallbacks": ["damping raised"]}
    page = report_page(small(rows=[row], fallbacks=["model.layers.0.q.weight: damping raised", "a second"]))
    assert "2 fallbacks" in seen(page)


def test_only_the_scores_to_compare_are_drawn(report: dict[str, Any]) -> None:
    one = copy.deepcopy(report)
    one["compare"] = ["cloze"]
    for stage in one["stages"]:
        stage["rows"] = []
    page = report_page(one)
    assert page.count('role="img"') == 1
    assert seen(page).count("prose.test.txt") == 1  # the other one's table is still there


def test_terminal_table_says_the_same(report: dict[str, Any]) -> None:
    head, lines = report_table(report)
    assert head == ["stage", "state", "time", "peak", "size", "bits", "perplexity", "local_cloze acc"]
    table = {line[0]: line for line in lines}
    assert table["base"] == ["base", "source", "", "", "10.5 MB", "", "35.86", "0.6200"]
    assert table["rounded"][1:6] == ["ran", "1.2 s", "301 MB", "5.79 MB", "4.125"]
    assert re.fullmatch(r"38\.40 \(\+7\.08% ± 0\.\d+%\)", table["rounded"][6])  # a share of the baseline's
    assert re.fullmatch(r"0\.6098 \(-0\.0102 ± 0\.0060\)", table["rounded"][7])  # a difference
    assert all(isinstance(cell, str) for line in lines for cell in line)
    assert {len(line) for line in lines} == {len(head)}


def test_scored_models_that_are_no_stage_are_in_the_table() -> None:
    report = {"scores": [{"stage": "s", "models": [{"model": "x", "metrics": {"acc": {"value": 0.5}}}]}]}
    assert report_table(report) == (
        ["stage", "state", "time", "peak", "size", "bits", "acc"],
        [["x", "", "", "", "", "", "0.5000"]],
    )


# Same report, same bytes ----------------------------------------------------------------------------------------------


def test_same_report_same_bytes(page: str, report: dict[str, Any]) -> None:
    before = copy.deepcopy(report)
    assert report_page(report) == page
    assert report == before


def test_same_bytes_in_another_process(tmp_path: Path) -> None:
    source = tmp_path / "report.json"
    source.write_text(json.dumps(small()))
    code = "import json, sys; from weightworks.report.page import report_page as f; print(f(json.load(open(sys.argv[1]))), end='')"
    run = functools.partial(subprocess.run, [sys.executable, "-c", code, str(source)], capture_output=True, check=True)
    assert (
        run(env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8"}).stdout
        == report_page(small()).encode()
    )


# Hostile and missing input --------------------------------------------------------------------------------------------

HOSTILE = (
    '<script>alert(1)</script><img src=x onerror=alert(2)>"\'$x_{1}$ id="m1" #fd0001 url(#a) 模型 \udc80 \x00{{ 7*7 }}'
)


def test_hostile_names_are_only_text() -> None:
    def hostile(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                hostile(key) if key in ("perplexity", "prose") else key: hostile(inner) for key, inner in value.items()
            }
        if isinstance(value, list):
            return [hostile(inner) for inner in value]
        return HOSTILE if isinstance(value, str) and value not in ("ran", "source", "lower") else value

    report = hostile({**small(options={"x": "y"}, fallbacks=["z"], error="e"), "environment": {"torch": "2"}})
    for k, row in enumerate(report["stages"][1]["rows"]):
        row["tensor"] = f"{HOSTILE}.{k % 2}.{HOSTILE}"
    page = report_page(report)
    page.encode()  # can be written
    assert len(re.findall(r"<script\b", page)) == 1  # its own
    assert "<img" not in page
    assert not re.search(r"<[^>]*\sonerror", re.sub(r'"[^"]*"', "", page))
    assert "{{ 7*7 }}" in seen(page)
    charts = re.findall(r'<svg [^>]*role="img".*?</svg>', page, flags=re.DOTALL)
    assert len(charts) == 2
    assert "#fd0001 url(#a) 模型" in seen(charts[0])  # in the chart too it is what it was


def test_nothing_from_elsewhere(page: str) -> None:
    for text in (page, report_page(small(folder="https://example.org/x"))):
        attributes = re.findall(r"""\b(?:src|href|action|data|poster|srcset|xmlns)\s*=\s*["']?([^"'\s>]*)""", text)
        assert {link[:1] for link in attributes} == {"#"}
        assert not re.search(r"@import|url\((?!#)|<link|<base|<iframe|<object", text)
        assert "default-src 'none'" in text
    assert "http" not in re.sub(r"http-equiv", "", page)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts left out, where many pages are made."""
    for chart in ("quality_chart", "depth_chart"):
        monkeypatch.setattr(f"weightworks.report.page.{chart}", lambda *given, **more: "")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("value", [None, math.nan, -1, 0, "", "x", [], {}, [None], {"a": None}, 10**400, 1e308, True])
def test_no_field_is_trusted(value: Any) -> None:
    """Every field in turn is ``value`` wherever it occurs, and then is missing."""
    report = {**small(), **{key: example()[key] for key in ("seconds", "peak_bytes", "environment", "compare")}}
    fields: set[str] = set()

    def walk(inner: Any, change: Any = None) -> Any:
        if isinstance(inner, dict):
            fields.update(inner)
            return {
                key: walk(v, change) if key != change else value
                for key, v in inner.items()
                if (key, value) != (change, "")
            }
        return [walk(v, change) for v in inner] if isinstance(inner, list) else inner

    walk(report)
    for field in sorted(fields):
        changed = walk(report, field)
        said = seen(report_page(changed))
        assert not re.search(r"\b(None|nan|inf|Undefined)\b", said), (field, said)
        report_table(changed)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-30, 1e199, 5e-324])
def test_any_number_can_be_drawn(value: float) -> None:
    report = small(bytes=value)
    report["scores"][0]["models"][1]["metrics"]["perplexity"] = {"value": value, "error": value}
    for row in report["stages"][1]["rows"][:3]:
        row["relative_error"] = row["sparsity"] = row["bits"] = value
    assert "nan" not in seen(report_page(report))


# Pure functions -------------------------------------------------------------------------------------------------------


def test_pareto_front_by_hand() -> None:
    points = [
        (10.0, 5.0),
        (4.0, 6.0),
        (4.0, 7.0),
        (2.0, 9.0),
        (3.0, 9.0),
        (5.0, 6.0),
        (4.0, 6.0),
        (1.0, math.nan),
        (math.inf, 1.0),
    ]
    # smallest first; (3, 9) is larger for the same quality, (5, 6) too; equal points are both kept
    assert pareto_front(points, "lower") == [3, 1, 6, 0]
    # the smallest is already the best; (4, 7), of the same size as (4, 6), is worse than (2, 9)
    assert pareto_front(points, "higher") == [3]
    assert pareto_front([(1.0, 0.2), (2.0, 0.2), (3.0, 0.4), (3.0, 0.3)], "higher") == [0, 2]
    assert pareto_front([], "lower") == []


def test_pareto_front_is_what_nothing_beats() -> None:
    points = [(round(4 * noise("x", k)) / 4, round(4 * noise("y", k)) / 4) for k in range(60)]
    for better, sign in (("lower", 1), ("higher", -1)):
        unbeaten = [
            k
            for k, (x, y) in enumerate(points)
            if not any(a <= x and sign * b <= sign * y and (a, b) != (x, y) for a, b in points)
        ]
        assert sorted(pareto_front(points, better)) == unbeaten


def test_names_in_a_chart_do_not_cover_each_other() -> None:
    points = [(100 + 30 * noise(k) + 300 * (k % 3), 100 + 50 * noise(k, 1)) for k in range(18)]
    around = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    spots = place(points, [(110.0, 12.0)] * 18, around, (0.0, 0.0, 1000.0, 400.0))
    boxes = [spot.box for spot in spots] + around
    for k, a in enumerate(boxes[:18]):
        for b in boxes[k + 1 :]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
        assert a[0] >= 0 and a[1] >= 0 and a[2] <= 1000 and a[3] <= 400


def test_graph_has_columns_and_no_boxes_on_boxes() -> None:
    #          0 -> 1 -> 2 -> 4,  0 -> 3 -> 4,  0 -> 4
    drawing = graph([[], [0], [1], [0], [2, 3, 0]], [100, 120, 100, 150, 100], 60)
    at = {box.stage: box for box in drawing.boxes}
    assert [at[k].column for k in range(5)] == [0, 1, 2, 1, 3]
    assert at[1].x == at[3].x
    assert at[1].width == at[3].width == 150
    assert abs(at[1].y - at[3].y) >= 60
    assert all(box.x >= 0 and box.y >= 30 for box in drawing.boxes)
    assert max(box.x + box.width for box in drawing.boxes) <= drawing.width
    assert max(box.y + 30 for box in drawing.boxes) <= drawing.height
    assert sum(ends for _, ends in drawing.lines) == 5 - 1 + 1  # 0 -> 4 and 3 -> 4 arrive together


def test_tensor_names_are_taken_apart() -> None:
    assert block_and_kind("model.layers.12.mlp.experts.3.up_proj.weight") == (
        12,
        "model.layers.*.mlp.experts.*.up_proj",
    )
    assert block_and_kind("transformer.h.0.attn.c_attn.weight") == (0, "transformer.h.*.attn.c_attn")
    assert block_and_kind("lm_head.weight") == (None, "lm_head")
    names = short_names(["a.*.mlp.experts.*.up", "a.*.mlp.shared.up", "a.*.attn.q", "b.*.attn.q", "head"])
    assert list(names.values()) == ["experts.*.up", "shared.up", "a.*.attn.q", "b.*.attn.q", "head"]


def test_words_for_numbers() -> None:
    assert [size(n) for n in (None, 0, 999, 999.6, 1e3, 999_600, 10.5e6, 4e6, 14.5e9, 3e13)] == [
        *("", "0 bytes", "999 bytes", "1.00 kB", "1.00 kB", "1.00 MB", "10.5 MB", "4.00 MB", "14.5 GB", "30.0 TB")
    ]
    assert [duration(s) for s in (None, 0.04, 0.4, 9.94, 9.96, 83.1, 100, 6000)] == [
        *("", "0.04 s", "0.4 s", "9.9 s", "10 s", "83 s", "1.7 min", "1.7 h")
    ]
    assert [figure(v) for v in (None, 3, 35.863, 0.6123456, 1e-9, 123456.7, 0.0, 9.99999)] == [
        *("", "3", "35.86", "0.6123", "1.000e-09", "123457", "0.000", "10.00")
    ]
    assert figure(0.00876, percent=True, sign=True) == "+0.876%"
    assert shorten("small[bits=3,group_size=128]", 15) == "small[b…ze=128]"
    assert shorten("short\nname", 15) == "short name"


# In a browser ---------------------------------------------------------------------------------------------------------


def chromium() -> str:
    """A Chromium of this machine."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
    found = [path for name in names if (path := shutil.which(name))]
    cached = Path.home() / ".cache" / "ms-playwright"
    found += [str(path) for name in ("chrome", "headless_shell") for path in sorted(cached.glob(f"chromium*/*/{name}"))]
    if not found:
        pytest.skip("no Chromium on this machine (looked for chromium, google-chrome and those of playwright)")
    return found[0]


FRAME = """<!DOCTYPE html><html><head><meta charset="utf-8"></head><body>
<iframe src="page.html#stage-5" style="width: {width}px; height: 800px; border: 0"></iframe>
<script>
onload = () => {{
  const inside = document.querySelector("iframe").contentWindow, page = inside.document, told = {{}};
  const many = what => [...page.querySelectorAll(what)];
  told.width = inside.innerWidth;
  told.overflow = page.documentElement.scrollWidth - inside.innerWidth;
  told.owned = page.documentElement.dataset.owned ?? "";
  told.open = many("details.stage[open]").map(box => box.id);
  Object.defineProperty(inside.navigator, "clipboard", {{ value: {{ writeText: text => {{ told.copied = text; }} }} }});
  const table = page.querySelector("#stages ~ .panel table");
  const names = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
  table.closest(".tabled").querySelector("button.copy").click();
  for (const way of ["up", "down"]) {{ table.tHead.rows[0].cells[2].querySelector("button").click(); told[way] = names(); }}
  inside.dispatchEvent(new Event("beforeprint"));
  told.shut = many("details:not([open]):not(.bulk)").length;
  document.body.textContent = JSON.stringify(told);
}};
</script></body></html>"""


def browse(page: str, folder: Path, *, width: int) -> tuple[dict[str, Any], list[str]]:
    """What was seen of a page, loaded from a file, in a frame so wide (windows have a least width), and the console's lines."""
    browser = chromium()
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    run = subprocess.run(
        [
            *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions"),
            *("--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900"),
            *("--allow-file-access-from-files", "--virtual-time-budget=3000", "--dump-dom"),
            (folder / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    told = re.search(r"<body>(\{.*\})</body>", run.stdout, flags=re.DOTALL)
    assert told, run.stdout + run.stderr
    return json.loads(html.unescape(told[1])), [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_works_in_a_browser(page: str, tmp_path: Path, width: int, report: dict[str, Any]) -> None:
    told, complaints = browse(page, tmp_path, width=width)
    assert complaints == []
    assert told["width"] == width
    assert told["overflow"] <= 0
    assert told["open"] == ["stage-5"]  # what the address points at
    lines = [line.split("\t") for line in told["copied"].rstrip("\n").split("\n")]
    assert lines[0][:5] == ["stage", "state", "time", "peak memory", "size"]
    assert [line[0] for line in lines[1:]] == [stage["name"] for stage in report["stages"]]
    assert lines[4][:5] == ["sparse", "ran", "9.4", "713000000", "10500000"]  # numbers, not words for them
    assert told["up"][:3] == ["experts", "rounded", "sparse"]
    assert told["down"][:2] == ["healed", "mixed"]
    assert told["shut"] == 0  # on paper everything is open


def test_a_hostile_page_does_nothing_in_a_browser(tmp_path: Path) -> None:
    act = "document.documentElement.dataset.owned=1"
    name = f"</title></style><script>{act}</script><img src=x onerror='{act}'>"
    report = small()
    report["recipe"]["name"] = name
    report["stages"][1]["name"] = report["scores"][0]["models"][1]["model"] = name
    told, complaints = browse(report_page(report), tmp_path, width=390)
    assert complaints == []
    assert told["owned"] == ""
    assert told["overflow"] <= 0


def test_texts_are_called_by_their_last_part() -> None:
    names = file_names(["/a/prose.txt", "b/code.txt", "c/code.txt", "builtin"])
    assert list(names.values()) == ["prose.txt", "b/code.txt", "c/code.txt", "builtin"]
