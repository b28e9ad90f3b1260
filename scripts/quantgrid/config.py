"""Reading and checking a config: every mistake that a config can show is named in one message, before any job exists.

First the JSON schema (:mod:`.schema_mistakes`): unknown keys, wrong types, numbers out of range. Then what no schema knows: names that
must exist, options of methods, cells that contradict themselves, folders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from . import grid, inputs, layouts, paths, registry, schemes, shown_transforms
from .documents import read_yaml
from .errors import ConfigError, unknown_name
from .granularities import cell_schemes
from .schema_mistakes import schema_mistakes
from .task_presets import TASK_PRESETS, expanded

MOST_MISTAKES = 20  # that one message lists
DEFAULTS: dict[str, Any] = {
    "results_dir": paths.RESULTS, "seed": 0, "threads": 1, "keep_checkpoints": False, "transforms": {}, "mitigations": {}, "formats": {}, "tasks": {},
    "compute": {"device": "auto", "dtype": "auto"}, "evaluation": {"batch_size": 8, "task_limit": None, "depth_windows": 4},
    "evaluate": {"perplexity": [], "tasks": [], "depth": []}, "report": {"title": "quantgrid", "distributions": []},
}
CALIBRATION_DEFAULTS = {"samples": 256, "skip_first": 0}


def read(path: str | Path) -> dict[str, Any]:
    """The content of a YAML file, unchecked; :class:`ConfigError` where it is no mapping."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: the config is not a mapping; it holds the keys models, corpora, calibrations, studies, ...")
    return content


def load(path: str | Path) -> dict[str, Any]:
    """The checked config of a YAML file, defaults filled in."""
    return check(read(path))


def check(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` with defaults filled in; raises one :class:`ConfigError` that lists all mistakes, a line each."""
    if mistakes := list(dict.fromkeys(schema_mistakes(content))):
        raise ConfigError(_listed(mistakes))
    if mistakes := list(_path_mistakes(content)):
        raise ConfigError(_listed(mistakes))
    config = _with_defaults(content)
    for found in (_name_mistakes, _study_mistakes, inputs.mismatches):  # each needs what the one before has checked
        if mistakes := list(dict.fromkeys(found(config))):
            raise ConfigError(_listed(mistakes))
    return config


def _listed(mistakes: list[str]) -> str:
    if len(mistakes) == 1:
        return mistakes[0]
    more = [f"... and {len(mistakes) - MOST_MISTAKES} more"] * (len(mistakes) > MOST_MISTAKES)
    return f"{len(mistakes)} mistakes in the config:\n  " + "\n  ".join([*mistakes[:MOST_MISTAKES], *more])


def _with_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    config = {**deepcopy(DEFAULTS), **deepcopy(dict(content))}
    for key in ("compute", "evaluation", "evaluate", "report"):
        config[key] = {**DEFAULTS[key], **config[key]}
    for asked in (config["evaluate"], *(study["evaluate"] for study in config["studies"].values() if "evaluate" in study)):
        if "tasks" in asked:
            asked["tasks"], needed = expanded(asked["tasks"], content.get("tasks", {}))
            config["tasks"] |= needed
    config["calibrations"] = {name: {**CALIBRATION_DEFAULTS, **entry} for name, entry in config["calibrations"].items()}
    for name, study in config["studies"].items():
        study["table"] = layouts.table_defaults(study.get("table", {}))
        study["figure"] = layouts.figure_defaults(study.get("figure", {}))
        if "compare" in study:
            study["compare"] = layouts.compare_defaults(study["compare"], grid.asked(config, study))
        study.setdefault("title", name.replace("_", " "))
    threads = config["threads"]
    config["threads"] = {"default": DEFAULTS["threads"], **(threads if isinstance(threads, dict) else {"default": threads})}
    config["results_dir"] = paths.results_folder(config)
    return config


def _collected(check: Callable[[], Any]) -> Iterator[str]:
    """The message of a check that refuses, nothing of one that passes."""
    try:
        check()
    except ConfigError as error:
        yield str(error)


def _name_mistakes(config: Mapping[str, Any]) -> Iterator[str]:
    """Mistakes in entries: references that lead nowhere, methods and options that do not exist."""
    for name, entry in config["calibrations"].items():
        if entry["corpus"] not in config["corpora"]:
            yield f"calibrations.{name}.corpus: {unknown_name('corpus', entry['corpus'], config['corpora'])}"
        elif entry["skip_first"] >= (window := config["corpora"][entry["corpus"]]["window"]):
            yield f"calibrations.{name}.skip_first: {entry['skip_first']} leaves nothing of the windows of '{entry['corpus']}', {window} tokens each"
    for axis in ("transforms", "mitigations"):
        for name, entry in config[axis].items():
            yield from _collected(lambda axis=axis, name=name, entry=entry: _check_method(config, axis, name, entry))
    for name, entry in config["formats"].items():
        yield from _collected(lambda name=name, entry=entry: _check_format(name, entry))
    for name, model in config["models"].items():
        yield from _collected(lambda name=name, model=model: grid.shape(config, name))
        for corpus in model.get("published", {}):
            if corpus not in config["corpora"]:
                yield f"models.{name}.published: {unknown_name('corpus', corpus, config['corpora'])}"
    yield from inputs.mistakes(config)
    yield from _alike(config)
    for study, content in config["studies"].items():
        for axis, name, key in grid.names_in(content):
            yield from _collected(lambda axis=axis, name=name, where=f"studies.{study}.{key}": grid.entry_names(config, axis, name, where))
    for where, asked in [("evaluate", config["evaluate"]), *((f"studies.{n}.evaluate", s.get("evaluate", {})) for n, s in config["studies"].items())]:
        for key, kind, known in (("perplexity", "corpora", config["corpora"]), ("depth", "corpora", config["corpora"]),
                                 ("tasks", "tasks", {*config["tasks"], *TASK_PRESETS})):
            for name in asked.get(key, []):
                if name not in config[kind]:
                    yield f"{where}.{key}: {unknown_name('task' if kind == 'tasks' else 'corpus', name, known)}"
    for name in config["report"]["distributions"]:
        yield from _collected(lambda name=name: grid.entry_names(config, "transforms", name, shown_transforms.KEY))
    yield from _leaks(config)
    yield from _collected(lambda: paths.check_writable(config["results_dir"]))


def _path_mistakes(content: Mapping[str, Any]) -> Iterator[str]:
    """Mistakes in what the config names as files and folders, found before anything looks for them."""
    yield from _collected(lambda: paths.results_folder(content))
    for kind in ("models", "corpora", "tasks"):
        for name, entry in content.get(kind, {}).items():
            if "path" in entry:
                yield from _collected(lambda path=entry["path"], where=f"{kind}.{name}.path": paths.expanded(path, where))


def _alike(config: Mapping[str, Any]) -> Iterator[str]:
    """Names of one kind that differ in upper and lower case alone: one folder on file systems that tell no difference."""
    for kind in ("models", "corpora", "calibrations", "transforms", "mitigations", "formats", "tasks", "studies"):
        builtin = grid.known_names(config, kind) - set(config[kind]) if kind in grid.AXES else set()
        names = [*sorted(builtin), *(each for name in config[kind] for each in grid.expanded_names(config, kind, name))]
        seen: dict[str, str] = {}
        for name in names:
            if (other := seen.setdefault(name.lower(), name)) != name:
                yield f"{kind}.{name}: differs from '{other}' in upper and lower case alone, which some file systems take for one; rename it"


def _leaks(config: Mapping[str, Any]) -> Iterator[str]:
    """Corpora that are calibrated on and evaluated on: the same text under one or two names."""

    def text(name: str) -> dict[str, Any]:
        entry = config["corpora"].get(name, {"name": name})
        return {key: entry.get(key) for key in ("source", "part", "path", "id", "name", "split")}

    evaluated = {name for asked in (config["evaluate"], *(study.get("evaluate", {}) for study in config["studies"].values()))
                 for name in asked.get("perplexity", [])}
    for calibration, entry in config["calibrations"].items():
        for name in sorted(evaluated):
            if text(name) == text(entry["corpus"]):
                yield (f"calibrations.{calibration}.corpus: '{entry['corpus']}' is the text that perplexity is evaluated on ('{name}'); "
                       "calibrate on another part, split or file")


def _check_method(config: Mapping[str, Any], axis: str, name: str, entry: Mapping[str, Any]) -> None:
    where = f"{axis}.{name}"
    method = registry.method(axis, entry["method"], f"{where}.method")
    if name in registry.METHODS[axis] and entry["method"] != name:
        raise ConfigError(f"{where}: '{name}' is the name of a built-in method; rename this entry")
    if not method.seeded and {"seed", "seeds"} & set(entry):
        raise ConfigError(f"{where}: method '{entry['method']}' draws nothing at random, so it takes neither 'seed' nor 'seeds'")
    if {"seed", "seeds"} <= set(entry):
        raise ConfigError(f"{where}: 'seed' and 'seeds' contradict each other; keep one of them")
    if taken := {f"{name}-s{seed}" for seed in entry.get("seeds", ())} & set(config[axis]):
        raise ConfigError(f"{where}.seeds: the name '{min(taken)}' has an entry of its own; rename that entry")
    method.resolve({key: value for key, value in entry.items() if key not in ("calibration", "seeds")}, where)
    if entry.get("calibration", "default") not in config["calibrations"]:
        raise ConfigError(f"{where}.calibration: {unknown_name('calibration', entry['calibration'], config['calibrations'])}")


def _check_format(name: str, entry: Mapping[str, Any]) -> None:
    where, preset = f"formats.{name}", entry["preset"]
    if preset not in schemes.PRESETS:
        raise ConfigError(f"{where}.preset: {unknown_name('preset', preset, schemes.PRESETS)}")
    if name in schemes.PRESETS and preset != name:
        raise ConfigError(f"{where}: '{name}' is the name of a built-in preset; rename this entry")
    block = schemes.PRESETS[preset]["block"]
    found = {} if preset == grid.FULL_PRECISION else cell_schemes(entry, f"group-{block}" if block else "channel", where)
    if not any(found.get(tensor) for tensor in ("weight", "activation", "key_value")):
        raise ConfigError(f"{where}: rounds neither weights nor activations; '{grid.FULL_PRECISION}' is the format that does not, and needs no entry")
    if entry.get("activation") and not found["activation"]:
        raise ConfigError(f"{where}.activation: preset '{preset}' leaves activations in full precision; start from a preset that rounds them")
    if block and (entry.get("activation") or {}).get("by_head"):
        raise ConfigError(f"{where}.activation: preset '{preset}' has blocks of {block} by definition, so by_head contradicts it")
    for tensor, candidates in (("weight", [found["weight"]]), ("activation", [scheme for site in found["activation"].values() for scheme in site])):
        if block and any(scheme and scheme["group_size"] != block for scheme in candidates):
            raise ConfigError(f"{where}.{tensor}: preset '{preset}' has blocks of {block} by definition; for other groups start from a preset "
                              "without blocks, such as int4 or fp4, and set its scale_format")


def _check_compare(wanted: Mapping[str, Any] | None, cells: Iterable[grid.Cell], study: str) -> None:
    """That a study's comparisons have something to compare: cells that differ in one axis alone, one of them with the value ``to``."""
    if wanted is None:
        return
    others: dict[tuple, set[str]] = {}
    for cell in (cell for cell in cells if cell.quantized):
        axes = {**cell.axes, wanted["axis"]: ""}
        others.setdefault(tuple(axes.values()), set()).add(cell.axes[wanted["axis"]])
    if not any(wanted["to"] in values for values in others.values()):
        raise ConfigError(f"studies.{study}.compare.to: {unknown_name(wanted['axis'], wanted['to'], set().union(*others.values()))}")
    if not any(len(values) > 1 for values in others.values() if wanted["to"] in values):
        raise ConfigError(f"studies.{study}.compare: no cell differs from one with {wanted['axis']} '{wanted['to']}' in that axis alone")


def _check_trainings(config: Mapping[str, Any], cells: Iterable[grid.Cell]) -> None:
    """Reject training on a calibration that leaves tokens out, since the loss counts them all, or on too few windows to hold some out."""
    for axis, name in dict.fromkeys(used for cell in cells for used in (("transforms", cell.transform), ("mitigations", cell.mitigation))):
        entry = grid.entry(config, axis, name)
        method, calibration = registry.method(axis, entry["method"]), entry.get("calibration", "default")
        if not (method.trained_on_windows or method.training):
            continue
        if config["calibrations"][calibration]["skip_first"]:
            raise ConfigError(f"{axis}.{name}.calibration: '{entry['method']}' is trained on all tokens of its windows, and calibration "
                              f"'{calibration}' leaves the first ones out (skip_first); give it a calibration that does not")
        corpus = config["calibrations"][calibration]["corpus"]
        entry.pop("calibration", None)
        options, windows = method.resolve(entry, f"{axis}.{name}")["options"], config["corpora"][corpus].get("windows")
        if windows is not None and windows < (needed := options["held_out"] + options["batch_size"]):
            raise ConfigError(f"{axis}.{name}: '{entry['method']}' trains on batches of {options['batch_size']} windows and holds "
                              f"{options['held_out']} out, and corpus '{corpus}' has {windows}; set its 'windows' to at least {needed}")


def _study_mistakes(config: Mapping[str, Any]) -> Iterator[str]:
    yield from _collected(lambda: _check_trainings(config, grid.expand_studies(config)))
    for name in config["studies"]:
        yield from _collected(lambda name=name: _check_compare(config["studies"][name].get("compare"), grid.study_cells(config, name), name))
        asked = grid.asked(config, config["studies"][name])
        if asked["perplexity"] or asked["tasks"]:
            yield from layouts.mistakes(config["studies"][name], asked, f"studies.{name}")
        else:
            yield f"studies.{name}: nothing is evaluated; name a corpus in evaluate.perplexity or a task in evaluate.tasks"
    if config["report"]["distributions"]:
        yield from _collected(lambda: shown_transforms.shown(config, grid.expand_studies(config)))
