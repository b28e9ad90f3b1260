"""Documents: links, tables, configs in code blocks, generated pages, size, navigation of the site."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from checkouts import ROOT
from quantgrid.config import read
from quantgrid.config.validation import check
from quantgrid.ground.errors import ConfigError
from quantgrid.models.families import FAMILIES

sys.path.insert(0, str(ROOT / "docs"))

import reference_pages

DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "config" / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SEPARATOR = re.compile(r"^\|(?: ?:?-+:? ?\|)+$", re.MULTILINE)
GENERATED = re.compile(r"^<!-- .+? -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
WIDEST = 8  # columns of a table that a forge shows without scrolling
LARGEST = 3_000_000  # bytes of docs/
TASK = ROOT / "texts" / "winogrande.jsonl.gz"
BASES = [read(ROOT / "config" / f"{name}.yaml") for name in ("first", "config")]  # what documents add to


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def prose(path: Path) -> str:
    """Text of a document without its code blocks."""
    return FENCED.sub("", path.read_text(encoding="utf-8"))


@cache
def anchors(path: Path) -> set[str]:
    """Anchors of the headlines of a document, as forges and the site form them."""
    headlines = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line) for line in headlines]
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in plain}


def broken(path: Path) -> Iterator[str]:
    """Links of a document to files or headlines that do not exist; addresses of the web are not followed."""
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(path))):
        file, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        found = (path.parent / file).resolve() if file else path
        if not found.exists() or (anchor and found.suffix == ".md" and anchor not in anchors(found)):
            yield target


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headlines(path: Path):
    assert list(broken(path)) == []


def test_a_broken_link_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# One `two`\n[a](#one-two) [b](#two) [c](absent.md) [d](https://absent.org) `[e](x.md)`\n")
    assert list(broken(page)) == ["#two", "absent.md"]


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.parent.name != "runs"], ids=name_of)
def test_no_table_is_wider_than_a_page(path: Path):
    """Those written by hand; ``docs/update.py`` splits the tables of runs."""
    written = GENERATED.sub("", prose(path))
    assert [line for line in SEPARATOR.findall(written) if line.count("|") - 1 > WIDEST] == []


def configs() -> list[tuple[str, str]]:
    """(document, block) of every block of YAML in the documents."""
    return [
        (name_of(path), block)
        for path in DOCUMENTS
        for language, block in FENCED.findall(path.read_text(encoding="utf-8"))
        if language == "yaml"
    ]


def merged(base: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    """A config with the sections of a block in it; a study of both has the keys of both."""
    content = deepcopy(base)
    for key, value in block.items():
        before = content.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            studies = {name: {**before.get(name, {}), **study} for name, study in value.items() if key == "studies"}
            value = {**before, **value, **studies}
        content[key] = value
    return content


def provided(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A config whose local models and tasks are some of the repository, and whose local texts are empty files."""
    for section, path in {"models": ROOT / "models" / "reference-1m", "tasks": TASK, "corpora": None}.items():
        for name, entry in content.get(section, {}).items():
            if "path" in entry:
                text = folder / Path(entry["path"]).name
                text.touch()
                content[section][name] = {**entry, "path": str(path or text)}
    return content


def mistakes(block: str, folder: Path) -> list[str]:
    """Refusals of a block of YAML, within the config that takes it better."""
    found = []
    for base in BASES:
        try:
            check(provided(merged(base, yaml.safe_load(block)), folder))
        except ConfigError as error:
            found.append(str(error).splitlines())
        else:
            found.append([])
    return min(found, key=len)


@pytest.mark.parametrize(("document", "block"), configs(), ids=[name for name, _ in configs()])
def test_configs_in_documents_are_accepted(document: str, block: str, tmp_path: Path):
    assert mistakes(block, tmp_path) == []


@pytest.mark.parametrize(
    "block",
    [
        "studys: {}",
        "models: {a: {source: local}}",
        "transforms: {a: {method: scaling, alfa: 1}}",
        "formats: {a: {preset: int9}}",
        "formats: {int3: {preset: int3, activation: null}}",
        "exports: [{model: small, cell: none/gptq/group-8/w4a16_g64, to: gguf}]",
        "models: {a: {source: local, path: a}}\nexports: [{model: a, cell: none/gptq/group-8/w4a16_g64, to: gguf}]",
    ],
)
def test_a_wrong_config_in_a_document_is_found(block: str, tmp_path: Path):
    assert mistakes(block, tmp_path)


def test_no_document_is_unfinished():
    unfinished = re.compile(r"\b(PENDING|TODO|FIXME|TBD)\b")
    assert [name_of(path) for path in DOCUMENTS if unfinished.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", reference_pages.PAGES)
def test_reference_pages_are_those_of_the_code(name: str):
    """``python docs/reference_pages.py`` writes them again."""
    assert (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8") == reference_pages.PAGES[name]()


def test_the_documents_are_small():
    files = [path for path in DOCS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < LARGEST
    assert sum(path.stat().st_size for path in files if path.suffix in (".xz", ".gz")) < 1e6
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_in_the_navigation_of_the_site():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"([\w./-]+\.md)$", text, re.MULTILINE)
    pages = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if "examples" not in path.parts]
    assert sorted(listed) == sorted([*pages, "contributing.md"])


def test_the_readme_counts_the_families():
    assert f"[{len(FAMILIES)} decoder families]" in (ROOT / "README.md").read_text(encoding="utf-8")
