"""The records of one study out of `results.csv`, which holds those of all studies: enough for its figure, where nothing else of a run is at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from .. import grid
from ..errors import ConfigError
from .collection import cell_key

# Metric -> the kind of evaluation whose datasets a study names; any other metric belongs to every study of its cell.
KINDS = {"perplexity": "perplexity", "negative_log_likelihood": "perplexity", "kl_divergence": "perplexity", "accuracy": "tasks",
         "stream_error": "depth"}


def of_study(results: pd.DataFrame, config: Mapping[str, Any], study: str) -> pd.DataFrame:
    """Records of the cells of ``study`` in their order, cut to the datasets that it asks for; cells are found by the names on their axes.

    :class:`ConfigError` where a cell of the study has no record.
    """
    cells = {cell_key(cell): cell.path for cell in grid.study_cells(config, study)}
    if absent := [path for key, path in cells.items() if key not in set(results.cell)]:
        raise ConfigError(f"studies.{study}: {len(absent)} of its {len(cells)} cells are not in these results, the first of them {absent[0]}; "
                          "name the config that they were computed from")
    asked = grid.asked(config, config["studies"][study])
    own = results[results.cell.isin(cells)]
    kept = own[[belongs(record, asked) for record in own.itertuples()]]
    return kept.sort_values("cell", key=lambda column: column.map({key: position for position, key in enumerate(cells)}), kind="stable")


def belongs(record: Any, asked: Mapping[str, Sequence[str]]) -> bool:
    """Whether a study that evaluates ``asked`` (kind -> datasets) has this record of its cell; a mean over tasks by the tasks in its protocol."""
    if record.metric == "mean_accuracy":
        return list(json.loads(record.protocol)["tasks"]) == list(asked["tasks"])
    return record.metric not in KINDS or record.dataset in asked[KINDS[record.metric]]
