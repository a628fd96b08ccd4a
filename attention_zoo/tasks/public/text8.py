"""text8: 100,000,000 letters of the English Wikipedia, cleaned down to a to z and single spaces, one byte a token.

    ids       anarchism originated as a
    targets   narchism originated as a t

Source: Mahoney 2011, "About the test data" (the file and its size). Split, metric, memory and deviations are those of
`enwik8.py`; with 27 symbols, chance is 4.75 bits. The MD5 is that which independent copies of the file agree on.
"""

from __future__ import annotations

import string

import numpy as np

from attention_zoo.tasks.public.enwik8 import Enwik8
from attention_zoo.tasks.public.source import Source

LETTERS = np.zeros(256, bool)
LETTERS[list((string.ascii_lowercase + " ").encode())] = True
BLOCK = 2**24


class Text8(Enwik8):
    """Letter-level language modelling of text8; arguments as of `Enwik8`.

    Raises:
        ValueError: as `Enwik8`, and in `check` for a byte that is neither a letter nor a space.
    """

    name = "text8"
    file = "text8"
    md5 = "3bea1919949baf155f99411df5fada7e"
    source = Source("text8", "the file text8 of 100000000 bytes, or text8.zip", "http://mattmahoney.net/dc/text8.zip")

    def check_format(self) -> None:
        for start in range(0, len(self.data), BLOCK):
            odd = np.flatnonzero(~LETTERS[self.data[start : start + BLOCK]])
            if len(odd):
                at = start + int(odd[0])
                found = bytes(self.data[at : at + 1])
                raise self.source.wrong(self.path, "every byte must be a letter a to z or a space", found, f"byte {at}")
