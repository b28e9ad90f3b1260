"""Specifications of steps, their look-up by rules, and the plan of a part of a config."""

from __future__ import annotations

import inspect
import json
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest

from plan_cases import content, plan, steps
from quantgrid.config import check, grid
from quantgrid.config.cells import AXES, Cell
from quantgrid.config.grid import expand_studies
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.places import ROOT
from quantgrid.ground.provenance import canonical, digest
from quantgrid.plan.pipeline import Plan
from quantgrid.plan.steps import GATES

pytestmark = pytest.mark.usefixtures("in_the_repository")


# -- specifications and look-ups -------------------------------------------------------------------


def test_a_specification_is_canonical_json_without_absolute_paths(tmp_path):
    made = plan({**content(), "results_dir": str(tmp_path / "results")})
    for rule, known in made.steps.items():
        for step in known.values():
            text = made.spec(rule)(step.wildcards)
            assert canonical(json.loads(text)) == text and json.loads(text)["axes"] == step.wildcards
            assert str(tmp_path) not in text and str(ROOT) not in text and '"/' not in text


def test_the_key_is_the_digest_of_the_specification_and_of_what_is_read():
    for rule, known in plan(content()).steps.items():
        for step in known.values():
            whole = {key: value for key, value in step.spec.items() if key not in ("axes", "modules")}
            assert step.key == digest(whole["upstream"] if rule in GATES else whole), rule
            assert step.spec["upstream"].keys() == step.inputs.keys() and {"code", "versions"} <= step.spec.keys()
            for name, path in step.inputs.items():
                assert step.spec["upstream"][name].split("/")[0] in path


def test_inputs_of_a_step_are_outputs_of_others():
    made = plan(content())
    outputs = {path for known in made.steps.values() for step in known.values() for path in step.outputs.values()}
    assert {
        path for known in made.steps.values() for step in known.values() for path in step.inputs.values()
    } <= outputs
    assert set(made.all_evaluations()) <= outputs


def test_rules_look_a_step_up_by_its_wildcards():
    made = plan(content())
    cell = Cell("tiny", "none", "none", "-", "bf16")
    step = made.quantize_model(cell)
    assert made.inputs("quantize_model")(step.wildcards) == {
        **step.inputs,
        "statistics": [],
        "windows": [],
        "allocation": [],
        "digests": step.digests,
    }
    assert step.digests == (made.fetch_model("tiny").digest, made.fit_transform(cell).digest)
    assert step.digest == made.digest("quantize_model").format(**step.wildcards)
    assert step.outputs["error"] == made.pattern("quantize_model", "error").format(**step.wildcards)
    assert made.inputs("quantize_model")(step.wildcards)["windows"] == []
    rounded = made.quantize_model(Cell("tiny", "none", "rtn", "channel", "int4"))
    assert made.inputs("quantize_model")(rounded.wildcards)["statistics"].startswith(
        "results/calibration/tiny/default/"
    )


def test_functions_of_rules_hold_the_signature_that_snakemake_asks_for():
    made, rule = plan(content()), "quantize_model"
    functions = {
        made.inputs(rule): ["wildcards"],
        made.spec(rule): ["wildcards"],
        made.parameter(rule, "mitigation"): ["wildcards"],
        made.memory_mb(rule): ["wildcards", "attempt"],
    }
    for function, names in functions.items():
        assert inspect.signature(function) is function.__signature__ and [*function.__signature__.parameters] == names


def test_a_mitigation_that_searches_the_ranges_of_weights_changes_the_weight_scheme_alone():
    """The scheme that transforms are fitted to stays, and so does a format's range."""

    def schemes(format: str, **formats: Any) -> dict[str, dict[str, Any]]:
        config = content()
        config["mitigations"] |= {"plain": {"method": "gptq"}, "ranges": {"method": "gptq", "weight_range": "mse"}}
        config["formats"] |= formats
        config["report"]["distributions"] = []
        config["studies"]["methods"] |= {
            "transforms": ["none"],
            "mitigations": ["plain", "ranges"],
            "formats": [format],
            "exclude": [],
        }
        made = plan(config)
        return {
            name: made.quantize_model(Cell("tiny", "none", name, "channel", format)).spec
            for name in ("plain", "ranges")
        }

    found = schemes("int4")
    assert (
        found["plain"]["mitigation"] == found["ranges"]["mitigation"]
        and found["plain"]["code"] == found["ranges"]["code"]
    )
    plain, ranges = (found[name]["schemes"] for name in ("plain", "ranges"))
    assert ranges == {**plain, "weight": {**plain["weight"], "range": "mse"}} and plain["weight"]["range"] == "minmax"
    stated = schemes("tails", tails={"preset": "int4", "weight": {"range": "percentile"}})
    assert stated["plain"]["schemes"] == stated["ranges"]["schemes"]
    with pytest.raises(
        ConfigError, match="mitigations.ranges on format 'kmeans4': weight_range 'mse': element 'kmeans4'"
    ):
        schemes("kmeans4")


def test_trainings_with_fisher_weights_share_the_sensitivities_of_their_calibration():
    errors = {"plain": "squared", "trimmed": "trimmed", "fisher": "fisher", "elsewhere": "fisher"}
    config = content()
    config["mitigations"] |= {name: {"method": "learned_rounding", "error": error} for name, error in errors.items()}
    config["mitigations"]["elsewhere"]["calibration"] = "other"
    config["studies"]["methods"] |= {"mitigations": [*errors], "exclude": []}
    made = plan(config)
    found = {
        name: {
            made.quantize_model(Cell("tiny", transform, name, "channel", "int4")).inputs.get("sensitivities")
            for transform in ("none", "turn")
        }
        for name in errors
    }
    assert found["plain"] == found["trimmed"] == {None}
    for name, calibration in (("fisher", "default"), ("elsewhere", "other")):
        assert found[name] == {made.measure_sensitivity("tiny", calibration).outputs["sensitivities"]}


def test_a_sequential_mitigation_reads_the_windows_that_it_is_calibrated_on():
    """In addition to all inputs of a cached one. The options of its function do not name the
    propagation, and no cached cell depends on the module."""

    def edit(config: dict[str, Any]) -> None:
        config["mitigations"] |= {
            "in-turn": {"method": "gptq", "propagation": "sequential", "quantized_activations": True},
            "paired": {
                "method": "gptq_low_rank",
                "base": "gptaq",
                "propagation": "sequential",
                "calibration": "skipping",
            },
            "cached": {"method": "gptq"},
        }
        config["calibrations"]["skipping"] = {"corpus": "text", "skip_first": 2}
        config["studies"]["methods"]["mitigations"] = ["in-turn", "paired", "cached"]

    config = content()
    edit(config)
    made = plan(config)
    in_turn, paired, cached = (
        made.quantize_model(Cell("tiny", "none", name, "channel", "int4")) for name in ("in-turn", "paired", "cached")
    )
    assert in_turn.inputs.keys() == cached.inputs.keys() | {"windows"} and in_turn.inputs["windows"].startswith(
        "results/corpora/tiny/"
    )
    windows = made.calibrate_model("tiny", "default").inputs["windows"]
    assert in_turn.inputs["windows"] == paired.inputs["windows"] == windows
    assert in_turn.spec["propagation"] == {
        "quantized_activations": True,
        "paired": False,
        "skip_first": 0,
    }
    assert paired.spec["propagation"] == {
        "quantized_activations": False,
        "paired": True,
        "skip_first": 2,
    }
    assert in_turn.spec["mitigation"] == cached.spec["mitigation"] and "propagation" not in cached.spec
    assert in_turn.spec["code"] != cached.spec["code"] and "transformers" in in_turn.spec["versions"]


def test_two_names_for_the_same_options_stay_two_cells():
    """Their keys are equal, so the rest of the path has to tell them apart: each job gets its own
    axes and reads its own files."""

    def edit(config: dict[str, Any]) -> None:
        config["transforms"]["twin"] = dict(config["transforms"]["smooth"])
        config["studies"]["methods"]["transforms"] = ["smooth", "twin"]

    config = {**content(), "report": {}, "exports": []}
    edit(config)
    made = plan(config)
    twins = [made.quantize_model(Cell("tiny", name, "rtn", "channel", "int4")) for name in ("smooth", "twin")]
    assert twins[0].key == twins[1].key and twins[0].outputs["error"] != twins[1].outputs["error"]
    for step, name in zip(twins, ("smooth", "twin")):
        assert json.loads(made.spec("quantize_model")(step.wildcards))["axes"]["transform"] == name
        assert f"/{name}/" in made.inputs("quantize_model")(step.wildcards)["transform"]
        as_snakemake = SimpleNamespace(**step.wildcards, items=step.wildcards.items)
        assert made.inputs("quantize_model")(as_snakemake) == made.inputs("quantize_model")(step.wildcards)


def test_a_learned_transform_is_fitted_to_the_scheme_of_its_cell(monkeypatch):
    from quantgrid.config import registry

    method = registry.TRANSFORMS["scaling"]
    monkeypatch.setitem(
        registry.TRANSFORMS,
        "scaling",
        registry.Method(method.module, "", method.options, calibrated=True, fitted_to_scheme=True),
    )
    config = content()
    config["studies"]["formats"].update(transforms=["smooth"])
    found = [step for step in steps(config) if step[0] == "fit_transform" and step[2] == "smooth"]
    assert sorted(target for *_, target in found) == ["bf16--", "int4-channel", "int4-mse-channel"]


def test_what_a_transform_reads_depends_on_its_options():
    """A searched scaling is fitted to the cell, a given one is not; principal axes of activations
    need the statistics, those of weights do not."""
    config = {**content(), "report": {}, "exports": []}
    config["transforms"]["searched"] = {"method": "scaling", "search": True}
    for name, basis in (("klt", "activations"), ("axes", "weights")):
        config["transforms"][name] = {"method": "random_hadamard", "basis": basis}
    config["studies"]["methods"]["transforms"] = ["smooth", "searched", "klt", "axes"]
    made = plan(config)
    found = {
        name: made.fit_transform(Cell("tiny", name, "rtn", "channel", "int4"))
        for name in ("smooth", "searched", "klt", "axes")
    }
    assert {
        name: (step.wildcards["target"], "schemes" in step.spec, "statistics" in step.inputs)
        for name, step in found.items()
    } == {
        "smooth": ("any", False, True),
        "searched": ("int4-channel", True, True),
        "klt": ("any", False, True),
        "axes": ("any", False, False),
    }


def test_transforms_are_described_on_the_default_calibration_as_fitted_for_a_quantized_cell():
    config = content()
    config["transforms"] |= {"searched": {"method": "awq", "calibration": "other"}}
    config["report"], config["exports"] = {"distributions": ["searched", "rotation"]}, []
    config["studies"] = {
        "s": {
            "models": ["tiny"],
            "transforms": ["searched", "rotation"],
            "mitigations": ["rtn"],
            "granularities": ["channel"],
            "formats": ["bf16", "int4-mse", "int4"],
        }
    }
    plan = Plan(check(config))
    [(model, paths)] = plan.distributions().items()
    assert model == "tiny" and [path.split("/")[3:5] for path in paths] == [
        ["none", "any"],
        ["searched", "int4-mse-channel"],
        ["rotation-s0", "any"],
    ]
    steps = {step.wildcards["transform"]: step for step in plan.steps["measure_distributions"].values()}
    assert set(steps) == {"none", "searched", "rotation-s0"}
    assert all(
        "/default/" in step.inputs["statistics"] and step.outputs["distribution"] in paths for step in steps.values()
    )
    assert "/searched/int4-mse-channel/" in steps["searched"].inputs["transform"]
    without = Plan(check({**config, "report": {}}))
    assert (
        without.distributions() == {}
        and without.all_evaluations() == plan.all_evaluations()
        and not without.steps["measure_distributions"]
    )


def test_evaluations_are_those_that_a_study_asks_for():
    made = plan(content())
    rounded, full = Cell("tiny", "none", "rtn", "channel", "int4"), Cell("tiny", "none", "none", "-", "bf16")
    assert list(made.evaluations("methods")[rounded]) == ["error", "perplexity.docs"]
    assert list(made.evaluations("formats")[rounded]) == [
        "error",
        "perplexity.docs",
        "perplexity.more",
        "tasks",
        "residual_error.docs",
    ]
    assert list(made.evaluations("formats")[full]) == ["error", "perplexity.docs", "perplexity.more", "tasks"]
    shared = made.evaluations("methods")[rounded]
    # one file for both studies
    assert shared.items() <= made.evaluations("formats")[rounded].items()
    assert made.all_evaluations() == list(
        dict.fromkeys(path for study in ("methods", "formats", "bits") for path in made.study_inputs(study))
    )


# -- the specification of collect_study ------------------------------------------------------------


@pytest.mark.parametrize("study", ["methods", "formats", "bits"])
def test_a_study_is_planned_again_from_its_part_of_the_config(study):
    made = plan(content())
    spec = json.loads(made.study_spec(study))
    again = Plan(spec["config"])
    assert spec["study"] == study and list(spec["config"]["studies"]) == [study]
    assert again.evaluations(study) == made.evaluations(study)
    assert list(again.evaluations(study)) == list(made.evaluations(study)) == made.studies[study]


def test_a_study_whose_names_are_all_excluded_somewhere_is_planned_again():
    config = content()
    config["report"] = {}
    config["studies"]["methods"]["exclude"] = [
        {"transform": ["smooth", "rotation"]},
        {"mitigation": "lr8"},
        {"format": "int4-mse"},
        {"model": "big"},
    ]
    made = plan(config)
    assert Plan(json.loads(made.study_spec("methods"))["config"]).evaluations("methods") == made.evaluations("methods")


def test_the_part_of_a_study_leaves_out_what_its_cells_do_not_use():
    part = json.loads(plan(content()).study_spec("formats"))["config"]
    assert [list(part[axis]) for axis in AXES if axis in part] == [
        ["tiny"],
        [],
        ["tuned"],
        ["int4-mse"],
    ] and "report" not in part
    assert part["studies"]["formats"].keys().isdisjoint({"title", "table", "figure"})


def test_what_is_shown_reaches_the_table_the_figure_or_the_report_alone():
    before, config = plan(content()), content()
    config["studies"]["formats"]["table"] = {"rows": ["format"]}
    now = plan(config)
    assert now.study_spec("formats") == before.study_spec("formats")
    assert now.reporting_spec("tabulate_study", "formats") != before.reporting_spec("tabulate_study", "formats")
    assert now.reporting_spec("plot_study", "formats") == before.reporting_spec("plot_study", "formats")
    assert now.reporting_spec("tabulate_study", "methods") == before.reporting_spec("tabulate_study", "methods")
    spec = json.loads(now.reporting_spec("tabulate_study", "formats"))
    assert (
        spec["study"] == "formats"
        and spec["title"] == "Formats"
        and spec["table"]["rows"] == ["format"]
        and "figure" not in spec
    )


# -- size ------------------------------------------------------------------------------------------


def test_a_cell_is_checked_once_from_the_config_to_its_steps(monkeypatch: pytest.MonkeyPatch):
    checked: list[tuple[Cell, str]] = []
    monkeypatch.setattr(grid, "check_cell", lambda _, cell, where: checked.append((cell, where)))
    made = Plan(check({**content(), "exports": []}))
    made.all_steps()
    assert {cell for cell, _ in checked} >= {cell for cell in made.cells if cell.quantized}
    assert len(checked) == len({*checked})


@pytest.mark.slow
def test_ten_thousand_cells_expand_to_their_evaluations():
    config = deepcopy(content())
    config["transforms"] = {f"t{i}": {"method": "scaling", "alpha": i / 40} for i in range(40)}
    config["mitigations"] = {f"m{i}": {"method": "low_rank", "rank": i} for i in range(25)}
    config["formats"] = {f"f{i}": {"preset": "int4", "weight": {"clip_ratio": 1 - i / 20}} for i in range(10)}
    axes = {axis: list(config[axis]) for axis in ("transforms", "mitigations", "formats")}
    config["report"], config["exports"] = {}, []
    config["studies"] = {"large": {**axes, "models": ["big"], "granularities": ["channel"]}}
    checked = check(config)
    assert len(expand_studies(checked)) == 10_001
    assert len(set(Plan(checked).all_evaluations())) == 20_002


def test_trainings_read_windows_and_leave_losses():
    config = content()
    config["transforms"] |= {
        "turned": {"method": "optimized_rotation", "calibration": "other"},
        "free": {"method": "data_free_rotation"},
        "flat": {"method": "flatquant"},
    }
    config["report"], config["exports"] = {}, []
    config["studies"] = {
        "s": {
            "models": ["tiny"],
            "transforms": ["turned", "free", "flat", "smooth"],
            "mitigations": ["rtn", "lr8"],
            "granularities": ["channel"],
            "formats": ["int4", "int4-mse"],
        }
    }
    plan = Plan(check(config))
    fitted = {cell.transform: plan.fit_transform(cell) for cell in plan.cells}
    assert {name: set(step.inputs) for name, step in fitted.items()} == {
        "none": {"model"},
        "smooth": {"model", "statistics"},
        "free": {"model"},
        "turned": {"model", "windows"},
        "flat": {"model", "statistics", "windows"},
    }
    assert "/short/" in fitted["turned"].inputs["windows"] and "/text/" in fitted["flat"].inputs["windows"]
    names = [f"tiny, {name}, {scheme}-channel" for name in ("turned", "flat") for scheme in ("int4", "int4-mse")] + [
        "tiny, free"
    ]
    assert sorted(plan.trainings()) == sorted(names) and all(
        path.endswith("/losses.csv") for path in plan.trainings().values()
    )
    assert plan.trainings()["tiny, free"] == fitted["free"].outputs["losses"]
    tuned = Plan(check(content()))
    cell = Cell("tiny", "none", "tuned", "channel", "int4")
    step = tuned.quantize_model(cell)
    assert (
        tuned.trainings() == {"tiny, none, tuned, channel, int4": step.outputs["losses"]}
        and tuned.trains(cell) == "scales"
    )
    assert (
        set(step.inputs) == {"model", "transform", "statistics", "windows"}
        and step.spec["training"] == "scales"
        and step.spec["seed"] == 3
    )
    [shard] = tuned.shards("docs")
    assert set(tuned.evaluate_perplexity(cell, "docs", shard).inputs.values()) >= {
        step.outputs["checkpoint"],
        step.outputs["manifest"],
    }
    assert (
        step.outputs["losses"] not in tuned.all_checkpoints() and step.outputs["checkpoint"] in tuned.all_checkpoints()
    )
