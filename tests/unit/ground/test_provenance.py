"""Edits of quantgrid and the keys that they change; identities of files, versions, canonical JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from checkouts import edit
from plan_cases import content, plan
from quantgrid.ground import provenance
from quantgrid.ground.places import ROOT

TINY = ROOT / "tests" / "data" / "tiny-llama"
EXAMPLE = ROOT / "docs" / "examples" / "scaled_hadamard.py"


# -- the library itself ----------------------------------------------------------------------------

KEYS = """
import json, sys
from quantgrid.config import check
from quantgrid.plan.pipeline import Plan

study = {"models": ["tiny"], "transforms": ["none", "scaling"], "mitigations": ["rtn", "gptq", "low_rank", "gptq_low_rank"],
         "granularities": ["channel"], "formats": ["int4", "bf16"]}
corpora = {name: {"source": "builtin", "part": part, "window": 64} for name, part in (("text", "calibration"), ("docs", "evaluation"))}
plan = Plan(check({"models": {"tiny": {"source": "local", "path": sys.argv[1]}}, "corpora": corpora, "calibrations": {"default": {"corpus": "text"}},
                   "evaluate": {"perplexity": ["docs"]}, "studies": {"s": study}}))
plan.all_evaluations()
steps = [step for steps in plan.steps.values() for step in steps.values()]
print(json.dumps({"/".join([step.rule, *(value for name, value in step.wildcards.items() if name != "key")]): step.key for step in steps}))
"""  # noqa: E501


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy of what a plan is made of, where the tests below edit files."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "workflow" / "schemas", root / "workflow" / "schemas")
    return root


def keys(repository: Path) -> dict[str, str]:
    """rule/names of a step -> its key, by the code in ``repository``."""
    environment = {**os.environ, "PYTHONPATH": str(repository / "scripts"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", KEYS, str(TINY)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def unchanged(repository) -> dict[str, str]:
    return keys(repository)


@pytest.fixture
def changed(repository, unchanged) -> Callable[..., set[str]]:
    """``changed(names, added)``: the steps whose keys change when ``added`` is put at the end of
    these library files, for that time."""

    def steps(*names: str, added: str = "ADDED = 1") -> set[str]:
        files = [repository / "scripts" / "quantgrid" / f"{name}.py" for name in names]
        kept = {file: file.read_text() for file in files}
        try:
            for file in files:
                file.write_text(f"{kept[file]}\n\n{added}\n")
            found = keys(repository)
        finally:
            for file, text in kept.items():
                file.write_text(text)
        assert found.keys() == unchanged.keys()
        return {step for step, key in found.items() if key != unchanged[step]}

    return steps


def rules(steps: set[str]) -> set[str]:
    return {step.split("/")[0] for step in steps}


@pytest.mark.parametrize(
    ("method", "users"),
    [
        ("gptq", {"gptq", "gptq_low_rank"}),
        ("low_rank", {"low_rank", "gptq_low_rank"}),
        ("gptq_low_rank", {"gptq_low_rank"}),
    ],
)
def test_an_edit_of_a_mitigation_reruns_the_cells_that_use_it(changed, unchanged, method, users):
    found = changed(f"mitigations/methods/{method}")
    assert found == {
        step
        for step in unchanged
        if rules({step}) <= {"quantize_model", "evaluate_perplexity", "merge_shards"} and users & set(step.split("/"))
    }
    assert rules(found) == {"quantize_model", "evaluate_perplexity", "merge_shards"} and not any(
        "/rtn/" in step for step in found
    )


def test_an_edit_of_a_transform_reruns_its_cells(changed):
    found = changed("transforms/primitives/scale")
    assert all("scaling" in step.split("/") for step in found)
    assert rules(found) == {
        "fit_transform",
        "gate_transform",
        "quantize_model",
        "evaluate_perplexity",
        "merge_shards",
    }


def test_an_edit_of_the_tokenization_reruns_all_that_reads_tokens(changed, unchanged):
    found = changed("corpora/token_windows")
    assert {
        step for step in unchanged if step.startswith(("tokenize_corpus/", "calibrate_model/", "evaluate_"))
    } <= found
    assert not any(step.startswith("fetch_model/") for step in found)
    assert "fit_transform/tiny/none/any" not in found and "fit_transform/tiny/scaling/any" in found


def test_what_a_specification_carries_and_what_only_reports_change_no_key(changed):
    assert (
        changed(
            "config/registry",
            "config/cell_checks",
            "config/cells",
            "config/entries",
            "config/grid",
            "config/entry_mistakes",
            "config/mistakes",
            "config/study_mistakes",
            "config/validation",
            "config/study_defaults",
            "plan/cell_steps",
            "plan/evaluation_steps",
            "plan/shards",
            "plan/pipeline",
            "ground/code_digests",
            "ground/provenance",
            "ground/syntax_trees",
            "schemes/granularities",
            "mitigations/methods/__init__",
            "reporting/tables/study_tables",
            "reporting/data/collection",
            "reporting/data/evaluation_rows",
        )
        == set()
    )


def test_comments_change_no_key(changed):
    assert (
        changed(
            "mitigations/methods/gptq",
            "quantizer/tensors",
            "ground/storage",
            "evaluation/perplexity",
            added="# a comment",
        )
        == set()
    )


def test_a_new_method_changes_no_key(repository, unchanged):
    method = repository / "scripts" / "quantgrid" / "transforms" / "recipes" / EXAMPLE.name
    registry = repository / "scripts" / "quantgrid" / "config" / "transform_methods.py"
    before = registry.read_text()
    line = next(
        line for line in EXAMPLE.read_text().splitlines() if line.strip().startswith('"scaled_hadamard": Method(')
    )
    try:
        shutil.copy(EXAMPLE, method)
        edit(
            registry,
            '    "none": Method("transforms.recipes.none"',
            f'{line}\n    "none": Method("transforms.recipes.none"',
        )
        assert keys(repository) == unchanged
    finally:
        method.unlink()
        registry.write_text(before)


# -- files, versions, JSON -------------------------------------------------------------------------


def test_the_fingerprint_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    first = provenance.fingerprint(tmp_path / "a.txt")
    assert first == {"a.txt": "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"}
    os.utime(tmp_path / "a.txt", (1, 1))
    assert provenance.fingerprint(tmp_path / "a.txt") == first
    (tmp_path / "a.txt").write_text("next")
    assert provenance.fingerprint(tmp_path / "a.txt") != first


def test_the_fingerprint_of_a_folder_names_its_files_and_not_where_it_lies(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "deeper").mkdir(parents=True)
        for name in ("b.safetensors", "a.json", "README.md", "deeper/c.json"):
            (tmp_path / folder / name).write_text(name)
    assert list(provenance.fingerprint(tmp_path / "one")) == ["a.json", "b.safetensors"]
    assert provenance.fingerprint(tmp_path / "one") == provenance.fingerprint(str(tmp_path / "two"))


def test_a_large_file_is_known_by_size_and_time(tmp_path):
    (tmp_path / "a").write_bytes(b"0" * 100)
    os.utime(tmp_path / "a", ns=(1, 1))
    assert provenance.fingerprint(tmp_path / "a", whole_below=100) == {"a": "100 bytes, changed 1"}
    os.utime(tmp_path / "a", ns=(2, 2))
    assert provenance.fingerprint(tmp_path / "a", whole_below=100) == {"a": "100 bytes, changed 2"}
    assert len(provenance.fingerprint(tmp_path / "a", whole_below=101)["a"]) == 64


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    assert provenance.fingerprint("~/a.txt") == provenance.fingerprint(tmp_path / "a.txt")


def test_versions_are_those_installed_without_the_build():
    found = provenance.versions("torch", "no-such-package")
    assert found["no-such-package"] == "absent" and found["torch"][0].isdigit() and "+" not in found["torch"]


def test_canonical_json_is_the_same_for_equal_content():
    assert (
        provenance.canonical({"b": [1, 2.5, None, True], "a": {"d": "ä", "c": 1}})
        == '{"a":{"c":1,"d":"ä"},"b":[1,2.5,null,true]}'
    )
    assert provenance.canonical({"x": (1, 2)}) == provenance.canonical({"x": [1, 2]})
    assert provenance.canonical({"x": [1, 2]}) != provenance.canonical({"x": [2, 1]})
    assert json.loads(provenance.canonical({"x": [1, {"y": 2}]})) == {"x": [1, {"y": 2}]}


def test_the_digest_is_short_hexadecimal_and_follows_the_content_alone():
    assert provenance.digest({"a": 1, "b": 2}) == provenance.digest({"b": 2, "a": 1}) == "43258cff78"
    assert provenance.digest({"a": 1}) != provenance.digest({"a": 1.0}) and len(provenance.digest({}, 16)) == 16
    assert set(provenance.digest("text")) <= set("0123456789abcdef")


def test_packages_that_compute_in_some_methods_alone_are_named_by_these():
    """Of the numerics that not every job uses: geoopt moves learned rotations, scipy finds singular
    vectors."""
    assert provenance.solvers("fit_transform", "transforms.recipes.optimized_rotation") == ("geoopt",)
    assert provenance.solvers("train_mitigation", "mitigations.methods.tune_scales") == ("geoopt",)
    assert provenance.solvers("quantize_model", "mitigations.methods.low_rank") == ("scipy",)
    assert provenance.solvers("fit_transform", "transforms.recipes.none") == provenance.solvers("tokenize_corpus") == ()


def test_versions_of_these_packages_are_in_the_keys():
    steps = plan(content()).steps
    found = {step.spec["mitigation"]["method"]: step.spec["versions"] for step in steps["quantize_model"].values()}
    assert found["low_rank"]["scipy"] == version("scipy") and "scipy" not in found["rtn"]
    assert (
        all(step.spec["versions"]["geoopt"] == version("geoopt") for step in steps["train_mitigation"].values())
        and steps["train_mitigation"]
    )
