"""An environment of its own for the peer that needs an older transformers: a layer over the one that runs this.

    python -m attention_zoo.measure.peers.environment FOLDER

Everything but transformers and what it pins is shared (torch above all), so that both sides run the same kernels. Then
`python -m experiments.benchmark peers=true peer_python.hf_bigbird_4_57=FOLDER/bin/python` compares with it.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from attention_zoo.measure.peers.hugging_face import OlderBigBird


def build(folder: str | Path) -> Path:
    """Make the environment, or complete it; returns its Python."""
    folder = Path(folder).absolute()
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    # behind its own packages; by `site`, so that editable installs and nested layers of the shared one count, too
    shared = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (own / "shared.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in shared))
    subprocess.run([str(python), "-m", "pip", "install", "-q", str(OlderBigBird.needs)], check=True)
    return python


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m attention_zoo.measure.peers.environment FOLDER")
    print(f"peer_python.hf_bigbird_4_57={build(sys.argv[1])}")
