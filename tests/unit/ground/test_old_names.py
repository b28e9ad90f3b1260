"""Renamed config keys and values: none is accepted under its old name, and each message leads to a
name that is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from quantgrid.config import read, registry
from quantgrid.config.schema_mistakes import SCHEMA
from quantgrid.config.study_mistakes import require_study
from quantgrid.ground.errors import ConfigError, unknown_name
from quantgrid.ground.old_names import OLD_NAMES, OLD_STUDIES
from quantgrid.ground.places import ROOT


def words(schema: Any) -> Iterator[str]:
    """Keys and values that the schema of configs accepts by name."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {}) if isinstance(schema.get("properties"), dict) else ()
        yield from schema.get("enum", ()) if isinstance(schema.get("enum"), list) else ()
        schema = list(schema.values())
    for inner in schema if isinstance(schema, list) else ():
        yield from words(inner)


@pytest.fixture(scope="module")
def accepted() -> set[str]:
    methods = {name: method for known in registry.METHODS.values() for name, method in known.items()}
    options = {option for method in methods.values() for option in method.options}
    return {*words(yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))), *methods, *options}


@pytest.mark.parametrize("old", OLD_NAMES)
def test_an_old_name_is_refused_and_leads_to_an_accepted_one(old, accepted):
    new = OLD_NAMES[old]
    assert old not in accepted and new in accepted
    names = sorted([new, f"{old}s"])
    assert (
        unknown_name("key", old, names)
        == f"unknown key '{old}' - it was renamed to '{new}'. Accepted: {', '.join(names)}"
    )


def test_an_old_name_is_no_hint_where_its_new_one_is_not_accepted():
    assert (
        unknown_name("corpus", "depth", ["depths", "docs"])
        == "unknown corpus 'depth' - did you mean 'depths'? Accepted: depths, docs"
    )


@pytest.mark.parametrize(
    ("kind", "written", "meant"),
    [("mitigations", "GPTQ", "gptq"), ("transforms", "OSTQuant", "ostquant"), ("transforms", "Hadamrd", "hadamard")],
)
def test_a_hint_ignores_capitals(kind, written, meant):
    names = [*registry.METHODS[kind], "ostquant", "hadamard"]
    assert f" - did you mean '{meant}'?" in unknown_name(kind, written, names)


@pytest.mark.parametrize("old", OLD_STUDIES)
def test_the_old_name_of_a_study_is_refused_and_leads_to_one_of_the_configs(old):
    new = OLD_STUDIES[old]
    known = [read(path)["studies"] for path in sorted((ROOT / "config").glob("*.yaml")) if path.name != "claims.yaml"]
    configs = [studies for studies in known if new in studies]
    assert configs and not any(old in studies for studies in known)
    for studies in configs:
        require_study(new, studies, "config.yaml")
        with pytest.raises(ConfigError, match=f"^config.yaml: study '{old}' was renamed to '{new}'$"):
            require_study(old, studies, "config.yaml")


def test_the_old_name_of_a_study_is_an_unknown_name_in_other_configs():
    with pytest.raises(ConfigError, match=r"^config.yaml: unknown study 'depth' - did you mean 'depths'\?"):
        require_study("depth", ["depths"], "config.yaml")
    require_study("depth", ["depth"], "config.yaml")


def test_a_missing_study_is_said_with_what_there_is():
    with pytest.raises(ConfigError, match=r"^STUDY: no study is named; name one, as in STUDY=a; c.yaml has a, b$"):
        require_study("", ["a", "b"], "c.yaml")
