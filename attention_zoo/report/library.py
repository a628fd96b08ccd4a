"""The chart library of the page, kept as data: plotly.js without maps, 3D and finance, a third of the whole.

The Python package of plotly brings its whole bundle of 4.8 MB alone. This command fetches the smaller one from npm's
registry, by npm itself, checks its digest and puts it beside its licence, where the page inlines it from:

    python -m attention_zoo.report.library

After another VERSION the digest is that which `npm view plotly.js-cartesian-dist-min@VERSION dist.integrity` tells.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from attention_zoo.files import write_atomic

PACKAGE, VERSION = "plotly.js-cartesian-dist-min", "4.1.1"
ARCHIVE_SHA512 = "o8GrFeusncwBIxbBynRJpY4pkgVB6caM+JLpwrLYbbsO7dZ8FJ+SVN2Fr+L7kiG/Z6w4P5O0Jus/Qr5EefHVeg=="
"""Of the registry's archive, as npm writes it."""
SHA256 = "79542150855a52c567260e3137095dbe2b744e6d702a5cabe67da246942fba7a"
"""Of the script that is inlined."""

STATIC = Path(__file__).parent / "static"
SCRIPT, LICENSE = STATIC / "plotly-cartesian.min.js", STATIC / "plotly-cartesian.LICENSE"
_MEMBERS = {"package/plotly-cartesian.min.js": SCRIPT, "package/LICENSE": LICENSE}


@cache
def plotly_script() -> str:
    """The library's source.

    Raises:
        ValueError: if it is not the file that this code was tested with.
    """
    data = SCRIPT.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise ValueError(f"{SCRIPT} must have SHA-256 {SHA256}, got {found}: `python -m {__spec__.name}` fetches it")
    return data.decode()


def fetch() -> None:
    """Fetch the library and its licence into the package.

    Raises:
        subprocess.CalledProcessError, FileNotFoundError: where npm cannot fetch it, or is not there.
        ValueError: where the archive is another than expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", f"{PACKAGE}@{VERSION}"], cwd=folder, check=True)
        (archive,) = Path(folder).glob("*.tgz")
        found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != ARCHIVE_SHA512:
            raise ValueError(f"{PACKAGE}@{VERSION} must have SHA-512 {ARCHIVE_SHA512}, got {found}")
        with tarfile.open(archive) as held:
            for member, path in _MEMBERS.items():
                file = held.extractfile(member)
                assert file is not None
                write_atomic(path, file.read())


if __name__ == "__main__":
    fetch()
    plotly_script()
