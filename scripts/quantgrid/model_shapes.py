"""What can be known of a model before any job runs: its shape, and whether a local folder holds something that quantgrid can read.

``shape_of`` serves the grid while the workflow is planned, so this module needs the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .architecture import LARGEST_CONFIG, ModelShape, architecture_of, require_size, shape_from_folder
from .errors import ConfigError, unknown_name
from .storage import read_json
from .weight_headers import tensor_headers, verify_weights

SOURCES = ("wheel", "local", "builtin", "hub")
BUILTIN = Path(__file__).resolve().parents[2] / "models"  # those that quantgrid ships
SHAPE_KEYS = tuple(field.name for field in fields(ModelShape))
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt")  # all that decides the tokens of a text
LARGEST_TOKENIZER = 1 << 28  # bytes
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_POSITIONS = "positions"  # of a declared shape, if wanted: the longest window, known before the model is there
_ADVICE = "put the model's own in its place"
# Settings of config.json that decide the model's function, and what they may be.
_SETTINGS: dict[str, tuple[type, ...]] = {
    "rms_norm_eps": (int, float), "rope_theta": (int, float), "partial_rotary_factor": (int, float), "rope_parameters": (dict,),
    "rope_scaling": (dict,), "hidden_act": (str,), "tie_word_embeddings": (bool,), "attention_bias": (bool,), "mlp_bias": (bool,),
    "use_sliding_window": (bool,), "sliding_window": (int,), "max_window_layers": (int,), "layer_types": (list,),
    "max_position_embeddings": (int,)}


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
    unknown = [key for key in shape if key not in (*SHAPE_KEYS, _POSITIONS)]
    if unknown:
        raise ConfigError(f"{where}: {unknown_name('key', unknown[0], (*SHAPE_KEYS, _POSITIONS))}")
    missing = [key for key in SHAPE_KEYS if key not in shape]
    if missing:
        raise ConfigError(f"{where}: the keys {', '.join(missing)} are missing; a model that is still to be fetched states its whole shape")
    for key in shape:
        if key != "architecture":
            require_size(shape[key], f"{where}.{key}")
    architecture_of({"architectures": [shape["architecture"]]}, f"{where}.architecture")
    return ModelShape(**{key: shape[key] for key in SHAPE_KEYS})


def positions_of(entry: Mapping[str, Any], where: str = "model") -> int | None:
    """Number of positions of the model of a config entry, as far as that is known before it is fetched."""
    folder = folder_of(entry, where)
    return (entry.get("shape") or {}).get(_POSITIONS) if folder is None else positions_in(folder)


def positions_in(folder: str | Path) -> int | None:
    """Number of positions of the model in ``folder``; None where its config.json does not say, or there is none."""
    path = Path(folder).expanduser() / "config.json"
    return read_json(path, _ADVICE, LARGEST_CONFIG).get("max_position_embeddings") if path.is_file() else None


def require_positions(entry: Mapping[str, Any], positions: int | None, where: str, model: str) -> None:
    """:class:`ConfigError` where the windows of a corpus entry are longer than ``positions`` and it does not say that they may be."""
    window = entry.get("window")
    if positions and isinstance(window, int) and window > positions and not entry.get("beyond_positions"):
        raise ConfigError(f"{where}.window: windows of {window} tokens are longer than the {positions} positions of {model} "
                          f"(max_position_embeddings); set window to at most {positions}, or beyond_positions: true to use them all the same")


def verify_shape(found: ModelShape, declared: Mapping[str, Any], where: str = "shape") -> None:
    """:class:`ConfigError` naming the fields in which a model is not what the config declares."""
    actual = asdict(found)
    declared = {key: value for key, value in declared.items() if key != _POSITIONS}
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
    shape = shape_from_folder(folder)
    config = read_json(folder / "config.json", _ADVICE, LARGEST_CONFIG)
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else quantized
        raise ConfigError(f"{where}: {folder} is already quantized ({method}, by its quantization_config); "
                          "name the full-precision checkpoint it was made from")
    _check_settings(config, folder / "config.json")
    tensors = tensor_headers(weight_files(folder, where))
    verify_weights(tensors, shape, str(folder), config)
    _check_index(tensors, folder / INDEX)
    _check_tokenizer(folder, where)
    return shape


def _check_settings(config: Mapping[str, Any], path: Path) -> None:
    for key, kinds in _SETTINGS.items():
        value = config.get(key)
        if value is not None and type(value) not in kinds:
            raise ConfigError(f"{path}: {key}: {value!r:.60} is not a {' or '.join(kind.__name__ for kind in kinds)}")
        if type(value) in (int, float) and not 0 <= value < 1e12:
            raise ConfigError(f"{path}: {key}: {value!r:.60} is not a number from 0 to 1e12")


def _check_tokenizer(folder: Path, where: str) -> None:
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ConfigError(f"{where}: {folder} holds no tokenizer; one of {', '.join(TOKENIZERS)} is needed")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "merges.txt")):
        raise ConfigError(f"{where}: {folder} holds vocab.json without merges.txt; both make a tokenizer")
    for name in TOKENIZER_FILES:
        if name.endswith(".json") and (folder / name).is_file():
            read_json(folder / name, _ADVICE, LARGEST_TOKENIZER)


def weight_files(folder: str | Path, where: str = "path") -> list[Path]:
    """The safetensors files that make up a model, in order: those of the index, else model.safetensors, else the only one there is.

    Raises :class:`ConfigError` for none, for pickled ones only, and for a file (or the target of a link) that has gone.
    """
    folder = Path(folder)
    index, found = folder / INDEX, sorted(folder.glob("*.safetensors"))
    single = folder / "model.safetensors"
    if index.is_file():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
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


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> name of the file beside ``index`` that holds it."""
    found = read_json(index, _ADVICE, LARGEST_TOKENIZER).get("weight_map")
    if not (isinstance(found, dict) and found and all(isinstance(name, str) and Path(name).name == name for name in found.values())):
        raise ConfigError(f"{index}: its weight_map has to name, for every tensor, a file in this folder; {_ADVICE}")
    return found


def _check_index(tensors: Mapping[str, Mapping[str, Any]], index: Path) -> None:
    """:class:`ConfigError` where an index, if there is one, names another file than the one that holds a tensor."""
    held = {name: tensor["file"] for name, tensor in tensors.items()}
    named = _weight_map(index) if index.is_file() else held
    if wrong := next((name for name in {**held, **named} if held.get(name) != named.get(name)), None):
        raise ConfigError(f"{index}: says that '{wrong:.80}' lies in {named.get(wrong, 'no file')}, it lies in {held.get(wrong, 'none')}; {_ADVICE}")


def _no_weights(folder: Path) -> str:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if not pickled:
        return f"{folder} holds no weights; expected model.safetensors, or shards with {INDEX}"
    return (f"{folder} holds only pickled weights ({', '.join(pickled[:3])}), which can run code when they are read; convert them where they "
            "are trusted: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors")
