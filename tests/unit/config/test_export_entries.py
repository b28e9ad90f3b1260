"""Entries of ``exports``: cells by name and by axes, targets, refusals before any job."""

from __future__ import annotations

from typing import Any

import pytest

from plan_cases import content
from quantgrid.config import check
from quantgrid.config.cells import Cell
from quantgrid.config.exports import Export, cell_name, exports
from quantgrid.config.grid import expand_studies
from quantgrid.ground.errors import ConfigError

PLAIN = Cell("tiny", "none", "rtn", "channel", "int4")


def checked(*entries: dict[str, Any]) -> dict[str, Any]:
    return check({**content(), "exports": [{"model": "tiny", **entry} for entry in entries]})


def asked(*entries: dict[str, Any]) -> list[Export]:
    config = checked(*entries)
    return exports(config, expand_studies(config))


def refusal(*entries: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        checked(*entries)
    return str(caught.value)


def test_a_cell_is_found_by_its_name_and_by_its_axes():
    by_name = {"cell": "none/rtn/channel/int4", "to": "compressed-tensors"}
    with_model = {"cell": "tiny/none/rtn/channel/int4", "to": "compressed-tensors"}
    axes = {"transform": "none", "mitigation": "rtn", "granularity": "native", "format": "int4"}
    [found] = asked(by_name, with_model, {**axes, "to": ["compressed-tensors"]})
    assert (found.cell, found.target, found.name) == (PLAIN, "compressed-tensors", "tiny-int4-compressed-tensors")
    assert cell_name(found.cell) == by_name["cell"]
    assert asked({**by_name, "name": "phone"})[0].name == "phone"


def test_axes_may_be_left_out_where_the_cells_agree():
    assert asked({"format": "int4-mse", "to": "compressed-tensors"})[0].cell.format == "int4-mse"
    message = refusal({"format": "int4", "transform": "none", "to": "compressed-tensors"})
    assert message.startswith("exports.0: several cells of 'tiny' differ in mitigation: lr8, rtn")


NAMED = {"cell": "none/rtn/channel/int4"}
BOTH = "exports.0: name the cell by 'cell' or by its axes"
WRONG = [
    (
        {"cell": "none/rtn/channel/int5", "to": "dense"},
        "exports.0.cell: unknown cell 'none/rtn/channel/int5'; similar: ",
    ),
    ({**NAMED, "to": "gtpq"}, "exports.0: TO: unknown target 'gtpq' - did you mean 'gptq'?"),
    ({**NAMED, "to": "dense", "flags": ["fast"]}, "exports.0: flag 'fast': dense accepts"),
    (
        {**NAMED, "to": "gptq"},
        "gptq cannot hold 'none/rtn/channel/int4': the loader does not round activations; nearest: ",
    ),
    (
        {"cell": "turn/rtn/channel/int4", "to": "compressed-tensors"},
        "the online rotation at down_input is dropped by transformers without a warning; nearest: the same recipe with",
    ),
    ({**NAMED, "format": "int4", "to": "dense"}, BOTH),
    ({"to": "dense"}, BOTH),
    ({"format": "int7", "to": "dense"}, "exports.0: no study has a cell of 'tiny' with format int7; similar:"),
    ({"model": "huge", "cell": "a", "to": "dense"}, "exports.0.model: unknown model 'huge'"),
    ({"cell": "a", "to": "dense", "target": "x"}, "exports.0: unknown key 'target'"),
    ({"cell": "a"}, "exports.0: the key 'to' is missing"),
    ({"cell": "a", "to": 3}, "exports.0.to: 3 is of the wrong type"),
]


@pytest.mark.parametrize(("entry", "message"), WRONG)
def test_wrong_entries_are_refused_with_what_is_accepted(entry, message):
    found = refusal(entry)
    assert message in found and "\n" not in found


def test_all_wrong_entries_are_listed():
    message = refusal({"cell": "a", "to": "dense"}, {"cell": "none/rtn/channel/int4", "to": "gptq"})
    assert message.startswith("2 mistakes in the config:") and "exports.0" in message and "exports.1" in message


def test_a_flag_accepts_what_is_refused_without_it():
    entry = {"cell": "turn/rtn/channel/int4", "to": "compressed-tensors"}
    assert asked({**entry, "flags": ["online_rotation"]})[0].flags == ("online_rotation",)
    assert "ARGS=--online-rotation" in refusal(entry)
