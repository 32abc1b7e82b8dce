"""What a conversion did with every tensor, as data and as a table to print."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.table import Table

from catp_jax.terminal import as_text
from convert.rules import Matching
from convert.shards import Tensor


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor: its name in the Hugging Face checkpoint, the parameter it fills, and how."""

    source: str
    target: str
    change: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    stored_dtype: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Ignored:
    """One tensor that was left out, and why."""

    source: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Every tensor of a checkpoint: read and renamed, or ignored. `nbytes` are those read."""

    checkpoint: Path
    layout: str
    rows: tuple[Row, ...]
    ignored: tuple[Ignored, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that were read."""
        return sum(row.nbytes for row in self.rows)

    def summary(self) -> str:
        """One line: how many tensors, how large, from which layout."""
        changes = Counter(row.change for row in self.rows)
        counts = ", ".join(f"{count} {change}" for change, count in sorted(changes.items()))
        return (
            f"{len(self.rows)} tensors, {readable(self.nbytes)}, in the {self.layout} layout: "
            f"{counts}; {len(self.ignored)} ignored"
        )


def make_report(
    checkpoint: Path,
    layout: str,
    matching: Matching,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, np.dtype],
) -> Report:
    """The report on a matched checkpoint, in the order of its tensors, twins last.

    `dtypes` are the number types of the parameters.
    """
    rows = [
        Row(
            source=match.source,
            target=match.target,
            change=", ".join(filter(None, (match.transform.name, tensor.origin))),
            file=tensor.file.name,
            shape=tensor.shape,
            dtype=tensor.dtype.name,
            stored_dtype=dtypes[match.target].name,
            nbytes=tensor.nbytes,
        )
        for match in (*matching.filled.values(), *matching.twins)
        for tensor in [tensors[match.source]]
    ]
    left = [Ignored(name, reason) for name, reason in matching.ignored.items()]
    return Report(checkpoint, layout, tuple(rows), tuple(left))


def table(report: Report) -> Table:
    """Every tensor in a line, for a terminal: what names have in them is shown, not obeyed."""
    shown = Table(title=as_text(report.checkpoint), caption=report.summary(), highlight=False)
    for name in ("tensor", "parameter", "change"):
        shown.add_column(name, overflow="fold")
    shown.add_column("shape", justify="right", no_wrap=True)
    shown.add_column("type", no_wrap=True)
    for row in report.rows:
        types = {row.dtype: None, row.stored_dtype: None}
        shape = "×".join(map(str, row.shape))
        shown.add_row(*map(as_text, (row.source, row.target, row.change, shape, " → ".join(types))))
    for left in report.ignored:
        shown.add_row(*map(as_text, (left.source, "ignored", left.reason, "", "")))
    return shown


def readable(nbytes: int) -> str:
    """A number of bytes for people."""
    size, units = float(nbytes), ["B", "KB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"
