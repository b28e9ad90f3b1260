"""Tables that no code hash covers (methods, presets, defaults): no job computes anything from them,
only from its specification.

All of them are perturbed at once, after the jobs have been planned: every name leads to the entry
of another one.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import pkgutil
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantgrid.config import registry, validation
from quantgrid.ground import provenance
from quantgrid.ground.places import LIBRARY, ROOT, SCRIPTS
from quantgrid.ground.provenance import canonical
from quantgrid.plan import pipeline
from quantgrid.plan.steps import GATHERED, OUTPUTS, Step
from quantgrid.schemes import presets

DATA = ROOT / "tests" / "data"
LISTED = dict(GATHERED)  # a copy, which is not perturbed
# lm-eval takes seconds to import, its modules are executed below; a first look of a race runs two scripts
# of other rules, and a decision plans
NOT_RUN = {"evaluate_tasks", "screen_cell", "decide_race"}
CONFIG = {
    "seed": 3,
    "compute": {"device": "cpu", "dtype": "float32"},
    "models": {"tiny": {"source": "local", "path": str(DATA / "tiny-llama")}},
    "corpora": {
        "text": {"source": "local", "path": str(DATA / "smoke-calibration.txt"), "windows": 20, "window": 16},
        "docs": {"source": "local", "path": str(DATA / "smoke-evaluation.txt"), "windows": 2, "window": 16},
    },
    "calibrations": {"default": {"corpus": "text", "samples": 16}},
    "transforms": {
        "searched": {"method": "outlier_suppression_plus", "points": 2},
        "turned": {"method": "data_free_rotation", "steps": 1},
    },
    "mitigations": {
        "in-turn": {"method": "gptq_low_rank", "rank": 2, "factors": "int8", "propagation": "sequential"},
        "narrow": {"method": "low_rank", "rank": 2, "factors": "fp8"},
        "narrower": {"method": "low_rank", "rank": 2, "factors": "int4"},
        "tuned": {"method": "tune_scales", "steps": 1, "base": "gptq"},
    },
    "formats": {"shared": {"allocate": {"budget": 7, "schemes": ["w4a16", "w8a16"]}}},
    "evaluate": {"perplexity": ["docs"], "residual_error": ["docs"]},
    "report": {"distributions": ["searched"]},
    "exports": [{"model": "tiny", "format": "w8a16", "to": "dense"}],
    "studies": {
        "all": {
            "models": ["tiny"],
            "transforms": ["searched"],
            "mitigations": ["in-turn", "narrow", "narrower", "tuned"],
            "granularities": ["channel"],
            "formats": ["int4"],
            "also": [
                {"transforms": ["turned"], "mitigations": ["rtn"], "formats": ["nvfp4"], "granularities": ["native"]},
                {"transforms": ["none"], "mitigations": ["rtn"], "formats": ["w8a16"]},
                {"transforms": ["none"], "mitigations": ["gptq"], "formats": ["shared"], "granularities": ["native"]},
            ],
        }
    },
}


def left_out() -> Iterator[ModuleType]:
    """Every module that code hashes leave out, those of packages too."""
    for name in sorted(provenance._LEFT_OUT):
        module = importlib.import_module(f"quantgrid.{name}")
        yield module
        for inner in pkgutil.iter_modules(getattr(module, "__path__", ())):
            yield importlib.import_module(f"{module.__name__}.{inner.name}")


def tables() -> Iterator[tuple[ModuleType, str, Any]]:
    """(module, name, value) of every mapping and text at the top of a module that code hashes leave
    out."""
    for module in left_out():
        for node in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for name in [
                name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)
            ]:
                if isinstance(value := getattr(module, name, None), (dict, str)):
                    yield module, name, value


@contextmanager
def perturbed() -> Iterator[None]:
    """Every table with its entries in each other's places, whoever has imported it; every text
    another one."""
    with pytest.MonkeyPatch.context() as patch:
        for _, name, value in list(tables()):
            if isinstance(value, dict):
                keys, values = list(value), list(value.values())
                for key, other in zip(keys, values[1:] + ([None] if len(values) == 1 else values[:1])):
                    patch.setitem(value, key, other)
            else:
                for holder in [module for found, module in sys.modules.items() if found.startswith("quantgrid.")]:
                    if getattr(holder, name, None) is value:
                        patch.setattr(holder, name, f"{value}-perturbed")
        yield


def run(step: Step, folder: Path, patch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Contents of all files that the job of ``step`` writes below ``folder``, in this process."""
    outputs = {name: str(folder / step.rule / step.key / Path(path).name) for name, path in step.outputs.items()}
    for path in outputs.values():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    inputs = {f"--{name}": [path] for name, path in step.inputs.items()}
    if step.rule in LISTED:
        inputs = {f"--{LISTED[step.rule]}": list(step.inputs.values())}
    words = [word for name, paths in inputs.items() for word in (name, *paths)]
    words += [word for name, path in outputs.items() for word in (f"--{name}", path)]
    patch.setattr(sys, "argv", [step.rule, "--spec", canonical(step.spec), *words])
    importlib.import_module(step.rule).main()
    written = [
        file for path in map(Path, outputs.values()) for file in ([path] if path.is_file() else sorted(path.rglob("*")))
    ]
    return {str(file.relative_to(folder)): file.read_bytes() for file in written if file.is_file()}


def planned(folder: Path) -> pipeline.Plan:
    made = pipeline.Plan(validation.check(json.loads(json.dumps(CONFIG | {"results_dir": str(folder)}))))
    made.all_steps()
    return made


def test_the_tables_are_found():
    found = {(module.__name__.rpartition(".")[2], name) for module, name, _ in tables()}
    assert {
        ("presets", "PRESETS"),
        ("transform_methods", "TRANSFORMS"),
        ("mitigation_methods", "MITIGATIONS"),
        ("registry", "METHODS"),
        ("registry", "SEQUENTIAL"),
        ("validation", "DEFAULTS"),
        ("cells", "AXES"),
    } <= found
    plain = presets.PRESETS["int8"], registry.TRANSFORMS["none"]
    with perturbed():
        assert (
            presets.PRESETS["int8"],
            registry.TRANSFORMS["none"],
        ) != plain and registry.SEQUENTIAL != "quantization.sequential"
    assert (presets.PRESETS["int8"], registry.TRANSFORMS["none"]) == plain


@pytest.mark.slow
def test_no_job_computes_anything_else_once_the_tables_change(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    steps, broken = planned(tmp_path / "results").steps, b'"status":"failed"'
    assert all(steps[rule] for rule in OUTPUTS if rule not in NOT_RUN)
    for rule in OUTPUTS:
        for step in steps[rule].values():
            wanted = run(step, tmp_path / "plain", monkeypatch)
            for path in map(Path, step.outputs.values()):  # where the next steps read it
                path.parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "plain" / rule / step.key / path.name).rename(path)
            with perturbed():
                found = run(step, tmp_path / "perturbed", monkeypatch)
            assert wanted.keys() == found.keys(), step.wildcards
            assert [name for name in wanted if wanted[name] != found[name]] == [], step.wildcards
            assert not any(broken in text.replace(b" ", b"") for text in wanted.values()), step.wildcards


def modules_of_jobs() -> set[Path]:
    """Every module below the library that the code hash of some job covers."""
    wanted = {method.module for methods in registry.METHODS.values() for method in methods.values()} | {
        registry.SEQUENTIAL
    }
    code = provenance._code()
    found = code.closure(*(SCRIPTS / f"{rule}.py" for rule in OUTPUTS), *map(code.file, wanted))
    return {path for path in found if path.is_relative_to(LIBRARY)}


def constants(path: Path) -> dict[str, str]:
    """The constants of a module, executed anew apart from the imported one, as text without
    addresses."""
    dotted = ".".join(path.relative_to(SCRIPTS).with_suffix("").parts)
    importlib.import_module(dotted)  # dataclasses look their module up
    specification = importlib.util.spec_from_file_location(dotted, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return {
        name: re.sub(r"0x[0-9a-f]+", "", repr(value))
        for name, value in vars(module).items()
        if name.strip("_").isupper()
    }


@pytest.mark.slow
def test_no_module_of_a_job_takes_constants_from_the_tables():
    """A constant taken from a table is computed at import; perturbed tables do not reach it."""
    imported = {
        name for module, name, _ in tables()
    }  # a table that is merely imported is used, if at all, by the jobs above
    for path in sorted(modules_of_jobs()):
        wanted = constants(path)
        with perturbed():
            found = constants(path)
        assert [name for name in wanted if name not in imported and wanted[name] != found[name]] == [], path
