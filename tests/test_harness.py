"""lm-eval in process: its own figures, paired differences, tasks of one's own from any folder, and no noise.

The tasks are made on the spot; the shared one is asked too where it is at hand.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands

from weightworks.errors import CalibrationError, MethodError, ResourceError, UsageError
from weightworks.plan.evaluate import evaluate
from weightworks.score.harness import Method, Options, mean_error, spread
from weightworks.stage.protocols import Subject
from weightworks.stage.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = Settings(device="cpu")
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""
ROLLING = """
task: reading
dataset_path: json
dataset_kwargs: {data_files: {test: data/*.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[label]}}"
process_results: !function helpers.lengths
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: words, aggregation: mean, higher_is_better: true}
"""
HELPERS = """
from more import words


def lengths(doc, results):
    text = doc["question"] + doc["choices"][doc["label"]]
    return {"word_perplexity": (results[0], words(text)), "words": words(text)}
"""
WRITING = """
task: writing
include: base.yaml
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - {name: first, filter: [{function: take_first}]}
"""
GROUP = """
group: both
task: [quiz, quiz_again]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
"""
BASE = """
dataset_path: json
dataset_kwargs: {data_files: {test: data/quiz.jsonl}}
test_split: test
"""
WORDS = ("the of and to in that his was it he with as her for had at not by she on is you").split()  # noqa: SIM905


def questions(count: int, seed: int) -> str:
    """Questions as JSON lines; the right answer is an English word, the others are not."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        choices = [" " + "".join(draw.choices("qxzjkv", k=4)) for _ in range(2)]
        choices.insert(label := draw.randrange(3), " " + draw.choice(WORDS))
        choices[draw.randrange(3)] = " " + draw.choice(WORDS)
        rows.append({"question": " ".join(draw.choices(WORDS, k=6)), "choices": choices, "label": label})
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks: multiple choice twice and as a group, rolling likelihood with functions, generation."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data").mkdir()
    (folder / "data" / "quiz.jsonl").write_text(questions(24, 0))
    (folder / "data" / "again.jsonl").write_text(questions(8, 1))
    (folder / "quiz.yaml").write_text(CHOICE.format(name="quiz", data="data/quiz.jsonl"))
    (folder / "again.yaml").write_text(CHOICE.format(name="quiz_again", data="data/again.jsonl"))
    (folder / "both.yaml").write_text(GROUP)
    (folder / "reading.yaml").write_text(ROLLING)
    (folder / "helpers.py").write_text("import sys\nsys.path.insert(0, __file__.rpartition('/')[0])\n" + HELPERS)
    (folder / "more.py").write_text("def words(text):\n    return len(text.split())\n")
    (folder / "base.yaml").write_text(BASE)
    (folder / "writing.yaml").write_text(WRITING)
    return folder


def asked(models: Sequence[str | Path], tasks: Path, *names: str, settings: Settings = CPU, **options: Any) -> Any:
    """The result of ``names`` for models, the first of which is the baseline."""
    method = Method(Options(tasks=list(names), include_path=str(tasks), **options))
    subjects = [Subject(f"m{number}", str(model)) for number, model in enumerate(models)]
    return method.score(subjects, "m0", settings, lambda line: None)


@pytest.fixture(scope="module")
def scored(tiny_llama: Path, quantized: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All tasks, for a model, the model quantized, and the model again; asked from another folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        return asked([tiny_llama, quantized, tiny_llama], tasks, "both", "reading", "writing")


@pytest.mark.filterwarnings("ignore")
def test_equals_lm_eval_called_by_hand(
    scored: dict[str, Any], tiny_llama: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tasks)  # where it looks for data
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    model = HFLM(pretrained=str(tiny_llama), dtype="float32", batch_size=3, device="cpu")
    names = ["both", "reading"]
    theirs = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=1)["results"]
    ours = scored["models"][0]
    for task in ("quiz", "quiz_again"):
        for metric in ("acc", "acc_norm"):
            mine = ours["by_task"][task][metric]
            assert mine["value"] == theirs[task][f"{metric},none"]
            assert mine["error"] == pytest.approx(theirs[task][f"{metric}_stderr,none"])
    assert 0.2 < ours["by_task"]["quiz"]["acc"]["value"] < 1  # a task on which something can be told
    both = ours["metrics"]["both acc"]
    assert both["value"] == pytest.approx(theirs["both"]["acc,none"])
    assert both["error"] == pytest.approx(theirs["both"]["acc_stderr,none"])
    perplexity = ours["metrics"]["reading word_perplexity"]
    assert perplexity["value"] == pytest.approx(theirs["reading"]["word_perplexity,none"], rel=1e-4)
    assert perplexity["error"] > 0  # lm-eval knows none


def test_the_same_model_again_changes_nothing(scored: dict[str, Any]) -> None:
    first, _, again = scored["models"]
    assert first["content"] == again["content"] != scored["models"][1]["content"]
    for name, found in again["metrics"].items():
        assert found["value"] == first["metrics"][name]["value"]
        assert (found["change"], found["change_error"]) == (0.0, 0.0)


def test_differences_are_paired(scored: dict[str, Any], tiny_llama: Path, quantized: Path, tasks: Path) -> None:
    """An error much below that of unpaired values, and equal to that of the differences by question."""
    base, packed, _ = scored["models"]
    found = packed["metrics"]["reading word_perplexity"]
    assert found["change"] == pytest.approx(found["value"] - base["metrics"]["reading word_perplexity"]["value"])
    assert 0 < found["change_error"] < 0.5 * found["error"]
    both = packed["metrics"]["both acc"]
    parts = [packed["by_task"][task]["acc"] for task in ("quiz", "quiz_again")]
    assert both["change"] == pytest.approx((24 * parts[0]["change"] + 8 * parts[1]["change"]) / 32)
    errors = [part["change_error"] for part in parts]
    assert both["change_error"] == pytest.approx(math.hypot(24 * errors[0], 8 * errors[1]) / 32)


def test_result_says_what_was_asked(scored: dict[str, Any]) -> None:
    assert list(scored["metrics"]) == [
        "both acc", "reading word_perplexity", "reading words", "writing exact_match (first)",
    ]  # fmt: skip
    assert scored["metrics"]["both acc"] == {"better": "higher", "change": "absolute"}
    assert scored["metrics"]["reading word_perplexity"]["better"] == "lower"
    assert scored["tasks"]["quiz"] == {"samples": 24, "num_fewshot": 0, "version": 2.0}
    assert scored["tasks"]["reading"]["samples"] == 32  # data/*.jsonl
    assert {row["loader"] for row in scored["models"]} == {"transformers"}
    assert scored["max_length"] == 512
    assert json.loads(json.dumps(scored, allow_nan=False)) == scored


def test_examples_in_prompts_and_their_limit(tiny_llama: Path, tasks: Path) -> None:
    def ask(**options: Any) -> Any:
        found = asked([tiny_llama], tasks, "quiz", limit=6, **options)
        assert found["tasks"]["quiz"]["samples"] == 6
        return found["tasks"]["quiz"]["num_fewshot"], found["models"][0]["metrics"]

    zero, three = ask(), ask(num_fewshot=3)
    assert (zero[0], three[0]) == (0, 3)
    assert three == ask(num_fewshot=3)  # the same examples every time


@pytest.mark.parametrize("layout", ["asymmetric", "gptq"])
def test_packed_folders_that_transformers_does_not_take_as_they_are(
    compress: Commands, tiny_llama: Path, tasks: Path, tmp_path: Path, layout: str
) -> None:
    words = ("--asym",) if layout == "asymmetric" else ("--format", "gptq")
    assert compress("quantize", tiny_llama, "--method", "rtn", "--bits", "8", *words, "-o", tmp_path / "out").code == 0
    found = asked([tiny_llama, tmp_path / "out"], tasks, "reading", limit=8, batch_size=4)
    loader = found["models"][1]["loader"]
    assert (
        loader == "transformers, dequantize=True"
        if layout == "asymmetric"
        else "transformers" in loader or "own" in loader
    )
    change = found["models"][1]["metrics"]["reading word_perplexity"]
    assert 0 < abs(change["change"]) < 0.02 * change["value"]


def test_sixteen_bits(tiny_llama: Path, quantized: Path, tasks: Path) -> None:
    found = asked([tiny_llama, quantized], tasks, "reading", limit=4, dtype="bfloat16")["models"]
    values = [row["metrics"]["reading word_perplexity"]["value"] for row in found]
    assert values[1] == pytest.approx(values[0], rel=0.2)


# What is refused, before any model loads.


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("weightworks.score._stock.load", load)


@pytest.mark.usefixtures("no_model")
def test_unknown_tasks_are_named_with_near_ones(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "quiz.yaml").write_text(CHOICE.format(name="quiz", data="data.jsonl"))
    (tmp_path / "other.yaml").write_text("task: [unclosed\n")
    with pytest.raises(UsageError) as caught:
        asked([tiny_llama], tmp_path, "quizz", "hellaswagg", "quiz")
    text = str(caught.value)
    assert "unknown task 'quizz' (near names: quiz" in text
    assert "unknown task 'hellaswagg' (near names: hellaswag" in text
    assert f"{tmp_path} defines quiz; {tmp_path}/other.yaml cannot be read (not valid YAML" in text


@pytest.mark.usefixtures("no_model")
def test_data_is_looked_for_beside_the_task_alone(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "quiz.yaml").write_text(CHOICE.format(name="quiz", data="questions.jsonl"))
    (tmp_path / "questions.jsonl").write_text(questions(4, 0))
    monkeypatch.chdir(tmp_path)  # where it is not meant
    with pytest.raises(CalibrationError, match=r"task 'quiz' .*: its data file 'questions.jsonl' is not in .*/mine$"):
        asked([tiny_llama], folder, "quiz")
    with pytest.raises(CalibrationError, match=r"nowhere: no such folder"):
        asked([tiny_llama], tmp_path / "nowhere", "quiz")


@pytest.mark.usefixtures("no_model")
def test_a_broken_task_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{not json\n")
    (tmp_path / "quiz.yaml").write_text(CHOICE.format(name="quiz", data="data.jsonl"))
    with pytest.raises(CalibrationError, match=r"^task 'quiz' cannot be loaded \("):
        asked([tiny_llama], tmp_path, "quiz")


@pytest.mark.usefixtures("no_model")
def test_models_larger_than_memory_are_refused(tiny_llama: Path, quantized: Path, tasks: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        asked([tiny_llama, quantized], tasks, "quiz", settings=Settings(device="cpu", max_memory="15MB"))
    text = str(caught.value)
    assert "m0 (0.021 GB), m1 (0.0245 GB) in float32 does not fit in 0.015 GB" in text
    assert "bfloat16" in caught.value.hint


@pytest.mark.usefixtures("no_model")
def test_what_lm_eval_would_refuse_late_is_refused_early(tiny_llama: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Duplicate task 'quiz': found in both 'both' and 'quiz'"):
        asked([tiny_llama], tasks, "both", "quiz")
    (tmp_path / "data.jsonl").write_text(questions(4, 0))
    (tmp_path / "quiz.yaml").write_text(CHOICE.format(name="quiz", data="data.jsonl") + "unsafe_code: true\n")
    with pytest.raises(UsageError, match="task 'quiz' runs code that the model writes"):
        asked([tiny_llama], tmp_path, "quiz")


def test_models_asked_different_questions_are_not_compared(tiny_llama: Path, tasks: Path) -> None:
    from weightworks.score.harness import _task

    sample = dict.fromkeys(("doc_id", "filter", "doc_hash", "prompt_hash", "target_hash"), 0)
    results = [{"samples": {"quiz": [{**sample, "prompt_hash": number}]}} for number in (1, 2)]
    with pytest.raises(MethodError, match="task 'quiz' asked two models different questions"):
        _task("quiz", *results, None, same=False)


# Cache keys.


def test_files_are_those_the_result_depends_on(tasks: Path) -> None:
    def files(*names: str) -> set[str]:
        found = Method(Options(tasks=list(names), include_path=str(tasks))).files()
        assert [path for path in found if not path.is_file()] == []
        return {path.relative_to(tasks).as_posix() if path.is_relative_to(tasks) else path.name for path in found}

    assert files("quiz") == {"METADATA", "quiz.yaml", "data/quiz.jsonl"}  # METADATA says which lm-eval
    assert files("both") == files("quiz") | {"both.yaml", "again.yaml", "data/again.jsonl"}
    assert files("reading") == {
        "METADATA", "reading.yaml", "helpers.py", "more.py", "data/quiz.jsonl", "data/again.jsonl",
    }  # fmt: skip
    assert files("writing") == {"METADATA", "writing.yaml", "base.yaml", "data/quiz.jsonl"}
    assert files("hellaswag") == {"METADATA"}


def test_changed_data_is_read_anew(tiny_llama: Path, tmp_path: Path) -> None:
    """Though path and time are those of before, by which the hub's cache would know it."""
    import os

    (tmp_path / "quiz.yaml").write_text(CHOICE.format(name="quiz", data="data.jsonl"))
    counts = []
    for count in (3, 5):
        (tmp_path / "data.jsonl").write_text(questions(count, 0))
        os.utime(tmp_path / "data.jsonl", (1, 1))
        counts.append(asked([tiny_llama], tmp_path, "quiz")["tasks"]["quiz"]["samples"])
    assert counts == [3, 5]


# Nothing else is disturbed.


def test_no_noise_and_global_state_is_put_back(
    tiny_llama: Path, tasks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import logging

    import tqdm

    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.get_rng_state(), tqdm.tqdm.__init__, list(logging.getLogger("lm_eval").handlers)
    asked([tiny_llama], tasks, "reading", "quiz", limit=2)
    after = random.getstate(), torch.get_rng_state(), tqdm.tqdm.__init__, list(logging.getLogger("lm_eval").handlers)
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]
    assert capfd.readouterr() == ("", "")


# Errors of metrics.


def test_error_of_a_mean() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert mean_error(values) == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert mean_error([1.0]) is None
    assert spread(lambda kept: statistics.fmean(values[i] for i in kept), 5) == pytest.approx(mean_error(values))
    assert spread(lambda kept: 0.0, 1) is None


def test_error_of_other_statistics_is_near_that_of_many_draws() -> None:
    draw = random.Random(0)

    def statistic(values: Sequence[float]) -> float:
        return math.exp(statistics.fmean(values))

    samples = [[draw.gauss(0, 1) for _ in range(500)] for _ in range(300)]
    found = [spread(lambda kept, of=part: statistic([of[i] for i in kept]), 500) for part in samples[:40]]  # type: ignore[misc]
    assert statistics.fmean(value for value in found if value) == pytest.approx(
        statistics.stdev(map(statistic, samples)), rel=0.15
    )


# The command, and all scores at once.


def test_evaluate_with_everything(
    compress: Commands, tiny_llama: Path, quantized: Path, tasks: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text())
    words = ["evaluate", tiny_llama, quantized, "--perplexity", text, "--divergence", text, "--seq-len", "64"]
    words += ["--max-tokens", "640", "--tasks", "quiz,reading", "--include_path", tasks, "--limit", "8", "--json"]
    run = compress(*words)
    assert run.code == 0, run.err
    head, base, packed = run.err.splitlines()[-3:]
    assert head.split("  ")[-1].strip() == "reading words"
    assert all(name in head for name in ("text.txt", "against baseline", "kl", "top1", "quiz acc", "quiz acc_norm"))
    assert "±" not in base
    assert packed.count("±") == 7
    report = run.json
    assert [result["method"] for result in report["scores"]] == [
        "score.perplexity",
        "score.divergence",
        "score.harness",
    ]
    row = report["models"][1]
    assert list(row["metrics"]) == [name for result in report["scores"] for name in result["metrics"]]
    assert row["change"] == row["metrics"]["perplexity"]["change"]
    assert len({result["models"][1]["content"] for result in report["scores"]}) == 1


def test_evaluate_refuses_all_wrong_options_at_once(tiny_llama: Path) -> None:
    with pytest.raises(UsageError) as caught:
        evaluate([str(tiny_llama)], ["text"], tasks=["quiz"], seq_len=1, batch_size=0, dtype="int8")
    assert str(caught.value).count("option '") == 3
    with pytest.raises(UsageError, match="nothing to score"):
        evaluate([str(tiny_llama)])


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ((), 2, "nothing to score"),
        (("--tasks", "quiz", "--dtype", "int8"), 2, "option 'dtype' = 'int8'"),
        (("--tasks", "quiz", "--limit", "0"), 2, "Invalid value for '--limit'"),
        (("--tasks", "quiz", "--device", "gpu"), 2, "--device gpu: unknown device"),
        (("--tasks", "quiz", "--max-memory", "1MB"), 1, "does not fit in 0.001 GB"),
    ],
)
def test_evaluate_errors(
    compress: Commands, tiny_llama: Path, tasks: Path, words: tuple[str, ...], code: int, text: str
) -> None:
    run = compress("evaluate", tiny_llama, "--include-path", tasks, *words)
    assert (run.code, run.out) == (code, "")
    assert text in run.err


def test_the_shared_task(tiny_llama: Path, shared: Path) -> None:
    """Its data beside it, and a figure by others: lm-eval by hand has 0.35 on the first 20 questions."""
    found = asked([tiny_llama], shared / "tasks", "local_cloze", limit=20)
    assert found["models"][0]["metrics"]["local_cloze acc"]["value"] == 0.35
