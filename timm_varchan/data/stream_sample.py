"""A look at data that is streamed: rows from all over it, and rows that are kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa

from timm_varchan.channels import seeded_rng

__all__ = ["sampled_rows", "table_of"]

#: Training images that are looked at for means and deviations.
NUM_SAMPLED = 1000
#: Files that they come from, where there are so many,
_NUM_FILES_SAMPLED = 16
#: and the rows of a file among which one is drawn.
_SPREAD = 4
_PIECE = 100


def table_of(rows: list[dict[str, Any]], features: datasets.Features) -> datasets.Dataset:
    """Rows as they are, in pieces: an arrow array of bytes ends at 2 GiB."""
    starts = range(0, max(1, len(rows)), _PIECE)
    pieces = [pa.Table.from_pylist(rows[i : i + _PIECE], features.arrow_schema) for i in starts]
    return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(pieces)))


def sampled_rows(rows: datasets.IterableDataset) -> Iterator[tuple[str, dict[str, Any]]]:
    """Some rows and their places, drawn with a fixed seed from the beginnings of several files."""
    rng = seeded_rng("stream sample")
    num_files = rows.num_shards
    share = -(-NUM_SAMPLED // min(_NUM_FILES_SAMPLED, num_files))
    missing = NUM_SAMPLED
    for file in rng.sample(range(num_files), num_files):
        drawn: list[tuple[str, dict[str, Any]]] = []
        part = rows.shard(num_files, file) if num_files > 1 else rows
        for number, row in enumerate(part.take(_SPREAD * share)):
            # every row so far is kept with the same probability
            at = number if number < share else rng.randrange(number + 1)
            if at < share:
                drawn[at : at + 1] = [(f"file {file + 1} of {num_files}, row {number}", row)]
        yield from drawn[:missing]
        missing -= len(drawn)
        if missing <= 0:
            return
