"""Selection of one study's records from `results.csv`, which holds those of all studies; sufficient
to draw its figure from that file alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ...config import grid
from ...ground.errors import ConfigError
from .evaluation_rows import cell_key

# Metric -> kind of evaluation whose datasets a study names; other metrics belong to every study of
# their cell.
KINDS = {
    "perplexity": "perplexity",
    "negative_log_likelihood": "perplexity",
    "kl_divergence": "perplexity",
    "accuracy": "tasks",
    "residual_error": "residual_error",
}


def of_study(results: pd.DataFrame, config: Mapping[str, Any], study: str) -> pd.DataFrame:
    """Select the records of the cells of ``study`` in their order, restricted to its datasets;
    cells are matched by the names on their axes.

    :class:`ConfigError` if a cell of the study has no record.
    """
    cells = {cell_key(cell): cell.path for cell in grid.study_cells(config, study)}
    if absent := [path for key, path in cells.items() if key not in set(results.cell)]:
        raise ConfigError(
            f"studies.{study}: {len(absent)} of its {len(cells)} cells are not in these results, the "
            f"first of them {absent[0]}; "
            "name the config that they were computed from"
        )
    asked = grid.asked(config, config["studies"][study])
    own = results[results.cell.isin(cells)]
    kept = own[[belongs(record, asked) for record in own.itertuples()]]
    return kept.sort_values(
        "cell", key=lambda column: column.map({key: position for position, key in enumerate(cells)}), kind="stable"
    )


def belongs(record: Any, asked: Mapping[str, Sequence[str]]) -> bool:
    """Check whether a study that evaluates ``asked`` (kind -> datasets) includes this record of its
    cell; a mean over tasks is matched by the tasks in its protocol."""
    if record.metric == "mean_accuracy":
        return list(json.loads(record.protocol)["tasks"]) == list(asked["tasks"])
    return record.metric not in KINDS or record.dataset in asked[KINDS[record.metric]]
