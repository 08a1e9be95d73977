"""Methods of others: installed for real, described, run, held to the contract; broken ones named and got out of the way.

The package is the one docs/plugins.md shows, taken from that page.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import ONE_THREAD
from conftest import REPOSITORY

from cli import compress_app
from cli.describe import tell
from weightworks.errors import UsageError, WeightworksError
from weightworks.stage import catalog
from weightworks.stage.settings import Settings
from weightworks.testing import conformance

PAGE = (REPOSITORY / "docs" / "plugins.md").read_text(encoding="utf-8")
MODULE, PYPROJECT, TEST = (code for _, code in re.findall(r"```(python|toml)\n(.*?)```", PAGE, re.DOTALL))

# A package of nothing but mistakes: entry points, and what each module holds (None: there is no such module).
BROKEN = {
    "quantize.missing": ("broken_missing", None, "ModuleNotFoundError: No module named 'broken_missing'"),
    "quantize.needy": (
        "broken_needy",
        '"""Needs what is not there."""\n\nimport no_such_library\n',
        "ModuleNotFoundError: No module named 'no_such_library' (broken_needy.py, line 3)",
    ),
    "quantize.half": ("broken_half", MODULE.partition("class Method")[0], "broken_half has no Method"),
    "quantize.gptq": ("broken_clash", MODULE, "weightworks itself has a method quantize.gptq"),
    "paint.red": ("broken_kind", MODULE, "'paint.red' is not KIND.NAME with a kind of quantize, prune, recover,"),
}


def compress(*words: str | Path, site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``compress words`` in a fresh process that finds what is installed in ``site``."""
    program = f"import sys; sys.argv = {['compress', *map(str, words)]!r}; from cli.compress_app import main; main()"
    return python("-c", program, site=site, cwd=cwd)


def python(*words: str | Path, site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False, env=environment, cwd=cwd
    )


# Installed for real.


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path into which pip has installed the package of the page, and one that is broken."""
    good, broken = tmp_path_factory.mktemp("good"), tmp_path_factory.mktemp("broken")
    (good / "pyproject.toml").write_text(PYPROJECT)
    (good / "weightworks_power.py").write_text(MODULE)
    points = "\n".join(f'"{label}" = "{module}"' for label, (module, _, _) in BROKEN.items())
    modules = {module: code for module, code, _ in BROKEN.values() if code is not None}
    (broken / "pyproject.toml").write_text(
        PYPROJECT.replace("weightworks-power", "weightworks-broken")
        .replace('"quantize.power" = "weightworks_power"', points)
        .replace('["weightworks_power"]', json.dumps(list(modules)))
    )
    for name, code in modules.items():
        (broken / f"{name}.py").write_text(code)
    folder = tmp_path_factory.mktemp("site")
    words = [
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--no-compile",
        "--target",
        folder,
    ]
    done = python("-m", "pip", *words, good, broken, site=folder, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_methods_lists_it_and_names_the_broken_ones(site: Path, tmp_path: Path) -> None:
    run = compress("methods", site=site, cwd=tmp_path)
    assert run.returncode == 0
    assert re.search(r"quantize\.power +Rounding whose clipping range makes", run.stderr)
    assert re.search(r"quantize\.gptq +GPTQ: ", run.stderr)
    lines = [line for line in run.stderr.splitlines() if line.startswith("broken: ")]
    assert len(lines) == len(BROKEN)
    for label, (_, _, reason) in BROKEN.items():
        assert any(line.startswith(f"broken: {label} of weightworks-broken 0.1: {reason}") for line in lines), label


def test_its_page(site: Path, tmp_path: Path) -> None:
    run = compress("methods", "power", "--json", site=site, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    page = json.loads(run.stdout)
    assert (page["method"], page["distribution"], page["version"]) == ("quantize.power", "weightworks-power 0.1", 1)
    own = next(row for row in page["options"] if row["option"] == "power")
    assert own == {
        "option": "power",
        "type": "float > 0, <= 8",
        "default": 2.4,
        "meaning": "power of the errors that are added up",
    }


def test_its_options_are_in_the_help(site: Path, tmp_path: Path) -> None:
    run = compress("quantize", "--method", "power", "--help", site=site, cwd=tmp_path)
    text = " ".join(run.stdout.split())
    assert (run.returncode, run.stderr) == (0, "")
    assert "--power <float> power of the errors that are added up [power]; default: 2.4" in text
    assert "--act-order" in text  # the help of others is not the poorer for what is broken


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ("--method", "power", "--power", "9"),
            "quantize.power: option 'power' = 9.0: input should be less than or eq",
        ),
        (("--method", "powr"), "unknown method 'powr' for quantize (did you mean 'power'?)"),
        (("--method", "rtn", "--power", "3"), "quantize.rtn has no option 'power'"),
    ],
)
def test_usage_errors(site: Path, tmp_path: Path, words: tuple[str, ...], text: str) -> None:
    run = compress("quantize", "model", *words, site=site, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert text in run.stderr


def test_asking_for_a_broken_one_is_an_error_with_the_cause(site: Path, tmp_path: Path) -> None:
    run = compress("quantize", "model", "--method", "needy", site=site, cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.splitlines() == [
        f"error: quantize.needy of weightworks-broken 0.1 cannot be used: {BROKEN['quantize.needy'][2]}",
        "  hint: other methods can; to be rid of it: pip uninstall weightworks-broken",
    ]


def test_it_runs(site: Path, tmp_path: Path, tiny_llama: Path) -> None:
    words = ("quantize", tiny_llama, "--method", "power", "--power", "3", "--ignore", "*.[1-5].*", "-o", "out")
    run = compress(*words, site=site, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "broken" not in run.stderr
    identity = json.loads((tmp_path / "out" / "provenance.json").read_text())["identity"]
    assert identity["method"] == "quantize.power"
    assert identity["options"]["power"] == 3.0
    assert re.fullmatch(r"[\w-]+ \d[\w.]*", identity["distribution"])  # another version of it is another identity


def test_it_passes_the_conformance_tests_of_the_page(site: Path, tmp_path: Path) -> None:
    (tmp_path / "test_power.py").write_text(TEST)
    run = python(
        "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", "-rA", "test_power.py", site=site, cwd=tmp_path
    )
    assert run.returncode == 0, run.stdout
    checks = {check.__name__ for check in conformance("quantize.power")}
    assert set(re.findall(r"PASSED test_power\.py::test_conformance\[(\w+)\]", run.stdout)) == checks


def test_page_names_every_check_and_shows_forty_lines() -> None:
    for label in ("quantize.power", "score.power"):
        for check in conformance(label):
            assert f"`{check.__name__}`" in PAGE
            assert check.text
    assert len(MODULE.splitlines()) <= 40
    assert MODULE in (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")


# Found by metadata written by hand: every way to be broken, in this process.


Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """A function that installs a plug-in: entry points (label to module), and modules (name to source)."""
    known = set(sys.modules)

    def forget() -> None:
        for cached in (catalog.declared, catalog.methods, catalog.broken, catalog._examined):
            cached.cache_clear()
        for name in set(sys.modules) - known:
            if name.startswith("plug"):
                del sys.modules[name]

    def put(points: dict[str, str], modules: dict[str, str], *, name: str = "plug-in") -> Path:
        folder = tmp_path / name
        info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{label} = {module}" for label, module in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[weightworks.methods]", *lines, ""]))
        for module, source in modules.items():
            (folder / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(folder)
        forget()
        return info

    yield put
    forget()


def test_found_without_being_imported(install: Install) -> None:
    install({"quantize.power": "plug"}, {"plug": MODULE})
    entry = catalog.find("quantize", "power")
    assert "plug" not in sys.modules
    assert entry.label == "quantize.power"
    assert entry.distribution == "plug-in 1.0"
    assert entry.summary == "Rounding whose clipping range makes the sum of errors to a power smallest."
    assert entry.version_facts() == {"method_version": 1, "distribution": "plug-in 1.0"}
    assert catalog.find("quantize", "rtn").version_facts() == {"method_version": 1}  # as it was before plug-ins
    ours = [f"quantize.{name}" for name in ("awq", "gptq", "higgs", "llm_fp4", "rtn")]
    assert list(catalog.methods("quantize")) == [*ours, "quantize.power"]
    assert catalog.broken() == ()


def test_a_module_inside_a_package_is_found_without_importing_the_package(install: Install, tmp_path: Path) -> None:
    install({"quantize.power": "plug_package.inner.power"}, {})
    (tmp_path / "plug-in" / "plug_package" / "inner").mkdir(parents=True)
    (tmp_path / "plug-in" / "plug_package" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "plug-in" / "plug_package" / "inner" / "power.py").write_text(MODULE)
    assert catalog.find("quantize", "power").summary.startswith("Rounding")
    with pytest.raises(WeightworksError, match=r"RuntimeError: imported \(__init__\.py, line 1\)"):
        catalog.find("quantize", "power").load()


def changed(old: str, new: str) -> str:
    """The module of the page with one thing changed."""
    assert old in MODULE
    return MODULE.replace(old, new)


POWER = "power: float = Field(2.4, gt=0, le=8,"
FAULTS: dict[str, tuple[str, str | None, str]] = {
    "no module": ("quantize.bad", None, "ModuleNotFoundError: No module named 'plug'"),
    "syntax": ("quantize.bad", '"""Bad."""\nclass\n', "SyntaxError: invalid syntax (plug.py, line 2)"),
    "not text": ("quantize.bad", "x = '\0'\n", "null bytes"),
    "import": ("quantize.bad", "\nfrom torch import no_such_thing\n", "cannot import name 'no_such_thing' from 'torch'"),
    "error": ("quantize.bad", "raise ValueError('a\\nb ' + 'c' * 999)\n", "ValueError: a b [...] (plug.py, line 1)"),
    "exit": ("quantize.bad", "raise SystemExit(3)\n", "SystemExit: 3 (plug.py, line 1)"),
    "empty": ("quantize.bad", "", "plug has no Options, Method, VERSION, PAPER"),
    "no version": ("quantize.bad", changed("VERSION = 1", "REVISION = 1"), "plug has no VERSION"),
    "version 0": ("quantize.bad", changed("VERSION = 1", "VERSION = 0"), "VERSION is 0, not a whole number from 1 on"),
    "version text": ("quantize.bad", changed("VERSION = 1", "VERSION = '1'"), "VERSION is '1', not a whole number"),
    "no paper": ("quantize.bad", re.sub(r"PAPER = .*", "PAPER = ''", MODULE), "PAPER is not a text"),
    "plain options": ("quantize.bad", changed("(IntegerOptions)", ""), "Options is not a subclass of weightworks.opt"),
    "method": ("quantize.bad", MODULE + "\nMethod = 1\n", "Method is not a class"),
    "option type": (
        "quantize.bad",
        changed("power: float = Field(2.4, gt=0, le=8,", "power: dict[str, int] = Field({},"),
        "option 'power' has type dict[str, int]; allowed: bool, int, float, str,",
    ),
    "option name": (
        "quantize.bad",
        changed(POWER, "seed: int = Field(0,"),
        "option 'seed' has a name that commands already use",
    ),
    "defaults": ("quantize.bad", changed("(IntegerOptions):", "(IntegerOptions, validate_default=True):").replace("2.4, gt", "9.0, gt"), "ValidationError: 1 validation error for Options power Input should be less than"),
    "name": ("quantize.Bad", MODULE, "the name 'Bad' is not made of lower-case letters"),
    "two dots": ("quantize.a.b", MODULE, "the name 'a.b' is not made of lower-case letters"),
    "no kind": ("bad", MODULE, "'bad' is not KIND.NAME with a kind of quantize,"),
    "ours": ("quantize.rtn", MODULE, "weightworks itself has a method quantize.rtn"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_broken_plugin_is_named_and_stops_nothing(install: Install, case: str) -> None:
    label, source, reason = FAULTS[case]
    install(
        {label: "plug", "quantize.power": "plug_power"},
        {"plug_power": MODULE} | ({"plug": source} if source is not None else {}),
    )
    (entry,) = catalog.broken()
    assert (entry.label, entry.distribution) == (label, "plug-in 1.0")
    assert reason in (entry.broken or "")
    assert {"quantize.gptq", "quantize.rtn", "quantize.power"} <= set(catalog.methods())
    for name in ("rtn", "power"):
        assert catalog.find("quantize", name).load().Method
    with pytest.raises(WeightworksError, match=re.escape(f"{label} of plug-in 1.0 cannot be used: {entry.broken}")):
        entry.load()
    kind, _, name = label.partition(".")
    if kind == "quantize" and name != "rtn":
        with pytest.raises(WeightworksError, match="cannot be used"):
            catalog.find(kind, name).load()


@pytest.mark.parametrize("value", ["plug:Method", "plug [extra]", "9plug", "plug."])
def test_an_entry_point_that_is_no_module_is_named(install: Install, value: str) -> None:
    install({"quantize.bad": value}, {"plug": MODULE})
    assert [entry.broken for entry in catalog.broken()] == [f"'{value}' is not the name of a module"]


def test_two_plugins_of_one_name_are_both_named(install: Install) -> None:
    install({"quantize.power": "plug_a"}, {"plug_a": MODULE}, name="plug-a")
    install({"quantize.power": "plug_b", "quantize.other": "plug_b"}, {"plug_b": MODULE}, name="plug-b")
    assert [(entry.distribution, entry.broken) for entry in catalog.broken()] == [
        ("plug-a 1.0", "quantize.power is also declared by plug-b 1.0; uninstall one"),
        ("plug-b 1.0", "quantize.power is also declared by plug-a 1.0; uninstall one"),
    ]
    assert "quantize.power" not in catalog.methods()
    assert "quantize.other" in catalog.methods()
    with pytest.raises(WeightworksError, match=r"quantize\.power of plug-a 1\.0 cannot be used: .* plug-b 1\.0"):
        catalog.find("quantize", "power")


def test_a_distribution_seen_twice_is_one(install: Install) -> None:
    install({"quantize.power": "plug"}, {"plug": MODULE})
    install({"quantize.power": "plug"}, {"plug": MODULE}, name="Plug_in")  # spelled otherwise, further up the path
    assert [entry.label for entry in catalog.declared() if entry.distribution] == ["quantize.power"]
    assert catalog.broken() == ()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("entry_points.txt", b"[weightworks.methods]\nquantize.bad\n"),
        ("entry_points.txt", b"[weightworks.methods]\n\xff"),
    ],
)
def test_damaged_metadata_is_named_and_stops_nothing(install: Install, file: str, content: bytes) -> None:
    install({"quantize.power": "plug"}, {"plug": MODULE})
    info = install({}, {}, name="damaged")
    (info / file).write_bytes(content)
    (entry,) = catalog.broken()
    assert "damaged" in entry.label
    assert "its metadata cannot be read: " in (entry.broken or "")
    assert "quantize.power" in catalog.methods()


def test_what_a_plugin_prints_stays_out_of_stdout(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install({"quantize.power": "plug"}, {"plug": MODULE + "print('hello')\n"})
    tell(None, json=True)
    printed = capsys.readouterr()
    assert "quantize.power" in [row["method"] for row in json.loads(printed.out)["methods"]]
    assert printed.err == "hello\n"


def test_the_listing_as_json_names_what_is_broken(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install({"quantize.power": "plug", "quantize.bad": "plug_bad"}, {"plug": MODULE})
    tell(None, json=True)
    listed = json.loads(capsys.readouterr().out)
    assert {"method": "quantize.power", "summary": catalog.find("quantize", "power").summary,
            "distribution": "plug-in 1.0"} in listed["methods"]  # fmt: skip
    reason = "ModuleNotFoundError: No module named 'plug_bad'"
    assert listed["broken"] == [
        {"method": "quantize.bad", "summary": "", "distribution": "plug-in 1.0", "broken": reason}
    ]
    with pytest.raises(WeightworksError, match=re.escape(reason)):
        tell("bad", json=False)
    with pytest.raises(UsageError, match=r"unknown method 'powr' \(did you mean 'power'\?\)"):
        tell("powr", json=False)
    tell("quantize.power", json=False)
    assert "plug-in: plug-in 1.0, plug\n" in capsys.readouterr().err


def test_reserved_names_are_those_of_commands_and_settings() -> None:
    commands = [function for name, function in compress_app.COMMANDS.items() if name in catalog.SHELVES]
    parameters = {name for function in commands for name in inspect.signature(function).parameters} - {"values"}
    assert parameters
    assert (parameters | set(Settings.model_fields)) - set(catalog.RESERVED) == set(), "add these to catalog.RESERVED"


# The contract finds what is wrong with a method.


WRONG = {
    "can_be_used": (changed("class Method:", "class Solver:"), "quantize.wrong cannot be used: WeightworksError: quantize"),
    "says_what_it_is": (MODULE.partition("\n")[2], "quantize.wrong: plug has no docstring"),
    "help_stays_quick": (changed("import torch\n", "import torch\nfrom torch import nn\n"), "importing it loads .*torch"),
    "options_say_what_they_mean": (changed(', description="power of', ', title="power of'), "'power' has no description"),
    "options_round_trip": (changed("gt=0, le=8", "exclude=True"), "resolved options are .* the fields are .*'power'"),
    "wrong_values_are_refused": (
        changed("(IntegerOptions):", "(IntegerOptions, strict=False):"),
        "option '.*' takes '1', which its type or bounds exclude",
    ),
    "has_one_shape": (
        changed("    def scheme", "    watch = solve = None\n\n    def scheme"),
        "Method has `apply`, and `watch` and `solve`",
    ),
    "defaults_run": (
        changed('"relative_weight_error": float(error)}', '}, ["too steep"]'),
        "fell back with its defaults: .*: too steep",
    ),
    "same_seed_same_bytes": (
        changed("scale, zero = grid.fit(groups)", "scale, zero = grid.fit(groups + 0.01 * torch.rand(()))"),
        "a second run of equal seed made other bytes: .*model.safetensors",
    ),
    "remembers_nothing": (
        changed("scale, zero = grid.fit(groups)", "self.seen = getattr(self, 'seen', 0) + 0.1; scale, zero = grid.fit(groups + self.seen)"),
        "the result for a weight changed after another weight was done",
    ),
    "values_are_finite": (
        changed("scale.to(target.scale_dtype)", "-scale.to(target.scale_dtype)"),
        r"is \d+% off, which is no better than leaving it out",
    ),
    "report_is_complete": (changed('{"relative_weight_error": float(error)}', "{}"), "no figure of the error; put `rel"),
}  # fmt: skip


@pytest.mark.parametrize("clause", WRONG)
def test_the_contract_finds_what_is_wrong(install: Install, tmp_path: Path, clause: str) -> None:
    source, sentence = WRONG[clause]
    install({"quantize.wrong": "plug"}, {"plug": source})
    (check,) = [check for check in conformance("quantize.wrong") if check.__name__ == clause]
    with pytest.raises(AssertionError, match=sentence):
        check(tmp_path)


@pytest.mark.parametrize("label", ["power", "quantise.power", ""])
def test_the_contract_of_no_kind(label: str) -> None:
    with pytest.raises(UsageError, match=r"is not KIND\.NAME: unknown kind"):
        conformance(label)


def test_the_contract_of_no_method(tmp_path: Path) -> None:
    for check in conformance("quantize.no_such"):
        with pytest.raises(
            AssertionError, match=r"quantize\.no_such is not found: UsageError: unknown method 'no_such'"
        ):
            check(tmp_path)
