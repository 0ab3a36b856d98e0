"""The file that keeps what was measured at each step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, each with the number of finished steps under "step".

    Args:
        path: the file; appended to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows; a last line cut off by a kill is left out."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def rewind(self, step: int, source: Path | None = None) -> None:
        """Keep only rows of the first `step` steps, so that a resumed run writes each step once.

        Args:
            step: finished steps to keep.
            source: take the rows from this file instead (a prefix that another run wrote).
        """
        rows = (MetricsLog(source) if source is not None else self).rows()
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(kept, encoding="utf-8")
        temporary.replace(self.path)
