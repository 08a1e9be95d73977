"""Calibration windows: seeded pieces of token text from a file, a data set, the built-in sample, or the model itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from weightworks.errors import CalibrationError
from weightworks.store.sources import is_text_file

TEXT_FIELDS = ("text", "content", "prompt", "instruction", "question")
ANSWER_FIELDS = ("input", "context", "response", "completion", "output", "answer")
CHUNK_CHARACTERS = 1 << 16  # text is tokenised in chunks of about this size, so a huge file is never held twice
BATCH_ROWS = 64  # of parquet unpacked at a time
MOST_CHARACTERS = 4_000_000_000  # of its rows


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


@dataclass(frozen=True)
class Calibration:
    """Token windows and where they came from.

    tokens: int64 [windows, seq], no special tokens, no padding, windows do not overlap. ``source`` describes the text;
    ``digest`` is the sha256 of the tokens. ``held_out`` [some, seq] are windows that only decide whether a step helped.
    """

    tokens: torch.Tensor
    source: str
    requested: int
    held_out: torch.Tensor | None = None

    @property
    def digest(self) -> str:
        digest = hashlib.sha256(self.tokens.numpy().tobytes())
        if self.held_out is not None:
            digest.update(self.held_out.numpy().tobytes())
        return digest.hexdigest()

    def told(self, asked: int) -> str:
        """The windows in words, ``asked`` being the tokens a window that were asked for."""
        windows, length = self.tokens.shape
        text = f"{windows} windows of {length} tokens from {self.source}"
        if windows < self.requested:
            text += f" (asked for {self.requested}, the text has no more)"
        if self.held_out is not None:
            text += f" and {len(self.held_out)} held out"
        return text + (f" (asked for {asked} tokens, the model takes no more)" if length < asked else "")

    def facts(self) -> dict[str, Any]:
        """What the report says of the calibration."""
        windows, seq = self.tokens.shape
        return {
            "source": self.source,
            "windows": windows,
            "windows_requested": self.requested,
            **({} if self.held_out is None else {"windows_held_out": len(self.held_out)}),
            "seq_len": seq,
            "tokens": windows * seq,
            "digest": self.digest,
        }


class _Fast:
    """A ``tokenizer.json``, without the import of transformers."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        self.path = path
        with self._saying():
            self.backend = Backend.from_file(str(path))

    @contextmanager
    def _saying(self) -> Iterator[None]:
        """The library raises bare exceptions, and where it panics even those are none of Python's."""
        try:
            yield
        except BaseException as error:
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CalibrationError(
                f"{self.path}: the tokenizer cannot be used ({reason})", hint="fetch tokenizer.json again"
            ) from None

    def encode(self, text: str) -> list[int]:
        with self._saying():
            try:
                return self.backend.encode(text, add_special_tokens=False).ids
            except TypeError:  # half of a pair of surrogates, which JSON can spell: it stands for no character
                whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                return self.backend.encode(whole, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        with self._saying():
            return self.backend.decode(tokens)


class _Slow:
    """Any other tokenizer transformers can load."""

    def __init__(self, root: Path, trust_remote_code: bool) -> None:
        from transformers import AutoTokenizer

        self.backend = AutoTokenizer.from_pretrained(root, trust_remote_code=trust_remote_code)

    def encode(self, text: str) -> list[int]:
        return self.backend(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, tokens: list[int]) -> str:
        return self.backend.decode(tokens, skip_special_tokens=True)


def load_tokenizer(root: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a checkpoint folder; a folder without one is an error that says so."""
    if (root / "tokenizer.json").is_file():
        return _Fast(root / "tokenizer.json")
    try:
        return _Slow(root, trust_remote_code)
    except Exception as error:  # whatever transformers raises, the user's problem is the same
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CalibrationError(
            f"{root}: no tokenizer could be loaded ({reason})", hint="put tokenizer.json into the checkpoint folder"
        ) from error


def load_windows(
    dataset: str,
    tokenizer_root: Path,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    held_out: int = 0,
    trust_remote_code: bool = False,
) -> Calibration:
    """``num_samples`` windows of ``seq_len`` tokens from ``dataset``, and ``held_out`` more that are kept apart.

    A text long enough is cut into windows from end to end and a seeded choice of them is taken, in text order; a shorter
    one gives all the windows it has. Raises :class:`CalibrationError` for unreadable, empty or too short text.
    """
    tokenizer = load_tokenizer(tokenizer_root, trust_remote_code=trust_remote_code)
    if dataset == "builtin":
        from weightworks.stream.builtin import calibration_text, description

        text = calibration_text((num_samples + held_out) * seq_len)
        tokens = encode_all(tokenizer, [text])
        return choose(tokens, description(), num_samples, seq_len, seed, held_out)
    tokens = encode_all(tokenizer, read_texts(dataset))
    if tokens.numel() == 0:
        raise CalibrationError(
            f"{dataset}: the text is empty", hint="give a text with words in it, or --dataset builtin"
        )
    return choose(tokens, describe(dataset), num_samples, seq_len, seed, held_out)


def choose(tokens: torch.Tensor, source: str, count: int, seq_len: int, seed: int, held_out: int = 0) -> Calibration:
    """A seeded choice of ``count`` non-overlapping windows of a token stream int64 [n], and of others to hold out.

    The first are the same whether or not others are held out, as long as the text has enough.
    """
    available = tokens.numel() // seq_len
    if available == 0:
        raise CalibrationError(
            f"{source}: {tokens.numel()} tokens is shorter than one window of {seq_len}",
            hint="give a longer text, or a smaller --seq-len",
        )
    windows = tokens[: available * seq_len].view(available, seq_len)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[: count + held_out]
    return split(windows[order], source, count, held_out, in_order=order)


def split(
    windows: torch.Tensor, source: str, count: int, held_out: int, in_order: torch.Tensor | None = None
) -> Calibration:
    """The first ``count`` of ``windows`` [n, seq] to calibrate with, the others held out, both in the order of their places
    ``in_order``; where there are fewer than asked for, a share of them.

    Raises :class:`CalibrationError` if none would be left.
    """
    if held_out and len(windows) < count + held_out:
        if len(windows) < 2:
            raise CalibrationError(
                f"{source}: has a single window of {windows.shape[1]} tokens, so none can be held out",
                hint="give a longer text, or a smaller --seq-len",
            )
        held_out = max(1, len(windows) * held_out // (count + held_out))
    first = len(windows) - held_out
    order = torch.arange(len(windows)) if in_order is None else in_order
    used, held = (part.sort().indices for part in (order[:first], order[first:]))
    return Calibration(windows[:first][used], source, count, windows[first:][held] if held_out else None)


def encode_all(tokenizer: Tokenizer, texts: Iterable[str]) -> torch.Tensor:
    """All texts as one token stream int64 [n], tokenised in chunks that end at line ends."""
    pieces = [torch.tensor(tokenizer.encode(chunk), dtype=torch.int64) for text in texts for chunk in _chunks(text)]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def _chunks(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = text.find("\n", start + CHUNK_CHARACTERS) + 1 or len(text)
        yield text[start:stop]
        start = stop


def read_texts(dataset: str) -> list[str]:
    """The texts of a .txt, .jsonl, .parquet file or a hub data set."""
    path = Path(dataset).expanduser()
    if is_text_file(dataset) or path.exists():
        if not path.is_file():
            raise CalibrationError(
                f"{dataset}: no such file", hint="give .txt, .jsonl or .parquet, or 'builtin' or 'self'"
            )
        try:
            return _read_file(path)
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{dataset}: cannot be read as UTF-8 text: {error}") from None
    return [_row_text(row, dataset) for row in hub_rows(dataset)]


def _read_file(path: Path) -> list[str]:
    kind = path.suffix.lower()
    if kind == ".jsonl":
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    rows.append(_row_text(json.loads(line), f"{path}, line {number}"))
                except (ValueError, RecursionError) as error:
                    raise CalibrationError(f"{path}, line {number}: not valid JSON ({error})") from None
        return rows
    if kind == ".parquet":
        return [_row_text(row, str(path)) for row in parquet_rows(path)]
    return [path.read_text(encoding="utf-8")]


def parquet_rows(path: Path) -> list[Any]:
    """All rows of a parquet file, up to ``MOST_CHARACTERS``: a few kilobytes can stand for any number of equal rows."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CalibrationError(f"{path}: reading parquet needs pyarrow", hint="pip install pyarrow") from None
    try:
        rows: list[Any] = []
        taken = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                rows += (more := batch.to_pylist())
                taken += sum(len(str(row)) for row in more)
                if taken > MOST_CHARACTERS:
                    raise CalibrationError(
                        f"{path}: holds more than {MOST_CHARACTERS:,} characters of rows once unpacked",
                        hint="give a part of it",
                    )
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as parquet: {error}") from None
    return rows


def _row_text(row: Any, where: str) -> str:
    """The text of one row: a text field, a chat, or an instruction with its answer."""
    if isinstance(row, str):
        return row + "\n"
    if isinstance(row, dict):
        chat = row.get("messages") or row.get("conversations")
        if isinstance(chat, list):
            turns = [turn if isinstance(turn, dict) else {"content": turn} for turn in chat]
            return "\n".join(str(turn.get("content", turn.get("value", ""))) for turn in turns) + "\n\n"
        parts = [str(row[key]) for key in (*TEXT_FIELDS, *ANSWER_FIELDS) if row.get(key)]
        if parts:
            return "\n".join(parts) + "\n\n"
        keys = ", ".join(map(str, row))
        raise CalibrationError(
            f"{where}: no text in fields {keys}", hint=f"expected one of: {', '.join(TEXT_FIELDS)}, messages"
        )
    raise CalibrationError(f"{where}: a row is {type(row).__name__}, a JSON object or string is expected")


def hub_rows(dataset: str) -> Iterator[Any]:
    """The first rows of a data set on the hub."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"{dataset}: no such file; reading a hub data set of that name needs datasets", hint="pip install datasets"
        ) from None
    name, _, revision = dataset.partition("@")
    try:
        rows = load_dataset(name, split="train", streaming=True, revision=revision or None)
        return iter([row for row, _ in zip(rows, range(20_000), strict=False)])
    except Exception as error:  # datasets raises many kinds; all mean that this text is not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CalibrationError(
            f"{dataset}: no such file, and no data set of that name could be loaded ({type(error).__name__}: {reason})",
            hint="give a .txt, .jsonl or .parquet file, or 'builtin' or 'self'",
        ) from None


def describe(dataset: str) -> str:
    """What the report calls a data set: a file by its name."""
    path = Path(dataset).expanduser()
    return path.name if path.is_file() else dataset
