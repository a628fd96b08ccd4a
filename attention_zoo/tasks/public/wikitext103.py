"""WikiText-103: 28,595 good articles of the English Wikipedia as published, by bytes or by words.

    level: bytes   ids ' = Robert Boulter =', targets '= Robert Boulter = '
    level: words   ids '= Robert Boulter = <eos>', targets 'Robert Boulter = <eos> <eos>'

Source: Merity et al. 2017, "Pointer Sentinel Mixture Models", §4: three files, wiki.train, wiki.valid and wiki.test,
with the ending .tokens (words seen less than three times are <unk>) or .raw. Words are what white space parts; each
line ends with <eos>. The vocabulary is built from the training file: all its words, the most frequent first, 267,735 of
them as published.

The main metric is bits per byte (chance 8) by bytes, perplexity (chance: the vocabulary) by words. Bytes are memory
maps; words are held as one number each (413 MB), made line by line at the first use.

`compress` shortens each article, by bytes alone: its budget is bytes, and pieces of words would be unknown ones. An
article begins with a line that is its title between single signs of equality. What is left of all
is one array. Other bytes are then predicted than the published ones.

Deviations: without `compress` articles are not told apart, a split is one text (as is usual). In .raw files a word that
training does not hold is <unk>, too, which the published figures have no equal of: compare words on .tokens.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from attention_zoo.options import Positive, checked
from attention_zoo.options import Text as Words
from attention_zoo.rules import OneOf
from attention_zoo.tasks.public.source import Source
from attention_zoo.tasks.public.streams import SPLITS, Part, Streams, mapped
from attention_zoo.tasks.public.sums import described
from attention_zoo.tasks.shortening import chosen, packed, told
from attention_zoo.tasks.task import digest

FILES = dict(zip(SPLITS, ("train", "valid", "test")))
TITLE = re.compile(rb"^ = (?!= )[^\n]*(?<! =) =[ \r]*$", re.MULTILINE)
LINE_END, UNKNOWN = "<eos>", "<unk>"
SOURCE = Source(
    "wikitext103",
    "a folder with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, or the same with .raw",
    "https://wikitext.smerity.com/wikitext-103-v1.zip (words) or wikitext-103-raw-v1.zip (bytes)",
)


class WikiText103(Streams):
    """Language modelling of WikiText-103.

    Args:
        path: the folder; hf:NAME for a copy on the hub. Where it has both endings, .raw is read by bytes, .tokens by
            words.
        level: bytes | words.
        span: segments that a row follows the text.
        evaluation_rows: spans of each evaluation set, spread evenly; null takes all.
        compress: how each article is shortened, {method, budget}, by bytes; see `tasks/compress.py`. null leaves it
            whole.

    Raises:
        ValueError: for a missing file, or by words one that is no UTF-8.
    """

    name = "wikitext103"

    @checked
    def __init__(
        self,
        *,
        path: Words | None = None,
        level: Annotated[str, OneOf("bytes", "words")] = "bytes",
        span: Positive = 4,
        evaluation_rows: Positive | None = 16,
        compress: Mapping[str, Any] | None = None,
    ):
        self.compression = chosen(compress)
        if compress is not None and level != "bytes":
            raise ValueError(f"task.compress shortens bytes and must be null by words, got {dict(compress)}")
        root = SOURCE.place(path)
        self.level, self.span, self.evaluation_rows = level, span, evaluation_rows
        endings = (".raw", ".tokens") if level == "bytes" else (".tokens", ".raw")
        self.ending = next((e for e in endings if (root / f"wiki.train{e}").is_file()), endings[0])
        self.files = {split: root / f"wiki.{name}{self.ending}" for split, name in FILES.items()}
        for file in self.files.values():
            if not file.is_file():
                raise SOURCE.missing(file)
        if level == "words":
            self.metric = "perplexity"  # type: ignore[misc]
            self.vocab = len(self.numbers)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The id of each word."""
        return vocabulary(*_state(self.files["train"]))

    @cached_property
    def parts(self) -> dict[str, Part]:
        found = {}
        for split, file in self.files.items():
            if self.compression is not None:
                articles = np.split(mapped(file, SOURCE), self.articles[split][1:])
                found[split] = Part(*packed(articles, self.compression))
                continue
            data = mapped(file, SOURCE) if self.level == "bytes" else self._encoded(file)
            found[split] = Part(data, np.array([len(data)]))
        return found

    @cached_property
    def articles(self) -> dict[str, np.ndarray]:
        """Where each article of a split begins; what stands before the first title is of its article."""
        found = {}
        for split, file in self.files.items():
            starts = [match.start() for match in TITLE.finditer(mapped(file, SOURCE))]  # type: ignore[call-overload]
            found[split] = np.array([0, *starts[1:]], np.int64)
        return found

    def _encoded(self, file: Path) -> np.ndarray:
        unknown = self.numbers[UNKNOWN]
        ids = (self.numbers.get(word, unknown) for words in lines(file) for word in words)
        return np.fromiter(ids, np.int32)

    def describe(self, seq_len: int) -> dict[str, Any]:
        found = described({file.name: file for file in self.files.values()}, SOURCE)
        sums = [entry["sha256"] for entry in found.values()]
        about = {"files": found, "level": self.level, "vocab": self.vocab}
        if self.compression is None:
            return {**about, "digest": digest([self.level, *sums])}
        sizes = [np.diff([*starts, self.files[split].stat().st_size]) for split, starts in self.articles.items()]
        done = told(self.compression, np.concatenate(sizes))
        return {**about, "compress": done, "digest": digest([self.level, *sums, *map(str, self.compression)])}

    def score(self, loss: float, accuracy: float) -> dict[str, float]:
        if self.level == "bytes":
            return super().score(loss, accuracy)
        return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss, "accuracy": accuracy}


def lines(file: Path) -> Iterator[list[str]]:
    """The words of each line, the end of the line as one of them."""
    try:
        with file.open("rb") as found:
            for number, line in enumerate(found, 1):
                try:
                    yield [*line.decode().split(), LINE_END]
                except UnicodeDecodeError as error:
                    got = line[error.start : error.start + 8]
                    raise SOURCE.wrong(file, "words must be UTF-8", got, f"line {number}") from None
    except OSError as error:
        raise SOURCE.unreadable(error) from None


def _state(file: Path) -> tuple[Path, int, int]:
    about = file.stat()
    return file, about.st_size, about.st_mtime_ns


@lru_cache(maxsize=2)
def vocabulary(file: Path, size: int, modified: int) -> dict[str, int]:
    """The id of each word of a file, the most frequent first; of equals the one that comes first."""
    counts: Counter[str] = Counter()
    for words in lines(file):
        counts.update(words)
    counts.setdefault(UNKNOWN, 0)  # for words of the other files
    return {word: number for number, (word, _) in enumerate(counts.most_common())}
