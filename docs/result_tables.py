"""Tables of the reference pages, from kept studies: the rows of one model under chosen axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from quantgrid.reporting.data.records import read_records
from quantgrid.reporting.tables import study_tables, writers


class Excerpt(NamedTuple):
    """Records of one study of a kept run with these values of its columns, as a table of these axes."""

    run: str
    study: str
    model: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]


STUDIES = "runs/studies-run"
MODEL = "smollm2-135m"
# page and mark -> what stands there
EXCERPTS = {
    ("reference/transforms.md", "both-sides"): Excerpt(
        STUDIES, "transforms-mitigations", MODEL, ("transform",), ("mitigation",)
    ),
    ("reference/transforms.md", "weights"): Excerpt(STUDIES, "weights", MODEL, ("transform",), ("mitigation",)),
    ("reference/transforms.md", "blocks"): Excerpt(STUDIES, "block-rotations", MODEL, ("transform",), ("format",)),
    ("reference/mitigations.md", "low-rank"): Excerpt(
        STUDIES, "low-rank", "reference-4m", ("mitigation",), ("format",)
    ),
}


def excerpt(folder: Path, about: dict[str, Any], wanted: Excerpt) -> str:
    """Divergences of the quantized cells of ``wanted`` in the unpacked archive of its run."""
    records = read_records(folder / "studies" / f"{wanted.study}.csv")
    records = records[(records.model == wanted.model) & (records.mitigation != "none")]
    table = {"rows": [*wanted.rows], "columns": [*wanted.columns], "metrics": ["kl_divergence"]}
    spec = {**about["studies"][wanted.study], "study": wanted.study, "models": [wanted.model], "table": table}
    text = writers.markdown(study_tables.build(records, spec)).partition("\n\n")[2]
    return f"{text.rstrip()} Commit {about['commits'][wanted.study]}."
