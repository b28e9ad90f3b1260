"""Cells with trained mitigations that are refused before any job."""

from __future__ import annotations

import re
from typing import Any

import pytest

from learned_cases import trained
from quantgrid.config import check, grid, registry
from quantgrid.ground.errors import ConfigError
from quantgrid.reporting.page import page_context, report
from quantgrid.schemes import activation_scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from tiny_decoders import VARIED

KINDS = ("tune_scales", "learned_rounding", "qat_finetune", "distill_blocks")


@pytest.mark.parametrize("name", KINDS)
def test_unrounded_weights_are_refused(name, given):
    activation = {site: [activation_scheme("int8")] for site in ("mlp_input",)}
    with pytest.raises(ConfigError, match="nothing to train"):
        trained(given(VARIED[1]), name, CellSchemes(None, activation))


def config_of(mitigation: dict[str, Any], format: dict[str, Any]) -> dict[str, Any]:
    return {
        "models": {
            "tiny": {
                "source": "hub",
                "id": "a/b",
                "revision": "main",
                "shape": {
                    "architecture": "LlamaForCausalLM",
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "layers": 2,
                    "heads": 4,
                    "kv_heads": 2,
                    "head_dim": 16,
                    "vocabulary": 100,
                },
            }
        },
        "corpora": {
            "text": {"source": "builtin", "part": "calibration", "window": 64, "windows": 24},
            "docs": {"source": "builtin", "part": "evaluation", "window": 64, "windows": 4},
        },
        "calibrations": {"default": {"corpus": "text"}},
        "mitigations": {"mine": mitigation},
        "formats": {"chosen": format},
        "evaluate": {"perplexity": ["docs"]},
        "studies": {
            "one": {
                "models": ["tiny"],
                "transforms": ["none"],
                "mitigations": ["mine"],
                "granularities": ["channel"],
                "formats": ["chosen"],
            }
        },
    }


@pytest.mark.parametrize("name", KINDS)
def test_a_config_that_trains_unrounded_weights_is_refused_by_name(name):
    assert grid.expand_studies(check(config_of({"method": name}, {"preset": "int4"})))
    with pytest.raises(
        ConfigError,
        match=r"mitigation 'mine' trains the rounding of weights, and format 'chosen' .* use a format that rounds",
    ):
        check(config_of({"method": name}, {"preset": "int4", "weight": None}))


@pytest.mark.parametrize("base", ["rtn", "gptq", "mr_gptq"])
def test_fixed_codes_under_powers_of_two_are_refused_by_name(base):
    config = config_of({"method": "tune_scales", "base": base}, {"preset": "mxfp4"})
    config["studies"]["one"]["granularities"] = ["native"]
    if base == "rtn":
        assert check(config)
    else:
        with pytest.raises(ConfigError, match=f"keeps the codes of '{base}' .* format 'chosen' are powers of two"):
            check(config)


def test_options_of_the_bases_are_theirs():
    with pytest.raises(ConfigError, match=r"mitigations\.mine\.damping"):
        check(config_of({"method": "tune_scales", "damping": 0.1}, {"preset": "int4"}))
    assert check(config_of({"method": "tune_scales", "base": "gptq", "damping": 0.1}, {"preset": "int4"}))


@pytest.mark.parametrize(
    "axis, entry",
    [
        ("mitigations", {"method": "qat_finetune"}),
        ("mitigations", {"method": "tune_scales", "held_out": 19}),
        ("mitigations", {"method": "learned_rounding"}),
        ("transforms", {"method": "flatquant"}),
        ("transforms", {"method": "optimized_rotation"}),
    ],
)
def test_a_corpus_too_short_to_hold_windows_out_is_refused_at_planning(axis, entry):
    config = config_of({"method": "rtn"}, {"preset": "int4"})
    config[axis] = {"mine": entry}
    config["studies"]["one"][axis] = ["mine"]
    config["corpora"]["text"]["windows"] = held_out = entry.get("held_out", 16)
    with pytest.raises(
        ConfigError,
        match=rf"{axis}.mine: .* holds {held_out} out, and corpus 'text' has {held_out}; set its 'windows' to at least",
    ):
        check(config)
    config["corpora"]["text"]["windows"] = held_out + 8
    assert check(config)
    # as many as the text has, which tokenizing alone can know
    del config["corpora"]["text"]["windows"]
    assert check(config)
    with pytest.raises(ConfigError, match=rf"{axis}.mine.held_out: 4 is out of range"):
        check({**config, axis: {"mine": {**entry, "held_out": 4}}})


def test_training_is_marked():
    marked = {name: method.training for name, method in registry.MITIGATIONS.items() if method.training}
    wanted = {
        "tune_scales": "scales",
        "learned_rounding": "codes",
        "qat_finetune": "weights",
        "distill_blocks": "weights",
    }
    assert marked == wanted and all(registry.MITIGATIONS[name].seeded for name in marked)
    found = page_context.trained(
        check(config_of({"method": "qat_finetune", "steps": 7, "seeds": [0, 1]}, {"preset": "int4"}))
    )
    assert found == [{"mitigation": "mine", "method": "qat_finetune", "trained": "weights", "steps": 7}]
    untrained = page_context.trained(check(config_of({"method": "rtn"}, {"preset": "int4"})))
    shown, bare = (report.build([], {"training": rows}) for rows in (found, untrained))
    assert (
        "is not post-training quantization" in shown
        and "<td>weights</td>" in shown.replace(" ", "")
        and "Trained mitigations" not in bare
    )


TRIMMED = {"method": "learned_rounding", "error": "trimmed"}


@pytest.mark.parametrize(
    "entry, message",
    [
        (TRIMMED | {"trim_low": 0.5}, "trim_low: 0.5 is out of range; expected a number >= 0.0 < 0.5"),
        (TRIMMED | {"trim_high": 0.5}, "trim_high: 0.5 is out of range; expected a number >= 0.0 < 0.5"),
        (
            TRIMMED | {"trim_high": 0},
            "error: 'trimmed' has no meaning with trim_low 0.0 and trim_high 0.0; set trim_low or trim_high above 0",
        ),
        (
            {"method": "qat_finetune", "steps": 7, "checks": 8},
            "checks: 8 has no meaning with steps 7; expected at most 7",
        ),
        *(
            ({"method": name, "learning_rate": 0}, "learning_rate: 0.0 is out of range; expected a number > 0.0")
            for name in KINDS
        ),
    ],
    ids=str,
)
def test_options_that_leave_nothing_to_do_are_refused_by_name(entry, message):
    with pytest.raises(ConfigError, match=re.escape(f"mitigations.mine.{message}")):
        check(config_of(entry, {"preset": "int4"}))


@pytest.mark.parametrize(
    "entry",
    [
        TRIMMED | {"trim_low": 0.49, "trim_high": 0.49},
        TRIMMED | {"trim_low": 0.1, "trim_high": 0},
        {"method": "qat_finetune", "steps": 7, "checks": 7},
        {"method": "qat_finetune", "steps": 0, "checks": 1},
    ],
    ids=str,
)
def test_options_at_their_limits_are_accepted(entry):
    assert check(config_of(entry, {"preset": "int4"}))


def test_shares_that_are_left_out_need_the_loss_that_has_them():
    with pytest.raises(ConfigError, match=r"mitigations\.mine\.trim_high: .* set error to 'trimmed'"):
        check(config_of({"method": "learned_rounding", "trim_high": 0.01}, {"preset": "int4"}))
    assert check(config_of({"method": "learned_rounding", "error": "trimmed", "trim_high": 0.01}, {"preset": "int4"}))
