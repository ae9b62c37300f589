"""Both ways of packing on a million documents with lengths as on the web; a part of benchmarks/data.py.

Lengths are log-normal (median 365 tokens, sigma 1.1: 669 on average, 2 in 1,000 above 8,700), as those of
cleaned web text are about. Tokens are not read: a layout of rows depends on the lengths alone.
"""

import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv3.data.best_fit import read_layout, write_layout
from dsv3.data.rows import expected_cuts
from dsv3.tokens.token_store import TokenStore

DOCUMENTS = 1_000_000
MEDIAN, SIGMA, LONGEST = 365, 1.1, 1_000_000
SEQUENCES = (512, 4096, 32768, 131072)


class NoTokens:
    """Stands for the tokens of a store whose lengths alone are looked at."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> npt.NDArray[np.uint16]:
        raise AssertionError("a layout reads no token")


def web_like_store() -> TokenStore:
    """Return a store of DOCUMENTS documents without tokens."""
    lengths = np.exp(np.random.default_rng(0).normal(np.log(MEDIAN), SIGMA, DOCUMENTS))
    offsets = np.concatenate([[0], np.cumsum(np.clip(lengths, 1, LONGEST).astype(np.int64))])
    return TokenStore.of(NoTokens(int(offsets[-1])), offsets)


def measure() -> dict[str, Any]:
    """Return by sequence length the CPU seconds of best-fit packing, and what both packings cut and pad."""
    store = web_like_store()
    found: dict[str, Any] = {"documents": DOCUMENTS, "tokens": store.num_tokens}
    for sequence in SEQUENCES:
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            write_layout(Path(folder), store, sequence, None)
            seconds = time.process_time() - began
            tracemalloc.start()
            write_layout(Path(folder), store, sequence, None)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            layout = read_layout(Path(folder))
            rows = len(layout.ends) - 1
            found[str(sequence)] = {
                "best_fit_cpu_seconds": round(seconds, 2),
                "best_fit_peak_mib": round(peak / 2**20),
                "best_fit_bytes_per_document": round(
                    (layout.pieces.nbytes + layout.ends.nbytes) / DOCUMENTS, 1
                ),
                "best_fit_cut": layout.documents_cut / DOCUMENTS,
                "best_fit_padding": round(layout.padding / (rows * (sequence + 1)), 7),
                "concat_cut": expected_cuts(store, sequence) / DOCUMENTS,
            }
    return found
