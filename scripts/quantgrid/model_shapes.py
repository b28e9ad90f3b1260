"""What can be known of a model before any job runs: its shape, and whether a local folder holds something that quantgrid can read.

``shape_of`` serves the grid while the workflow is planned, so this module needs the standard library only: config.json is JSON, and a
safetensors file opens with the length and the JSON of its header (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .architecture import END_ROLES, LINEARS, ModelShape, architecture_of, layer_tensors, shape_from_folder
from .errors import ConfigError, unknown_name
from .storage import read_json

SOURCES = ("wheel", "local", "builtin", "hub")
BUILTIN = Path(__file__).resolve().parents[2] / "models"  # those that quantgrid ships
SHAPE_KEYS = tuple(field.name for field in fields(ModelShape))
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_FLOATS = ("F64", "F32", "F16", "BF16")


def shape_of(entry: Mapping[str, Any], where: str = "model") -> ModelShape:
    """The shape that a model's config entry declares, a local or builtin folder by its config.json, the others by their ``shape``.

    ``where`` is the config key that messages name, such as ``models.smollm2``. Raises :class:`ConfigError` (what is missing or not readable)
    or :class:`UnsupportedModel` (a mixture of experts, an unknown architecture).
    """
    source = entry.get("source")
    if source not in SOURCES:
        raise ConfigError(f"{where}.source: {unknown_name('source', source, SOURCES)}")
    if (folder := folder_of(entry, where)) is not None:
        found = check_folder(folder, f"{where}.{'path' if source == 'local' else 'name'}")
        verify_shape(found, entry.get("shape") or {}, f"{where}.shape")
        return found
    return _declared_shape(entry.get("shape") or {}, f"{where}.shape")


def folder_of(entry: Mapping[str, Any], where: str = "model") -> str | Path | None:
    """The folder of a model that lies on this machine before the workflow runs (``local``, ``builtin``); None for the others."""
    if entry["source"] == "local":
        return entry.get("path") or ""
    if entry["source"] != "builtin":
        return None
    known = sorted(path.name for path in BUILTIN.iterdir() if path.is_dir()) if BUILTIN.is_dir() else []
    if entry.get("name") not in known:
        raise ConfigError(f"{where}.name: {unknown_name('builtin model', entry.get('name'), known)}")
    return BUILTIN / entry["name"]


def _declared_shape(shape: Mapping[str, Any], where: str) -> ModelShape:
    unknown = [key for key in shape if key not in SHAPE_KEYS]
    if unknown:
        raise ConfigError(f"{where}: {unknown_name('key', unknown[0], SHAPE_KEYS)}")
    missing = [key for key in SHAPE_KEYS if key not in shape]
    if missing:
        raise ConfigError(f"{where}: the keys {', '.join(missing)} are missing; a model that is still to be fetched states its whole shape")
    wrong = [key for key in SHAPE_KEYS if key != "architecture" and not (type(shape[key]) is int and shape[key] > 0)]
    if wrong:
        raise ConfigError(f"{where}.{wrong[0]}: {shape[wrong[0]]!r} is not a whole number above 0")
    architecture_of({"architectures": [shape["architecture"]]}, f"{where}.architecture")
    return ModelShape(**shape)


def verify_shape(found: ModelShape, declared: Mapping[str, Any], where: str = "shape") -> None:
    """:class:`ConfigError` naming the fields in which a model is not what the config declares."""
    actual = asdict(found)
    unknown = [key for key in declared if key not in actual]
    if unknown:
        raise ConfigError(f"{where}: {unknown_name('key', unknown[0], SHAPE_KEYS)}")
    wrong = [f"{key} is {actual[key]}, declared {value}" for key, value in declared.items() if actual[key] != value]
    if wrong:
        raise ConfigError(f"{where}: the model is another one: {'; '.join(wrong)}")


def check_folder(path: str | Path, where: str = "path") -> ModelShape:
    """The shape of a local model folder, once it is seen to hold config.json, whole safetensors weights in floating point, and a tokenizer."""
    folder = Path(path).expanduser()
    if not str(path) or not folder.is_dir():
        raise ConfigError(f"{where}: {folder}: no such folder; a model folder holds config.json, *.safetensors and a tokenizer")
    try:
        shape = shape_from_folder(folder)
        quantized = read_json(folder / "config.json").get("quantization_config")
    except json.JSONDecodeError as error:
        raise ConfigError(f"{folder / 'config.json'}: not a JSON file ({error})") from None
    if quantized:
        raise ConfigError(f"{where}: {folder} is already quantized ({quantized.get('quant_method', 'unknown method')}, by its quantization_config); "
                          "name the full-precision checkpoint it was made from")
    verify_weights(tensor_headers(weight_files(folder, where)), shape, str(folder))
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ConfigError(f"{where}: {folder} holds no tokenizer; one of {', '.join(TOKENIZERS)} is needed")
    return shape


def weight_files(folder: str | Path, where: str = "path") -> list[Path]:
    """The safetensors files that make up a model, in order: those of the index, else model.safetensors, else the only one there is.

    Raises :class:`ConfigError` for none, for pickled ones only, and for a file (or the target of a link) that has gone.
    """
    folder = Path(folder)
    index, found = folder / INDEX, sorted(folder.glob("*.safetensors"))
    single = folder / "model.safetensors"
    if index.is_file():
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    elif single in found or len(found) == 1:
        files = [single if single in found else found[0]]
    elif found:
        raise ConfigError(f"{where}: {folder} holds {len(found)} *.safetensors but no {INDEX} that says which belong together")
    else:
        raise ConfigError(f"{where}: {_no_weights(folder)}")
    for file in files:
        if not file.is_file():
            gone = f"links to {file.readlink()}, which has gone" if file.is_symlink() else "is missing"
            raise ConfigError(f"{where}: {file} {gone}; put it back, or delete {folder} and fetch the model again")
    return files


def _no_weights(folder: Path) -> str:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if not pickled:
        return f"{folder} holds no weights; expected model.safetensors, or shards with {INDEX}"
    return (f"{folder} holds only pickled weights ({', '.join(pickled[:3])}), which can run code when they are read; convert them where they "
            "are trusted: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors")


def tensor_headers(files: list[Path]) -> dict[str, dict[str, Any]]:
    """tensor name -> {dtype, shape, ...} of safetensors files, from their headers alone; :class:`ConfigError` for a file that is not whole."""
    tensors: dict[str, dict[str, Any]] = {}
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            try:
                header = json.loads(opened.read(length)) if 8 + length <= size else None
            except ValueError:
                header = None
        if not isinstance(header, dict):
            raise ConfigError(f"{file}: not a whole safetensors file (its header does not fit; a Git LFS pointer or a download cut short?)")
        header.pop("__metadata__", None)
        if 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0) != size:
            raise ConfigError(f"{file}: not a whole safetensors file ({size} bytes are not what its header says); fetch it again")
        tensors.update(header)
    return tensors


def verify_weights(tensors: Mapping[str, Mapping[str, Any]], shape: ModelShape, where: str) -> None:
    """:class:`ConfigError` where a linear or the embedding is missing, of another size than config.json says, or not in floating point."""
    wanted = {END_ROLES["embedding"]: (shape.vocabulary, shape.hidden_size)}
    for layer in range(shape.layers):
        names = layer_tensors(shape.architecture, layer)
        wanted.update({names[linear]: shape.linear_size(linear) for linear in LINEARS})
    for name, size in wanted.items():
        if name not in tensors:
            raise ConfigError(f"{where}: the weights hold no tensor '{name}', which {shape.architecture} needs")
        found = tensors[name]
        if found["dtype"] not in _FLOATS:
            raise ConfigError(f"{where}: '{name}' is {found['dtype']}, not floating point ({', '.join(_FLOATS)}): already quantized weights")
        if tuple(found["shape"]) != size:
            raise ConfigError(f"{where}: '{name}' is {tuple(found['shape'])} in the weights, {size} by config.json")
