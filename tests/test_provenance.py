"""What enters a key: which edits of the code change a hash and which leave it, identities of files, canonical JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from plan_cases import content, plan
from quantgrid import provenance

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "data" / "tiny-llama"
EXAMPLE = ROOT / "docs" / "examples" / "scaled_hadamard.py"

FILES = {  # a library small enough that every edge of its import graph is visible
    "job.py": '''
        """The script of a rule."""
        from quantgrid import storage
        from quantgrid.config import load
        from quantgrid.numerics.solver import solve
    ''',
    "other.py": "import quantgrid.storage",
    "lazy.py": "def main():\n    from quantgrid.numerics import inner\n    import math\n    return inner, math",
    "quantgrid/__init__.py": "",
    "quantgrid/storage.py": "import json",
    "quantgrid/unused.py": "VALUE = 1",
    "quantgrid/config.py": "from . import unused",
    "quantgrid/grid.py": "from . import unused",
    "quantgrid/pipeline.py": "from . import unused",
    "quantgrid/registry.py": "from . import unused",
    "quantgrid/provenance.py": "from . import unused",
    "quantgrid/numerics/__init__.py": "from ..unused import VALUE",
    "quantgrid/numerics/solver.py": '''
        """Solves."""
        from ..registry import nothing
        from .inner import scale


        class Solver:
            """A class."""

            def run(self, x):
                """Run."""
                # a comment
                return 2 * x


        def solve(x):
            """Solve."""
            return scale(x) + 1
    ''',
    "quantgrid/numerics/inner.py": "from __future__ import annotations\n\nfrom quantgrid.numerics import grid\n\nFACTOR = 3\n",
    "quantgrid/numerics/grid.py": "STEP = 1",  # shares its name with a module that is left out, and is none
}


@pytest.fixture
def library(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of a small library of scripts, where :mod:`quantgrid.provenance` looks for now."""
    for name, text in FILES.items():
        path = tmp_path / "scripts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.setattr(provenance, "SCRIPTS", tmp_path / "scripts")
    monkeypatch.setattr(provenance, "LIBRARY", tmp_path / "scripts" / "quantgrid")
    yield tmp_path / "scripts"
    forget()


def forget() -> None:
    """Within a process files are taken not to change."""
    provenance.code_hash.cache_clear()
    provenance._parsed.cache_clear()


def code(script: str = "job", *modules: str) -> str:
    """The code hash of the files as they are now."""
    forget()
    return provenance.code_hash(script, *modules)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(("old", "new"), [
    ("# a comment", "# another comment\n\n        # and one more"),
    ('"""Solves."""', '"""Solves it\n\nbetter."""'),
    ('"""Solves."""', ""),
    ('"""A class."""', '"""The class."""'),
    ('    """Solve."""\n', ""),
    ('    """Run."""\n', '    r"""Runs."""\n'),
    ("return 2 * x", "return (2\n                * x)"),
    ("\n\n\ndef solve", "\n\n\n\n\n\ndef solve"),
])
def test_comments_docstrings_and_layout_change_no_hash(library, old, new):
    before = code()
    edit(library / "quantgrid/numerics/solver.py", old, new)
    assert code() == before


@pytest.mark.parametrize(("name", "old", "new"), [
    ("job.py", "from quantgrid import storage", "import quantgrid.storage"),
    ("quantgrid/numerics/solver.py", "return 2 * x", "return 3 * x"),
    ("quantgrid/numerics/solver.py", "scale(x) + 1", "scale(x) + 1.0"),
    ("quantgrid/numerics/solver.py", "def solve(x)", "def solve(x, y=None)"),
    ("quantgrid/numerics/inner.py", "FACTOR = 3", "FACTOR = 4"),
    ("quantgrid/numerics/grid.py", "STEP = 1", "STEP = 2"),
    ("quantgrid/storage.py", "import json", "import json, os"),
])
def test_a_formula_changes_the_hash_of_all_that_use_it(library, name, old, new):
    before = code()
    edit(library / name, old, new)
    assert code() != before
    edit(library / name, new, old)
    assert code() == before  # an edit taken back costs nothing


@pytest.mark.parametrize("name", ["config", "grid", "pipeline", "registry", "provenance", "unused", "__init__", "numerics/__init__"])
def test_what_reaches_a_job_through_its_specification_is_left_out_and_so_is_what_it_alone_imports(library, name):
    before = code()
    (library / "quantgrid" / f"{name}.py").write_text("VALUE = 'another'")
    assert code() == before


def test_other_scripts_and_new_files_change_nothing(library):
    before = code()
    (library / "other.py").write_text("import quantgrid.unused")
    (library / "quantgrid/numerics/another.py").write_text("VALUE = 5")
    assert code() == before


def test_imports_inside_functions_and_plain_imports_are_followed(library):
    lazy, other = code("lazy"), code("other")
    edit(library / "quantgrid/numerics/inner.py", "FACTOR = 3", "FACTOR = 4")
    assert code("lazy") != lazy and code("other") == other
    edit(library / "quantgrid/storage.py", "import json", "import math")
    assert code("other") != other


def test_a_method_is_named_beside_the_script(library):
    before = {name: code("other", name) for name in ("unused", "numerics.solver", "numerics.inner")}
    assert len({code("other"), *before.values()}) == 4
    edit(library / "quantgrid/numerics/solver.py", "2 * x", "4 * x")
    changed = {name for name, value in before.items() if code("other", name) != value}
    assert changed == {"numerics.solver"}
    edit(library / "quantgrid/numerics/inner.py", "FACTOR = 3", "FACTOR = 9")
    assert code("other", "numerics.inner") != before["numerics.inner"]


def test_the_name_of_a_file_counts(library):
    before = code("other", "numerics.inner")
    shutil.copy(library / "quantgrid/numerics/inner.py", library / "quantgrid/numerics/twin.py")
    assert code("other", "numerics.twin") != before


# -- the library itself -------------------------------------------------------------------------------------------------------------------

KEYS = """
import json, sys
from quantgrid.config import check
from quantgrid.pipeline import Plan

study = {"models": ["tiny"], "transforms": ["none", "scaling"], "mitigations": ["rtn", "gptq", "low_rank", "gptq_low_rank"],
         "granularities": ["channel"], "formats": ["int4", "bf16"]}
corpora = {name: {"source": "builtin", "part": part, "window": 64} for name, part in (("text", "calibration"), ("docs", "evaluation"))}
plan = Plan(check({"models": {"tiny": {"source": "local", "path": sys.argv[1]}}, "corpora": corpora, "calibrations": {"default": {"corpus": "text"}},
                   "evaluate": {"perplexity": ["docs"]}, "studies": {"s": study}}))
plan.all_evaluations()
steps = [step for steps in plan.steps.values() for step in steps.values()]
print(json.dumps({"/".join([step.rule, *(value for name, value in step.wildcards.items() if name != "key")]): step.key for step in steps}))
"""


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
    """``changed(names, added)``: the steps whose keys change when ``added`` is put at the end of these library files, for that time."""
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


@pytest.mark.parametrize(("method", "users"), [("gptq", {"gptq", "gptq_low_rank"}), ("low_rank", {"low_rank", "gptq_low_rank"}),
                                               ("gptq_low_rank", {"gptq_low_rank"})])
def test_an_edit_of_a_mitigation_reruns_the_cells_that_use_it(changed, unchanged, method, users):
    found = changed(f"mitigations/{method}")
    assert found == {step for step in unchanged if rules({step}) <= {"quantize_model", "evaluate_perplexity"} and users & set(step.split("/"))}
    assert rules(found) == {"quantize_model", "evaluate_perplexity"} and not any("/rtn/" in step for step in found)


def test_an_edit_of_a_transform_reruns_its_cells(changed):
    found = changed("transforms/scale")
    assert all("scaling" in step.split("/") for step in found)
    assert rules(found) == {"fit_transform", "quantize_model", "evaluate_perplexity"}


def test_an_edit_of_the_tokenization_reruns_all_that_reads_tokens(changed, unchanged):
    found = changed("corpora")
    assert {step for step in unchanged if step.startswith(("tokenize_corpus/", "calibrate_model/", "evaluate_"))} <= found
    assert not any(step.startswith("fetch_model/") for step in found)
    assert "fit_transform/tiny/none/any" not in found and "fit_transform/tiny/scaling/any" in found


def test_what_a_specification_carries_and_what_only_reports_change_no_key(changed):
    assert changed("registry", "grid", "config", "layouts", "pipeline", "provenance", "granularities", "mitigations/__init__", "reporting/tables",
                   "reporting/collection") == set()


def test_comments_change_no_key(changed):
    assert changed("mitigations/gptq", "quantizer", "storage", "evaluation/perplexity", added="# a comment") == set()


def test_a_new_method_changes_no_key(repository, unchanged):
    method = repository / "scripts" / "quantgrid" / "transforms" / EXAMPLE.name
    registry = repository / "scripts" / "quantgrid" / "registry.py"
    before = registry.read_text()
    line = next(line for line in EXAMPLE.read_text().splitlines() if line.strip().startswith('"scaled_hadamard": Method('))
    try:
        shutil.copy(EXAMPLE, method)
        edit(registry, '    "none": Method("transforms.none"', f'{line}\n    "none": Method("transforms.none"')
        assert keys(repository) == unchanged
    finally:
        method.unlink()
        registry.write_text(before)


# -- files, versions, JSON ----------------------------------------------------------------------------------------------------------------


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
    assert provenance.canonical({"b": [1, 2.5, None, True], "a": {"d": "ä", "c": 1}}) == '{"a":{"c":1,"d":"ä"},"b":[1,2.5,null,true]}'
    assert provenance.canonical({"x": (1, 2)}) == provenance.canonical({"x": [1, 2]})
    assert provenance.canonical({"x": [1, 2]}) != provenance.canonical({"x": [2, 1]})
    assert json.loads(provenance.canonical({"x": [1, {"y": 2}]})) == {"x": [1, {"y": 2}]}


def test_the_digest_is_short_hexadecimal_and_follows_the_content_alone():
    assert provenance.digest({"a": 1, "b": 2}) == provenance.digest({"b": 2, "a": 1}) == "43258cff78"
    assert provenance.digest({"a": 1}) != provenance.digest({"a": 1.0}) and len(provenance.digest({}, 16)) == 16
    assert set(provenance.digest("text")) <= set("0123456789abcdef")


def test_packages_that_compute_in_some_methods_alone_are_named_by_these():
    """Of the numerics that not every job uses: geoopt moves learned rotations, scipy finds singular vectors."""
    assert provenance.solvers("fit_transform", "transforms.optimized_rotation") == ("geoopt",)
    assert provenance.solvers("train_model", "mitigations.finetune_blocks") == ("geoopt",)
    assert provenance.solvers("quantize_model", "mitigations.low_rank") == ("scipy",)
    assert provenance.solvers("fit_transform", "transforms.none") == provenance.solvers("tokenize_corpus") == ()


def test_versions_of_these_packages_are_in_the_keys():
    steps = plan(content()).steps
    found = {step.spec["mitigation"]["method"]: step.spec["versions"] for step in steps["quantize_model"].values()}
    assert found["low_rank"]["scipy"] == version("scipy") and "scipy" not in found["rtn"]
    assert all(step.spec["versions"]["geoopt"] == version("geoopt") for step in steps["train_model"].values()) and steps["train_model"]
