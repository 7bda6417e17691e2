"""A table that grows on disk, in one parquet file that can be read at any time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hybridlab.base.files import replaced

GROUP_ROWS = 16_384
"""In memory at most: so many rows are a row group, which from then on lies on the disk alone."""


class GrowingTable:
    """Rows that are appended, and written to a parquet file whenever that is asked for.

    path: of the file; keep_steps: rows of the file up to this nominal step stay, the others are dropped at the next
        write

    The file is replaced as a whole: row groups that are full are copied one by one, the newest rows follow them.
    """

    def __init__(self, path: Path, keep_steps: int) -> None:
        self.path, self.last_step = path, 0
        self._rows: list[dict[str, Any]] = []
        self._groups = 0
        if keep_steps and path.exists():
            self._keep(keep_steps)

    def __bool__(self) -> bool:
        """Whether there are any rows."""
        return bool(self._groups or self._rows)

    @property
    def is_full(self) -> bool:
        """Whether the rows in memory are a row group."""
        return len(self._rows) >= GROUP_ROWS

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows; the next write brings them to the disk."""
        self._rows.extend(map(dict, rows))

    def write(self) -> None:
        """Bring all rows to the disk. Raises UserError where it is full, and keeps them for the next time."""
        if not self:
            return
        with replaced(self.path) as beside:
            self._write(beside)
        if self.is_full:
            self._groups += 1
            self._rows.clear()

    def _write(self, file: Path) -> None:
        newest = pa.Table.from_pandas(pd.DataFrame(self._rows), preserve_index=False).replace_schema_metadata()
        if not self._groups:
            pq.write_table(newest, file)
            return
        with pq.ParquetFile(self.path) as before:
            schema = pa.unify_schemas([before.schema_arrow, newest.schema], promote_options="permissive")
            with pq.ParquetWriter(file, schema) as writer:
                for group in chain(map(before.read_row_group, range(self._groups)), [newest]):
                    if group.num_rows:
                        whole = pa.concat_tables([schema.empty_table(), group], promote_options="permissive")
                        writer.write_table(whole)

    def _keep(self, nominal_step: int) -> None:
        """Take up the file: its row groups that are kept whole stay there, the rest is read."""
        with pq.ParquetFile(self.path) as file:
            for group in map(file.read_row_group, range(file.num_row_groups)):
                kept = group.filter(pc.field("nominal_step") <= nominal_step)
                if kept.num_rows == group.num_rows >= GROUP_ROWS and not self._rows:
                    self._groups += 1
                else:
                    self._rows += kept.to_pylist()
                self.last_step = pc.max(kept["nominal_step"]).as_py() or self.last_step
