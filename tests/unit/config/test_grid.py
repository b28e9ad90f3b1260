"""The grid: how studies expand into cells."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest

from grid_cases import cells, config, study
from quantgrid.config import entries, grid
from quantgrid.config.cells import Cell, baseline
from quantgrid.config.grid import expand_studies, study_cells
from quantgrid.ground.places import ROOT


def test_a_study_is_the_product_of_its_axes_after_its_baselines_in_the_order_of_the_config():
    axes = {
        "models": ["n", "m"],
        "transforms": ["scaling", "none"],
        "mitigations": ["rtn", "gptq"],
        "granularities": ["group-32", "channel"],
        "formats": ["int8", "int4"],
    }
    found = cells(axes)
    assert found[:2] == [baseline("n"), baseline("m")]
    assert found[2:] == [Cell(*values) for values in product(*axes.values())]
    assert len(found) == len(set(found)) == 2 + 2**5


def test_a_cell_names_its_axes_and_its_path():
    cell = Cell("m", "none", "gptq", "group-32", "int4")
    assert cell.axes == {
        "model": "m",
        "transform": "none",
        "mitigation": "gptq",
        "granularity": "group-32",
        "format": "int4",
    }
    assert cell.path == "m/none/gptq/group-32/int4" and cell.quantized
    assert baseline("m") == Cell("m", "none", "none", "-", "bf16") and not baseline("m").quantized


def test_an_also_block_states_only_the_axes_that_differ():
    found = cells(
        study(
            mitigations=["rtn", "gptq"],
            also=[{"transforms": ["scaling"], "mitigations": ["gptq"]}, {"formats": ["bf16"]}],
        )
    )
    assert found == [
        baseline("m"),
        Cell("m", "none", "rtn", "channel", "int4"),
        Cell("m", "none", "gptq", "channel", "int4"),
        Cell("m", "scaling", "gptq", "channel", "int4"),
    ]


def test_also_alone_may_complete_a_study():
    given = study(also=[{"formats": ["int8"]}])
    del given["formats"]
    assert cells(given)[1:] == [Cell("m", "none", "rtn", "channel", "int8")]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ([{"format": "int8"}], [("rtn", "int4"), ("gptq", "int4")]),
        ([{"format": "int8", "mitigation": "gptq"}], [("rtn", "int4"), ("rtn", "int8"), ("gptq", "int4")]),
        ([{"format": ["int8", "int4"], "mitigation": "gptq"}], [("rtn", "int4"), ("rtn", "int8")]),
        (
            [{"format": "int8", "mitigation": "rtn"}, {"format": "int4", "mitigation": "gptq"}],
            [("rtn", "int4"), ("gptq", "int8")],
        ),
        ([{"model": "n"}], [("rtn", "int4"), ("rtn", "int8"), ("gptq", "int4"), ("gptq", "int8")]),
    ],
)
def test_exclude_removes_the_cells_that_match_every_axis_of_a_pattern(exclude, left):
    found = cells(study(mitigations=["rtn", "gptq"], formats=["int4", "int8"], exclude=exclude))
    assert [(cell.mitigation, cell.format) for cell in found[1:]] == left


def test_exclude_acts_on_also_blocks_but_never_on_the_baseline():
    found = cells(study(also=[{"transforms": ["scaling"]}], exclude=[{"transform": "scaling"}, {"format": "bf16"}]))
    assert found == [baseline("m"), Cell("m", "none", "rtn", "channel", "int4")]


def test_exclude_understands_native_and_seeded_names():
    rotations = {"rotation": {"method": "random_hadamard", "seeds": [3, 5]}}
    found = cells(
        study(
            granularities=["native", "group-16"],
            formats=["int4", "nvfp4"],
            transforms=["none", "rotation"],
            exclude=[{"granularity": "native", "format": "int4"}, {"transform": "rotation", "format": "nvfp4"}],
        ),
        transforms=rotations,
    )
    assert {(cell.transform, cell.granularity, cell.format) for cell in found[1:]} == {
        ("none", "group-16", "int4"),
        ("none", "group-16", "nvfp4"),
        ("rotation-s3", "group-16", "int4"),
        ("rotation-s5", "group-16", "int4"),
    }


def test_bf16_leaves_nothing_to_mitigate_and_no_granularity():
    found = cells(
        study(
            transforms=["none", "scaling"],
            mitigations=["rtn", "gptq"],
            granularities=["tensor", "native"],
            formats=["bf16"],
        )
    )
    assert found == [baseline("m"), Cell("m", "scaling", "none", "-", "bf16")]


@pytest.mark.parametrize(
    ("preset", "granularity"),
    [
        ("int4", "channel"),
        ("fp4", "channel"),
        ("nf4", "channel"),
        ("mxfp4", "group-32"),
        ("nvfp4", "group-16"),
        ("mxint4", "group-32"),
        ("nvint4", "group-16"),
        ("bf16", "-"),
    ],
)
def test_native_is_the_block_of_a_format_or_one_scale_per_channel(preset, granularity):
    assert cells(study(granularities=["native"], formats=[preset]))[-1].granularity == granularity
    entry = {"mine": {"preset": preset, "weight": {"range": "mse"}}}
    assert (
        preset == "bf16"
        or cells(study(granularities=["native"], formats=["mine"]), formats=entry)[-1].granularity == granularity
    )


def test_native_merges_with_the_granularity_that_it_stands_for():
    assert len(cells(study(granularities=["channel", "native"]))) == 2
    assert len(cells(study(granularities=["group-16", "native"], formats=["nvfp4"]))) == 2


def test_a_list_of_seeds_expands_to_names_and_each_name_to_its_entry():
    transforms = {
        "rotation": {"method": "random_hadamard", "seeds": [0, 7]},
        "fixed": {"method": "random_hadamard", "seed": 7},
    }
    given = config(study(transforms=["rotation", "fixed", "none"]), transforms=transforms)
    assert [cell.transform for cell in expand_studies(given)] == ["none", "rotation-s0", "rotation-s7", "fixed", "none"]
    assert entries.entry(given, "transforms", "rotation-s7") == {"method": "random_hadamard", "seed": 7}
    assert entries.entry(given, "transforms", "fixed") == transforms["fixed"] and "seeds" in transforms["rotation"]
    # no such seed: no such entry
    assert entries.entry(given, "transforms", "rotation-s8") == {"method": "rotation-s8"}


def test_names_need_an_entry_only_where_they_are_not_those_of_methods_and_presets():
    given = config(study())
    assert entries.entry(given, "mitigations", "gptq") == {"method": "gptq"} and entries.entry(
        given, "formats", "int4"
    ) == {"preset": "int4"}
    given["formats"] = {"int4": {"preset": "int4", "weight": {"range": "mse"}}}
    assert entries.entry(given, "formats", "int4") == given["formats"]["int4"]


def test_shared_cells_are_there_once_in_the_order_in_which_studies_name_them():
    one, two = study(mitigations=["gptq", "rtn"]), study(mitigations=["rtn", "gptq"], formats=["int8", "int4"])
    given = config(one, two)
    assert len(study_cells(given, "a")) == 3 and len(study_cells(given, "b")) == 5
    assert [(cell.mitigation, cell.format) for cell in expand_studies(given)] == [
        ("none", "bf16"),
        ("gptq", "int4"),
        ("rtn", "int4"),
        ("rtn", "int8"),
        ("gptq", "int8"),
    ]


def test_what_a_study_names_is_listed_with_its_place():
    given = study(also=[{"formats": ["int8"]}], exclude=[{"format": "int8", "mitigation": ["rtn", "gptq"]}])
    assert [(axis, name, key) for axis, name, key in grid.names_in(given)][-4:] == [
        ("formats", "int8", "also.0.formats"),
        ("mitigations", "rtn", "exclude.0.mitigation"),
        ("mitigations", "gptq", "exclude.0.mitigation"),
        ("formats", "int8", "exclude.0.format"),
    ]


def test_the_grid_needs_the_standard_library_only():
    code = (
        "import sys; from quantgrid.config.grid import expand_studies;"
        "assert not {'torch', 'numpy', 'yaml', 'pandas', 'safetensors', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "scripts")
    assert done.returncode == 0, done.stderr
