"""Tasks over documents: a text that every machine has, or your own, in three parts that do not repeat each other.

By default training, validation and test read the source of Python's standard library in place; a held-out domain is
the source of another installed package (torch, a dependency). Nothing is downloaded. Any other file, folder or archive
works (`path`). Files are sorted by relative path; which part one is in is a function of that path, so the split never
moves. Any bytes are text here; which folders are left out is said by `skip` and `hidden`.

The standard library differs between versions of Python. Results that are to be compared between machines name their
text by digest: `path` and `sha256`, which is checked and refused where it differs. An archive of source that stays the
same is on the package index, such as

    pip download --no-deps --no-binary :all: sympy==1.14.0     # then task.path=sympy-1.14.0.tar.gz task.suffix=.py
    task.sha256=d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517

Documents for evaluation that repeat training are left out (`repeats`); where that leaves nothing of a part, its share
is doubled. The pieces of a file that was cut are not compared.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from attention_zoo.options import Share, checked
from attention_zoo.options import Text as Words
from attention_zoo.tasks.compress import Kept, compressed, compression
from attention_zoo.tasks.corpus import (
    OWN_SKIPPED,
    SKIPPED,
    Corpus,
    File,
    check_digest,
    existing,
    join_files,
    read_files,
    split_files,
)
from attention_zoo.tasks.ngrams import count
from attention_zoo.tasks.repeats import known_share
from attention_zoo.tasks.task import Task, digest

Bytes = Annotated[int, Field(ge=1, le=2**62)]
Between = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False, description="a share between 0 and 1")]
Below = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, description="a share of at least 0 and below 1")]
Digest = Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$", description="a SHA-256 of 64 hexadecimal digits")]
SHARED = 8_000_000
"""Bytes that are read by default."""
NAMES = {"train": "training", "validation": "validation", "test": "test", "held_out": "the held-out set"}


class Documents(NamedTuple):
    """The files of each part.

    Fields:
        parts: "train", "validation", and "test" and "held_out" where there are such.
        dropped: sizes of the documents that repeat training too much.
        kept: bytes before and after compression.
    """

    parts: dict[str, list[File]]
    dropped: list[int]
    kept: Kept


class DocumentTask(Task):
    """Base of tasks over documents.

    Args:
        path: a file, folder or archive of your own text; None reads the source of Python's standard library.
        sha256: digest that the text must have, see `corpus.check_digest`; None takes any.
        suffix: ending of the files to take from a folder or archive; None takes all (the standard library: always
            ".py").
        skip: names of folders within `path` that are left out. None: of your own text what Python made there
            (`__pycache__`) and nothing else; of the standard library installed packages and tests, too (`SKIPPED`,
            which always holds for the held-out package).
        hidden: whether files and folders whose name begins with a dot are read.
        held_out: name of an installed package whose source is the held-out domain; None for none.
        max_bytes: about how much to read for training, validation and test together; None reads all.
        held_out_bytes: the same for the held-out domain.
        validation: share of the files (of the bytes, where there are fewer files than parts) kept for validation.
        test: the same for the test; 0 for none.
        duplicates: largest share of a document's 50-byte shingles that may stand in training, for it to be evaluated.
        compress: how each document is shortened once those that repeat training are gone, as a mapping
            {method, budget}; see `compress`. None leaves it whole.

    Raises:
        ValueError: for a missing path or package, naming it.
    """

    @checked
    def __init__(
        self,
        *,
        path: Words | None = None,
        sha256: Digest | None = None,
        suffix: Words | None = None,
        skip: Sequence[Words] | None = None,
        hidden: bool = False,
        held_out: Words | None = "torch",
        max_bytes: Bytes | None = SHARED,
        held_out_bytes: Bytes | None = 300_000,
        validation: Between = 0.05,
        test: Below = 0.1,
        duplicates: Share = 0.05,
        compress: Mapping[str, Any] | None = None,
    ):
        if validation + test >= 1:
            raise ValueError(f"validation and test must leave a share for training, got {validation} and {test}")
        self.suffix, self.hidden, self.sha256 = suffix, hidden, sha256
        if path is None:
            self.root, self.suffix = Path(sysconfig.get_path("stdlib")), ".py"
        else:
            self.root = existing(path)
        default = SKIPPED if path is None else OWN_SKIPPED
        self.skip = tuple(sorted(default if skip is None else skip))
        self.held_root = None if held_out is None else _package(held_out)
        self.source = path or "standard library"
        self.held_out, self.max_bytes, self.held_out_bytes = held_out, max_bytes, held_out_bytes
        self.validation, self.test, self.duplicates = validation, test, duplicates
        self.compression = None if compress is None else compression(**compress)

    @cached_property
    def documents(self) -> Documents:
        """The files of each part, read at the first use."""
        if self.sha256 is not None:
            check_digest(self.root, self.sha256, self.suffix, self.skip, self.hidden)
        files = read_files(self.root, self.suffix, self.max_bytes, self.skip, self.hidden)
        if not any(raw for _, raw in files):
            ending = f" ending in {self.suffix}" if self.suffix else ""
            raise ValueError(f"task.path={self.root} holds no non-empty file{ending}")
        parts, dropped = self._split(files)
        if self.held_root is not None:
            held = list(read_files(self.held_root, ".py", self.held_out_bytes, tuple(sorted(SKIPPED))))
            parts["held_out"], more = self._apart(held, parts["train"])
            dropped += more
            if held and not parts["held_out"]:
                raise ValueError(self._all_repeat("held_out"))
        total = sum(len(raw) for part in parts.values() for _, raw in part)
        if self.compression is None:
            return Documents(parts, dropped, Kept(total, total))
        parts = {name: compressed(part, self.compression)[0] for name, part in parts.items()}
        return Documents(parts, dropped, Kept(total, sum(len(raw) for part in parts.values() for _, raw in part)))

    def _split(self, files: Sequence[File]) -> tuple[dict[str, list[File]], list[int]]:
        """The parts, and the sizes of the documents that were dropped. A part left empty is drawn larger."""
        shares = {"validation": self.validation} | ({"test": self.test} if self.test else {})
        while True:
            train, *others = split_files(files, shares["validation"], shares.get("test", 0.0))
            parts = dict(zip(shares, others))
            if not train or not all(parts.values()):
                total = sum(len(raw) for _, raw in files)
                needed = ", ".join(NAMES[name] for name in ("train", *parts))
                raise ValueError(f"task.path={self.root} must hold bytes for each of {needed}, got {total}")
            if not {name for name, _ in train}.isdisjoint(name for part in parts.values() for name, _ in part):
                return {"train": train, **parts}, []  # pieces of the same files
            dropped: list[int] = []
            for name, part in parts.items():
                parts[name], more = self._apart(part, train)
                dropped += more
            empty = [name for name, part in parts.items() if not part]
            if not empty:
                return {"train": train, **parts}, dropped
            shares |= {name: 2 * shares[name] for name in empty}
            if sum(shares.values()) >= 1:
                raise ValueError(self._all_repeat(empty[0]))

    def _apart(self, files: Sequence[File], train: Sequence[File]) -> tuple[list[File], list[int]]:
        """The files that do not repeat training, and the sizes of those that do."""
        if self.duplicates == 1:
            return list(files), []
        known = known_share(tuple(files), tuple(train)) > self.duplicates
        return (
            [file for file, repeats in zip(files, known) if not repeats],
            [len(file[1]) for file, repeats in zip(files, known) if repeats],
        )

    def _all_repeat(self, part: str) -> str:
        return (
            f"task.duplicates must leave a document for {NAMES[part]}, got {self.duplicates}: each repeats training "
            f"more than that; give other text, or task.duplicates=1"
        )

    @cached_property
    def corpora(self) -> dict[str, Corpus]:
        """The bytes of each part."""
        return {name: join_files(part) for name, part in self.documents.parts.items()}

    def share(self) -> None:
        """See `Task`: which documents repeat training, and how often each string stands there.

        Of more text than by default it is each run's own: who starts runs would wait meanwhile.
        """
        if self.max_bytes is not None and self.max_bytes <= SHARED and self.compression is None:
            count(self.corpora["train"])

    @property
    def judged(self) -> str:
        """The part that a run's result is on."""
        return "test" if self.test else "validation"

    @property
    def shortened(self) -> str:
        """Why there may be less than was given, for errors."""
        return "" if self.compression is None else f" with task.compress.budget={self.compression.budget}"

    def describe(self, seq_len: int) -> dict[str, Any]:
        found: dict[str, Any] = {"source": self.source}
        for name, corpus in self.corpora.items():
            if name == "held_out":
                found[name] = self.held_out
            found |= {f"{name}_bytes": len(corpus.data), f"{name}_files": len(corpus.ends)}
        found |= {"dropped_bytes": sum(self.documents.dropped), "dropped_files": len(self.documents.dropped)}
        if self.compression is not None:
            found["kept_share"] = self.documents.kept.share
        if self.sha256 is not None:
            found["sha256"] = self.sha256.lower()
        return found | {"digest": digest([corpus.digest for corpus in self.corpora.values()])}


def _package(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ValueError, ImportError):  # a module that runs without a file
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"task.held_out must name an installed package that is a folder of source, got {name!r}")
    return Path(spec.submodule_search_locations[0])
