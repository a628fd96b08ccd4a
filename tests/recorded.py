"""The mechanisms that this repository has recorded figures of: what tests of recorded data and of README are about.

What every mechanism must do, a new one too, is asked by the contract suite (attention_zoo/testing), and by it alone.
"""

from __future__ import annotations

import json
from pathlib import Path

FIGURES = json.loads((Path(__file__).parent / "regression.json").read_text())
NEWER = ("adaptive_span", "block_recurrent", "compressive", "h_transformer_1d", "memory_compressed")
"""Mechanisms of this repository of which FLOPs and peak bytes alone are recorded: README names them."""
RECORDED = sorted({cell.split()[0] for cell in FIGURES["cells"]} - set(NEWER))
WRAPPERS = ("global_tokens", "hierarchical", "memory_tokens")
"""Wrappers of this repository: nobody records figures of them, README names them."""
