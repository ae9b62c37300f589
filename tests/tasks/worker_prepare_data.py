"""Worker side: prepare data on ranks of several nodes, and count what each of them reads."""

import os
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from dsv3.config.root import Config
from dsv3.data import token_table
from dsv3.distributed.process_group import RankContext
from dsv3.documents import byte_blocks
from dsv3.errors import UserError
from dsv3.metrics.progress import Phase
from dsv3.tasks.setup import prepare_data
from dsv3.tokens import cache, cache_seal

NODE = 4
"""Ranks of a node."""


@dataclass
class Prepared:
    """What a rank has read, and what it got."""

    files: int = 0
    """Files of the corpus."""
    verified: int = 0
    """Entries of the cache that were compared with their seals."""
    checked: int = 0
    """Bytes of token ids that were looked at."""
    summary: dict[str, int] | None = None
    rows: list[int] | None = None
    """First row of both sides."""
    error: str = ""


def prepare(config: Config, caches: list[Path], other: Config | None = None) -> Prepared:
    """Prepare data with one cache per node; the second node's config is `other`."""
    rank = dist.get_rank()
    node = rank // NODE
    ranks = RankContext(rank, rank % NODE, dist.get_world_size(), torch.device("cpu"))
    done, form, advance = Prepared(), byte_blocks.file_form, Phase.advance
    compare = cache_seal.check_seal

    def file_form(path: Path) -> str:
        done.files += 1
        return form(path)

    def count(phase: Phase, amount: int = 1) -> None:
        done.checked += amount if phase.title == "checking the token ids" else 0
        advance(phase, amount)

    def check_seal(directory: Path) -> None:
        done.verified += directory.exists()
        compare(directory)

    with (
        patch.object(cache, "check_seal", check_seal),
        patch.dict(os.environ, DSV3_CACHE=str(caches[node])),
        patch.object(byte_blocks, "file_form", file_form),
        patch.object(Phase, "advance", count),
        patch.object(token_table, "CHUNK_IDS", 64),
    ):
        try:
            data = prepare_data(other if other is not None and node else config, ranks)
        except UserError as error:
            done.error = str(error)
            return done
    assert data.train is not None
    done.summary = data.summary
    done.rows = np.concatenate([rows.row(0).tokens for rows in (data.train, data.held_out)]).tolist()
    return done
