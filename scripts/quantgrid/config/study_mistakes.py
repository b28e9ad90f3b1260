"""Mistakes in the studies of a config: contradictory cells, trainings without data, comparisons
without cells, studies without evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from ..ground.errors import ConfigError, unknown_name
from ..ground.old_names import OLD_STUDIES
from . import entries, grid, registry, shown_transforms, study_defaults
from .cells import Cell
from .methods import Method
from .mistakes import collected
from .races import race_mistakes


def require_study(study: str, studies: Iterable[str], where: str) -> None:
    """Raise :class:`ConfigError` if ``study`` is not among ``studies`` of the config file ``where``."""
    if study in studies:
        return
    if not study:
        names = list(studies)
        raise ConfigError(f"STUDY: no study is named; name one, as in STUDY={names[0]}; {where} has {', '.join(names)}")
    if (new := OLD_STUDIES.get(study, "")) in studies:
        raise ConfigError(f"{where}: study '{study}' was renamed to '{new}'")
    raise ConfigError(f"{where}: {unknown_name('study', study, studies)}")


def study_mistakes(config: Mapping[str, Any]) -> Iterator[str]:
    """List mistakes in studies, after :func:`.entry_mistakes.name_mistakes` has found none."""
    for name in (name for name, study in config["studies"].items() if "race" in study):
        yield from race_mistakes(config, name, grid.asked(config, config["studies"][name]))
    cells = _cells(config)
    yield from collected(lambda: _check_trainings(config, (cell for name in config["studies"] for cell in cells(name))))
    for name in config["studies"]:
        yield from collected(
            lambda name=name: _check_compare(config["studies"][name].get("compare"), cells(name), name)
        )
        asked = grid.asked(config, config["studies"][name])
        if asked["perplexity"] or asked["tasks"]:
            yield from study_defaults.mistakes(config["studies"][name], asked, f"studies.{name}")
        else:
            yield (
                f"studies.{name}: nothing is evaluated; "
                "name a corpus in evaluate.perplexity or a task in evaluate.tasks"
            )
    if config["report"]["distributions"]:
        yield from collected(
            lambda: shown_transforms.shown(
                config, list(dict.fromkeys(cell for name in config["studies"] for cell in cells(name)))
            )
        )


def _cells(config: Mapping[str, Any]) -> Callable[[str], list[Cell]]:
    """Return a function: study -> its cells, or the :class:`ConfigError` of an invalid one. Each study is
    expanded once."""

    @cache
    def expanded(name: str) -> list[Cell] | ConfigError:
        try:
            return grid.study_cells(config, name)
        except ConfigError as error:
            return error

    def cells(name: str) -> list[Cell]:
        if isinstance(found := expanded(name), ConfigError):
            raise found
        return found

    return cells


def _check_compare(wanted: Mapping[str, Any] | None, cells: Iterable[Cell], study: str) -> None:
    """Check that a study's comparisons match cells that differ in one axis alone, one of them with
    the value ``to``."""
    if wanted is None:
        return
    others: dict[tuple, set[str]] = {}
    for cell in (cell for cell in cells if cell.quantized):
        axes = {**cell.axes, wanted["axis"]: ""}
        others.setdefault(tuple(axes.values()), set()).add(cell.axes[wanted["axis"]])
    if not any(wanted["to"] in values for values in others.values()):
        raise ConfigError(
            f"studies.{study}.compare.to: {unknown_name(wanted['axis'], wanted['to'], set().union(*others.values()))}"
        )
    if not any(len(values) > 1 for values in others.values() if wanted["to"] in values):
        raise ConfigError(
            f"studies.{study}.compare: no cell differs from one with {wanted['axis']} "
            f"'{wanted['to']}' in that axis alone"
        )


def _check_trainings(config: Mapping[str, Any], cells: Iterable[Cell]) -> None:
    """Reject training on a calibration with ``skip_first`` > 0, because the loss covers all tokens,
    or on too few windows to hold some out."""
    for axis, name in dict.fromkeys(
        used for cell in cells for used in (("transforms", cell.transform), ("mitigations", cell.mitigation))
    ):
        entry = entries.entry(config, axis, name)
        method, calibration = registry.method(axis, entry["method"]), entry.get("calibration", "default")
        _check_stored_tokens(config, axis, name, method)
        if not (method.trained_on_windows or method.training):
            continue
        if config["calibrations"][calibration]["skip_first"]:
            raise ConfigError(
                f"{axis}.{name}.calibration: '{entry['method']}' is trained on all tokens of its "
                "windows, and calibration "
                f"'{calibration}' leaves the first ones out (skip_first); give it a calibration that does not"
            )
        corpus = config["calibrations"][calibration]["corpus"]
        entry.pop("calibration", None)
        options, windows = method.resolve(entry, f"{axis}.{name}")["options"], config["corpora"][corpus].get("windows")
        if windows is not None and windows < (needed := options["held_out"] + options["batch_size"]):
            raise ConfigError(
                f"{axis}.{name}: '{entry['method']}' trains on batches of {options['batch_size']} windows and holds "
                f"{options['held_out']} out, and corpus '{corpus}' has {windows}; set its "
                f"'windows' to at least {needed}"
            )


def _check_stored_tokens(config: Mapping[str, Any], axis: str, name: str, method: Method) -> None:
    """Reject a method whose calibration stores fewer tokens of a site than its options need."""
    if not method.stored_tokens:
        return
    entry = entries.entry(config, axis, name)
    calibration = entry.pop("calibration", "default")
    needed = method.needed_tokens(method.resolve(entry, f"{axis}.{name}")["options"])
    given = config["calibrations"][calibration]
    corpus = config["corpora"][given["corpus"]]
    seen = corpus["windows"] * (corpus["window"] - given["skip_first"]) if "windows" in corpus else needed
    if min(given["samples"], seen) < needed:
        raise ConfigError(
            f"{axis}.{name}: its objective needs {needed} stored tokens of a site, and calibration '{calibration}' "
            f"stores {min(given['samples'], seen)}; set its 'samples' to at least {needed}, and its corpus to as "
            "many tokens"
        )
