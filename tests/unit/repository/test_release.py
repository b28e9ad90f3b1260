"""Metadata of a release: one version everywhere, and the requirements of the Snakemake workflow
catalog."""

from __future__ import annotations

import re
import tomllib

import yaml

from checkouts import ROOT


def test_one_version_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
    assert f'tag="v{version}"' in (ROOT / "docs" / "examples" / "module" / "Snakefile").read_text()


def test_the_catalog_finds_what_it_asks_for():
    """The catalog requires a Snakefile, the mandatory flags, the deployment of software, and a
    description of every config."""
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert set(usage) == {"mandatory-flags", "software-stack-deployment", "report"} and set(
        usage["mandatory-flags"]
    ) == {"desc", "flags"}
    deployed = usage["software-stack-deployment"]
    assert deployed == {"conda": True, "apptainer": False, "apptainer+conda": False}
    assert "\n    conda:\n" in (ROOT / "workflow" / "rules" / "preparation.smk").read_text()
    assert (ROOT / "Snakefile").is_file() and (ROOT / "README.md").is_file() and (ROOT / "LICENSE").is_file()
    described = (ROOT / "config" / "README.md").read_text()
    assert not [
        path.name
        for path in (ROOT / "config").iterdir()
        if path.suffix in (".yaml", ".csv") and f"`{path.name}`" not in described
    ]
