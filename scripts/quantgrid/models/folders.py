"""Checks of a model before any job runs: its shape, and the files of a local folder.

``shape_of`` runs while the workflow is planned, so this module uses the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..ground.errors import ConfigError, unknown_name
from ..ground.places import ROOT
from ..ground.storage import read_json
from .declared_shapes import POSITIONS, SHAPE_KEYS, declared_shape
from .dequantize import METHODS, dequantized_headers
from .multimodal import text_decoder
from .shapes import LARGEST_CONFIG, ModelShape, shape_from_config, shape_from_folder
from .weight_headers import FURTHER_LAYERS, remedy, tensor_headers, verify_weights

SOURCES = ("wheel", "local", "builtin", "hub")
BUILTIN = ROOT / "models"  # models shipped with quantgrid
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)  # files that determine the tokens of a text
LARGEST_TOKENIZER = 1 << 28  # bytes
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
ADVICE = "put the model's own in its place"
# Keys of config.json that affect the model's function, with their types.
_SETTINGS: dict[str, tuple[type, ...]] = {
    "rms_norm_eps": (int, float),
    "rope_theta": (int, float),
    "partial_rotary_factor": (int, float),
    "rope_parameters": (dict,),
    "rope_scaling": (dict,),
    "hidden_act": (str,),
    "tie_word_embeddings": (bool,),
    "attention_bias": (bool,),
    "mlp_bias": (bool,),
    "use_sliding_window": (bool,),
    "sliding_window": (int,),
    "max_window_layers": (int,),
    "layer_types": (list,),
    "max_position_embeddings": (int,),
    FURTHER_LAYERS: (int,),
}


def shape_of(entry: Mapping[str, Any], where: str = "model") -> ModelShape:
    """Shape declared by a model's config entry: config.json of a local or builtin folder, else
    ``shape``.

    ``where`` is the config key in messages, such as ``models.smollm2``. Raises :class:`ConfigError`
    (missing or unreadable) or :class:`UnsupportedModel` (a mixture of experts, an unknown
    architecture).
    """
    source = entry.get("source")
    if source not in SOURCES:
        raise ConfigError(f"{where}.source: {unknown_name('source', source, SOURCES)}")
    method_of(entry, where)
    if (folder := folder_of(entry, where)) is not None:
        found = check_folder(folder, f"{where}.{'path' if source == 'local' else 'name'}", method_of(entry, where))
        verify_shape(found, entry.get("shape") or {}, f"{where}.shape")
        return found
    return declared_shape(entry.get("shape") or {}, f"{where}.shape")


def folder_of(entry: Mapping[str, Any], where: str = "model") -> str | Path | None:
    """Folder of a model that exists before the workflow runs (``local``, ``builtin``), else
    None."""
    if entry["source"] == "local":
        return entry.get("path") or ""
    if entry["source"] != "builtin":
        return None
    known = sorted(path.name for path in BUILTIN.iterdir() if path.is_dir()) if BUILTIN.is_dir() else []
    if entry.get("name") not in known:
        raise ConfigError(f"{where}.name: {unknown_name('builtin model', entry.get('name'), known)}")
    return BUILTIN / entry["name"]


def _unless_declared(declared: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that a declared shape means where it does not name them."""
    experts, latents = "experts" in declared, "key_value_rank" in declared
    return ({"dense_layers": ()} if experts else {}) | ({"query_rank": 0} if latents else {})


def verify_shape(found: ModelShape, declared: Mapping[str, Any], where: str = "shape") -> None:
    """Raise :class:`ConfigError` naming the fields in which a model differs from its config
    entry."""
    actual = asdict(found)
    declared = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in {**_unless_declared(declared), **declared}.items()
        if key != POSITIONS
    }
    unknown = [key for key in declared if key not in actual]
    if unknown:
        raise ConfigError(f"{where}: {unknown_name('key', unknown[0], SHAPE_KEYS)}")
    wrong = [f"{key} is {actual[key]}, declared {value}" for key, value in declared.items() if actual[key] != value]
    if wrong:
        raise ConfigError(f"{where}: the model differs from its declared shape: {'; '.join(wrong)}")


def method_of(entry: Mapping[str, Any], where: str) -> str:
    """Quantization that a model's config entry has dequantized, or nothing."""
    method = entry.get("dequantize", "")
    if method and method not in METHODS:
        raise ConfigError(f"{where}.dequantize: {unknown_name('format', method, METHODS)}")
    if method and entry["source"] not in ("local", "hub"):
        raise ConfigError(f"{where}.dequantize: only models with source local or hub are dequantized; leave it out")
    return method


def check_folder(path: str | Path, where: str = "path", dequantize: str = "") -> ModelShape:
    """Shape of a local model folder, after checking config.json, safetensors weights and tokenizer.

    The weights have to be complete and in floating point, or in the format ``dequantize``.
    """
    folder = Path(path).expanduser()
    if not str(path) or not folder.is_dir():
        raise ConfigError(
            f"{where}: {folder}: no such folder; a model folder holds config.json, *.safetensors and a tokenizer"
        )
    shape_from_folder(folder)  # a wrong config.json comes before wrong weights
    whole = read_json(folder / "config.json", ADVICE, LARGEST_CONFIG)
    config = text_decoder(whole)
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else quantized
        if method != dequantize:
            raise ConfigError(
                f"{where}: {folder} is already quantized ({method}, by its quantization_config); {remedy(str(method))}"
            )
    _check_settings(config, folder / "config.json")
    tensors = tensor_headers(weight_files(folder, where))
    _check_index(tensors, folder / INDEX)
    tensors = dequantized_headers(tensors, where) if dequantize else tensors
    config = text_decoder(whole, tensors)
    shape = shape_from_config(config, str(folder / "config.json"))
    verify_weights(tensors, shape, str(folder), config)
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
            read_json(folder / name, ADVICE, LARGEST_TOKENIZER)


def weight_files(folder: str | Path, where: str = "path") -> list[Path]:
    """Safetensors files of a model, in order.

    They are those of the index, else model.safetensors, else the only one. Raises
    :class:`ConfigError` for none, for pickled ones only, and for a missing file (or link target).
    """
    folder = Path(folder)
    index, found = folder / INDEX, sorted(folder.glob("*.safetensors"))
    single = folder / "model.safetensors"
    if index.is_file():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
    elif single in found or len(found) == 1:
        files = [single if single in found else found[0]]
    elif found:
        raise ConfigError(
            f"{where}: {folder} holds {len(found)} *.safetensors but no {INDEX} that says which belong together"
        )
    else:
        raise ConfigError(f"{where}: {_no_weights(folder)}")
    for file in files:
        if not file.is_file():
            gone = f"links to {file.readlink()}, which does not exist" if file.is_symlink() else "is missing"
            raise ConfigError(f"{where}: {file} {gone}; put it back, or delete {folder} and fetch the model again")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> name of its file, in the folder of ``index``."""
    found = read_json(index, ADVICE, LARGEST_TOKENIZER).get("weight_map")
    if not (
        isinstance(found, dict)
        and found
        and all(isinstance(name, str) and Path(name).name == name for name in found.values())
    ):
        raise ConfigError(f"{index}: weight_map has to map every tensor to a file in this folder; {ADVICE}")
    return found


def _check_index(tensors: Mapping[str, Mapping[str, Any]], index: Path) -> None:
    """Raise :class:`ConfigError` if an index exists and names the wrong file for a tensor."""
    held = {name: tensor["file"] for name, tensor in tensors.items()}
    named = _weight_map(index) if index.is_file() else held
    if wrong := next((name for name in {**held, **named} if held.get(name) != named.get(name)), None):
        raise ConfigError(
            f"{index}: '{wrong:.80}' is listed in {named.get(wrong, 'no file')} but found in "
            f"{held.get(wrong, 'none')}; {ADVICE}"
        )


def _no_weights(folder: Path) -> str:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if not pickled:
        return f"{folder} holds no weights; expected model.safetensors, or shards with {INDEX}"
    return (
        f"{folder} holds only pickled weights ({', '.join(pickled[:3])}), which can run code when they are read; "
        "convert them where they are trusted: "
        "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
    )
