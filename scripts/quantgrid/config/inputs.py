"""Planning checks of corpora and tasks: local files, and window lengths against the positions of
each model.

Local tasks are read completely, local corpora up to their first records (``documents.PLANNED``);
the rest of a corpus is checked during tokenization. Standard library only, except for a corpus in
parquet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..corpora.documents import CHAT, check_local
from ..evaluation.task_documents import read_documents
from ..evaluation.tasks import make_documents
from ..ground.errors import ConfigError
from ..ground.storage import read_json
from ..models.folders import folder_of
from ..models.positions import positions_of, require_positions
from . import entries, grid
from .cells import FULL_PRECISION
from .mistakes import collected

_OF_RECORDS = ("render", "skip_null")
_OF_LOCAL_TASKS = ("delimiter", "whitespace", "duplicate_choices")
# minimum size of the builtin corpus over all versions of Python; larger numbers are counted
_ALWAYS = 100


def mistakes(config: Mapping[str, Any]) -> Iterator[str]:
    """List the corpora and tasks of ``config`` that cannot be read, one line each."""
    for kind, check in (("corpora", _check_corpus), ("tasks", partial(_check_task, config["seed"]))):
        for name, entry in config[kind].items():
            yield from collected(partial(check, entry, f"{kind}.{name}"))


def _check_corpus(entry: Mapping[str, Any], where: str) -> None:
    if entry["source"] == "local":
        check_local(entry, where)
    elif entry["source"] != "hub" and (unused := [key for key in _OF_RECORDS if key in entry]):
        raise ConfigError(f"{where}.{unused[0]}: source: {entry['source']} holds plain texts; leave it out")


def _check_task(seed: int, entry: Mapping[str, Any], where: str) -> None:
    if entry["source"] == "local":
        read_documents(entry, where)
    elif unused := [key for key in _OF_LOCAL_TASKS if key in entry]:
        raise ConfigError(f"{where}.{unused[0]}: only tasks with source: local are spaced by quantgrid; leave it out")
    elif entry["source"] == "builtin" and entry.get("items", 0) > _ALWAYS:
        make_documents(entry, seed, where)


def mismatches(config: Mapping[str, Any]) -> Iterator[str]:
    """List the corpora that do not fit a model, one line each: windows too long, or messages
    without a chat template."""
    for model, corpora in _tokenized(config).items():
        for name in corpora:
            yield from collected(partial(_check_pair, config, model, name))


def _check_pair(config: Mapping[str, Any], model: str, name: str) -> None:
    entry, corpus, where = config["models"][model], config["corpora"][name], f"corpora.{name}"
    table = entries.shape(config, model).family.positions is not None
    require_positions(corpus, positions_of(entry, f"models.{model}"), where, f"model '{model}'", table)
    folder = folder_of(entry, f"models.{model}")
    if corpus.get("render") == CHAT and folder and not _has_template(Path(folder).expanduser()):
        raise ConfigError(
            f"{where}.render: the tokenizer of model '{model}' has no chat template "
            "(chat_template.jinja, or chat_template in tokenizer_config.json)"
        )


def _tokenized(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Map each model to the corpora that its cells use for calibration, training or evaluation."""
    found: dict[str, dict[str, None]] = {}
    for study in config["studies"].values():
        asked = grid.asked(config, study)
        for block in (study, *({**study, **part} for part in study.get("also", ()))):
            raced = [block["race"]["windows"]] if "race" in block else []
            corpora = dict.fromkeys(
                [*_calibrated_on(config, block), *asked["perplexity"], *asked["residual_error"], *raced]
            )
            for model in block.get("models", ()):
                found.setdefault(model, {}).update(corpora)
    return {model: list(corpora) for model, corpora in found.items()}


def _calibrated_on(config: Mapping[str, Any], block: Mapping[str, Any]) -> list[str]:
    """List the corpora of the calibrations used by the transforms and mitigations of a block; empty
    if all cells are full precision."""
    if set(block.get("formats", ())) <= {FULL_PRECISION}:
        return []
    used = (config[axis].get(name, {}) for axis in ("transforms", "mitigations") for name in block.get(axis, ()))
    return [config["calibrations"][entry.get("calibration", "default")]["corpus"] for entry in used]


def _has_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (settings.is_file() and "chat_template" in read_json(settings))
