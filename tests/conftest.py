"""Fixtures shared by the tests of the workflow, and the order in which files of tests start."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

import selection
from checkouts import RESULT_FILES, Checkout, one_cell

if TYPE_CHECKING:
    from family_cases import FamilyModel


def pytest_configure() -> None:
    """Take Ctrl-C as usual, also where a shell started the tests in the background and so let them
    ignore it: jobs inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave most of the large products to `make test-nightly`. Start the files with runs of the
    workflow first: they are the longest, and none should be left over for one process at the end."""
    selection.thin(items)
    workflow = {item.path for item in items if item.get_closest_marker("workflow")}
    items.sort(key=lambda item: item.path not in workflow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show which files took longest, fixtures included: what a shorter suite starts with."""
    seconds: Counter[str] = Counter()
    for report in (report for found in terminalreporter.stats.values() for report in found):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.split("::")[0]] += report.duration
    terminalreporter.section("slowest 20 files")
    for name, taken in seconds.most_common(20):
        terminalreporter.write_line(f"{taken:8.1f} s {name}")


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Fail a test that leaves a variable of quantgrid set, such as the address of a fork server:
    later tests of the process would find it."""
    before = _settings()
    yield
    assert _settings() == before, "the test changed the environment of its process"


def _settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("QUANTGRID_")}


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder of this test run, made by the first of its processes that asks for it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    finished = folder.with_name(f"{name}.finished")
    with FileLock(f"{folder}.lock"):
        if not finished.exists():
            make(folder)
            finished.touch()
    return folder


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which the smoke config ran from nothing to its report. Tests outside of
    test_workflow.py read it or take a copy."""
    return Checkout(made_once(tmp_path_factory, "smoke", lambda folder: Checkout.make(folder).run("smoke")))


@pytest.fixture(scope="session")
def one_cell_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Result files of a run of the smoke config, reduced to one cell, on this machine."""
    folder = made_once(tmp_path_factory, "one-cell", lambda folder: one_cell(Checkout.make(folder)).run("smoke"))
    return Checkout(folder).contents("results-smoke", *RESULT_FILES)


@pytest.fixture(scope="session")
def family_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FamilyModel]:
    """The tiny model of an architecture, made once. Tests read it or take a copy."""
    from family_cases import FamilyModel

    return cache(lambda name: FamilyModel.make(name, tmp_path_factory.mktemp(name) / "model"))
