"""Candidates of `make best`: those that fit the model and, if one is named, the export target."""

from __future__ import annotations

from argparse import Namespace

import pytest

import best
from checkouts import ROOT
from in_process import run_script
from quantgrid.config import validation
from quantgrid.config.planned_features import planned_verdict
from quantgrid.ground.errors import ConfigError
from quantgrid.plan.pipeline import Plan


def asked(kind: str, to: str | None) -> Namespace:
    config, space = (str(ROOT / "config" / f"{name}.yaml") for name in ("config", "best"))
    return Namespace(model="reference-4m", bits=4.5, kind=kind, configfile=config, space=space, to=to)


def raced(kind: str, to: str | None) -> Plan:
    return Plan(validation.check(best.config_of(asked(kind, to))))


@pytest.mark.parametrize(
    "kind, to, candidates",
    [
        ("w4a16", None, 300),
        ("w4a16", "compressed-tensors", 160),
        ("w4a16", "awq", 120),
        ("w4a4", "compressed-tensors", 32),
    ],
)
def test_a_named_target_holds_every_recipe_that_is_raced(kind: str, to: str | None, candidates: int, capsys):
    plan = raced(kind, to)
    [race] = plan.raced[kind]
    assert len(race.candidates) == candidates
    if to:
        assert not any(planned_verdict(plan.config, cell, to).refusals for cell in race.candidates)
        left = next(cell for cell in raced(kind, None).raced[kind][0].candidates if cell not in race.candidates)
        reason = planned_verdict(plan.config, left, to).refusals[0]
        assert (
            f"recipes do not fit reference-4m in {to}, the first of them because: {reason}" in capsys.readouterr().out
        )


def test_a_target_that_holds_no_recipe_ends_the_command_with_the_reason():
    with pytest.raises(ConfigError, match="no w4a4 recipe fits reference-4m in gguf, .* does not round activations"):
        best.config_of(asked("w4a4", "gguf"))


def test_a_misspelt_target_is_named():
    words = ["--model", "reference-4m", "--bits", "4.5", "--kind", "w4a16", "--to", "awk", "--dry-run"]
    done = run_script("best", *words, folder=ROOT)
    assert done.returncode == 1 and "TO: unknown target 'awk'" in done.stderr and "awq" in done.stderr


def test_the_last_line_names_the_target_asked_for_or_one_that_holds_the_recipe():
    plan = raced("w4a16", None)
    cells = {cell.format: cell for cell in plan.raced["w4a16"][0].candidates if cell.transform == "none"}
    assert " TO=compressed-tensors " in best.export_line(plan, cells["sym-64"], "c.yaml", None)
    assert " TO=awq " in best.export_line(plan, cells["sym-64"], "c.yaml", "awq")
    assert " TO=dense " in best.export_line(plan, cells["nf4-64"], "c.yaml", None)
    [turned] = raced("w4a4", None).raced["w4a4"][0].candidates[-1:]
    assert best.export_line(plan, turned, "c.yaml", None).startswith("no export target holds ")
