"""Mistakes in the entries of a config beyond its schema: files and folders, undefined references,
unknown methods and options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .. import schemes
from ..ground.errors import ConfigError, unknown_name
from ..schemes.granularities import cell_schemes
from ..schemes.granularity import Granularity
from . import allocations, deployments, entries, grid, inputs, paths, registry, shown_transforms
from .cells import AXES, FULL_PRECISION
from .mistakes import collected
from .task_presets import TASK_PRESETS


def path_mistakes(content: Mapping[str, Any]) -> Iterator[str]:
    """List mistakes in files and folders named in the config, before any job opens them."""
    yield from collected(lambda: paths.results_folder(content))
    for kind in ("models", "corpora", "tasks"):
        for name, entry in content.get(kind, {}).items():
            if "path" in entry:
                yield from collected(
                    lambda path=entry["path"], where=f"{kind}.{name}.path": paths.expanded(path, where)
                )


def name_mistakes(config: Mapping[str, Any]) -> Iterator[str]:
    """List mistakes in entries: undefined references, unknown methods and options."""
    for name, entry in config["calibrations"].items():
        if entry["corpus"] not in config["corpora"]:
            yield f"calibrations.{name}.corpus: {unknown_name('corpus', entry['corpus'], config['corpora'])}"
        elif entry["skip_first"] >= (window := config["corpora"][entry["corpus"]]["window"]):
            yield (
                f"calibrations.{name}.skip_first: {entry['skip_first']} skips all tokens of the windows of "
                f"'{entry['corpus']}' ({window} tokens each); set it below {window}"
            )
    for axis in ("transforms", "mitigations"):
        for name, entry in config[axis].items():
            yield from collected(lambda axis=axis, name=name, entry=entry: _check_method(config, axis, name, entry))
    for name, entry in config["formats"].items():
        yield from collected(lambda name=name, entry=entry: _check_format(config, name, entry))
    for name, model in config["models"].items():
        yield from collected(lambda name=name, model=model: entries.shape(config, name))
        for corpus in model.get("published", {}):
            if corpus not in config["corpora"]:
                yield f"models.{name}.published: {unknown_name('corpus', corpus, config['corpora'])}"
    yield from inputs.mistakes(config)
    yield from _alike(config)
    for study, content in config["studies"].items():
        for axis, name, key in grid.names_in(content):
            yield from collected(
                lambda axis=axis, name=name, where=f"studies.{study}.{key}": entries.entry_names(
                    config, axis, name, where
                )
            )
    for where, asked in [
        ("evaluate", config["evaluate"]),
        *((f"studies.{n}.evaluate", s.get("evaluate", {})) for n, s in config["studies"].items()),
    ]:
        for key, kind, known in (
            ("perplexity", "corpora", config["corpora"]),
            ("residual_error", "corpora", config["corpora"]),
            ("tasks", "tasks", {*config["tasks"], *TASK_PRESETS}),
        ):
            for name in asked.get(key, []):
                if name not in config[kind]:
                    yield f"{where}.{key}: {unknown_name('task' if kind == 'tasks' else 'corpus', name, known)}"
    for name in config["report"]["distributions"]:
        yield from collected(lambda name=name: entries.entry_names(config, "transforms", name, shown_transforms.KEY))
    yield from _leaks(config)
    yield from collected(lambda: paths.check_writable(config["results_dir"]))


def _alike(config: Mapping[str, Any]) -> Iterator[str]:
    """List names of one kind that differ only in upper and lower case; case-insensitive file
    systems give them one folder."""
    for kind in ("models", "corpora", "calibrations", "transforms", "mitigations", "formats", "tasks", "studies"):
        builtin = entries.known_names(config, kind) - set(config[kind]) if kind in AXES else set()
        names = [
            *sorted(builtin),
            *(each for name in config[kind] for each in entries.expanded_names(config, kind, name)),
        ]
        seen: dict[str, str] = {}
        for name in names:
            if (other := seen.setdefault(name.lower(), name)) != name:
                yield (
                    f"{kind}.{name}: differs from '{other}' only in upper and lower case, "
                    "and some file systems ignore case; rename it"
                )


def _leaks(config: Mapping[str, Any]) -> Iterator[str]:
    """List corpora used for both calibration and evaluation: the same text under one or two
    names."""

    def text(name: str) -> dict[str, Any]:
        entry = config["corpora"].get(name, {"name": name})
        return {key: entry.get(key) for key in ("source", "part", "path", "id", "name", "split")}

    evaluated = {
        name
        for asked in (config["evaluate"], *(study.get("evaluate", {}) for study in config["studies"].values()))
        for name in asked.get("perplexity", [])
    } | {study["race"]["windows"] for study in config["studies"].values() if "race" in study}
    for calibration, entry in config["calibrations"].items():
        for name in sorted(evaluated):
            if text(name) == text(entry["corpus"]):
                yield (
                    f"calibrations.{calibration}.corpus: '{entry['corpus']}' is the text that perplexity is "
                    f"evaluated on ('{name}'); "
                    "calibrate on another part, split or file"
                )


def _check_method(config: Mapping[str, Any], axis: str, name: str, entry: Mapping[str, Any]) -> None:
    where = f"{axis}.{name}"
    method = registry.method(axis, entry["method"], f"{where}.method")
    if name in registry.METHODS[axis] and entry["method"] != name:
        raise ConfigError(f"{where}: '{name}' is the name of a built-in method; rename this entry")
    if not method.seeded and {"seed", "seeds"} & set(entry):
        raise ConfigError(f"{where}: method '{entry['method']}' is deterministic and takes neither 'seed' nor 'seeds'")
    if {"seed", "seeds"} <= set(entry):
        raise ConfigError(f"{where}: 'seed' and 'seeds' contradict each other; keep one of them")
    if taken := {f"{name}-s{seed}" for seed in entry.get("seeds", ())} & set(config[axis]):
        raise ConfigError(f"{where}.seeds: the name '{min(taken)}' already has an entry; rename that entry")
    method.resolve({key: value for key, value in entry.items() if key not in ("calibration", "seeds")}, where)
    if entry.get("calibration", "default") not in config["calibrations"]:
        raise ConfigError(
            f"{where}.calibration: {unknown_name('calibration', entry['calibration'], config['calibrations'])}"
        )


def _check_format(config: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> None:
    if "allocate" in entry:
        allocations.check_entry(config, name, entry)
        return
    where, preset = f"formats.{name}", entry["preset"]
    if preset not in schemes.PRESETS:
        raise ConfigError(f"{where}.preset: {unknown_name('preset', preset, schemes.PRESETS)}")
    if name in schemes.PRESETS and preset != name:
        raise ConfigError(f"{where}: '{name}' is the name of a built-in preset; rename this entry")
    block = schemes.PRESETS[preset]["block"]
    found = {} if preset == FULL_PRECISION else cell_schemes(entry, str(Granularity.of_block(block)), where)
    if not any(found.get(tensor) for tensor in ("weight", "activation", "key_value")):
        raise ConfigError(
            f"{where}: rounds neither weights nor activations; use the built-in format "
            f"'{FULL_PRECISION}', which needs no entry"
        )
    if entry.get("activation") and not found["activation"]:
        raise ConfigError(
            f"{where}.activation: preset '{preset}' leaves activations in full precision; start from a "
            "preset that rounds them"
        )
    if block and (entry.get("activation") or {}).get("by_head"):
        raise ConfigError(
            f"{where}.activation: preset '{preset}' has blocks of {block} by definition, so by_head contradicts it"
        )
    own = str(Granularity.of_block(block))
    if name in schemes.PRESETS and deployments.bits({name: entry}, name, own) != deployments.bits({}, name, own):
        raise ConfigError(f"{where}: the built-in preset of this name has other bits; rename this entry")
    for tensor, candidates in (
        ("weight", [found["weight"]]),
        ("activation", [scheme for site in found["activation"].values() for scheme in site]),
    ):
        if block and any(scheme and scheme["group_size"] != block for scheme in candidates):
            raise ConfigError(
                f"{where}.{tensor}: preset '{preset}' has blocks of {block} by definition; for other "
                "groups start from a preset "
                "without blocks, such as int4 or fp4, and set its scale_format"
            )
