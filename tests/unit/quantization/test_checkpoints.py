"""Packed checkpoints: what comes back from disk is what was quantized, and weighs what was
accounted."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_cases import (
    GRANULAR,
    TRANSFORMS,
    case_of,
    quantized,
    saved,
    schemes,
    static_rounding,
    transformed_layers,
)
from quantgrid.ground.errors import ConfigError, NumericalFailure
from quantgrid.ground.places import SCRIPTS
from quantgrid.ground.storage import read_json, sha256_of, write_json
from quantgrid.inference.transform import fit
from quantgrid.machine import devices
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.mitigations.methods.gptq_low_rank import gptq_low_rank
from quantgrid.mitigations.methods.low_rank import low_rank
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.models.plans import LINEARS, SITE_OF
from quantgrid.quantization.cached import summarize
from quantgrid.quantization.checkpoints import (
    load_quantized,
    save_failed,
)
from quantgrid.quantization.grouping import chunks
from quantgrid.quantizer import fake_quantize
from reference_statistics import close
from tiny_decoders import bare_name

# -- disk ------------------------------------------------------------------------------------------

OTHER_PROCESS = """
import hashlib, json, sys, torch
from quantgrid.quantization.checkpoints import load_quantized
found = {}
for folder in sys.argv[1:]:
    weights = load_quantized(folder).state_dict()
    found[folder] = {name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for name, tensor in weights.items()}
print(json.dumps(found))
"""  # noqa: E501


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.slow
def test_another_process_reads_the_same_weights(given, tmp_path):
    """Bit for bit what the mitigations returned, in every format, granularity and for every
    mitigation."""
    wanted = {}
    cells = [("hadamard", preset, granularity, rtn) for preset, granularity in GRANULAR]
    cells += [
        ("scaling", "int4", "channel", method)
        for method in (gptq, partial(low_rank, rank=3), partial(gptq_low_rank, rank=3))
    ]
    for number, (transform, preset, granularity, mitigation) in enumerate(cells):
        solved = {}

        def remembering(weight, statistics, scheme, mitigation=mitigation, solved=solved, **shared):
            done = mitigation(weight, statistics, scheme, **shared)
            solved[len(solved)] = done
            return done

        folder = saved(
            quantized(given[case_of(preset)], transform, preset, granularity, remembering), tmp_path / str(number)
        )
        expected = {}
        for linear, done in zip(LINEARS, solved.values(), strict=True):
            for layer in range(2):
                name = bare_name(layer, linear)
                expected[f"{name}.weight"] = digest(done.quantized.dequantize(torch.float32)[layer])
                if done.low_rank:
                    expected |= {
                        f"{name}.{part}": digest(factor[layer].float())
                        for part, factor in zip(("left", "right"), done.low_rank)
                    }
        wanted[str(folder)] = expected
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, *wanted],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == list(wanted)
    for folder, expected in wanted.items():
        assert {name: found[folder][name] for name in expected} == expected


def bytes_on_disk(tensors: dict[str, Tensor], name: str) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for key, tensor in tensors.items()
        if key.startswith(f"{name}.") and not key.endswith(".bias")
    )


@pytest.mark.parametrize("mitigation", [rtn, partial(low_rank, rank=3)], ids=["rtn", "low_rank"])
@pytest.mark.parametrize("preset, granularity", GRANULAR)
def test_the_accounted_bits_are_the_bytes_on_disk(preset, granularity, mitigation, given, tmp_path):
    """To less than a byte per tensor: rows and zero points of odd length are padded."""
    made = given[case_of(preset)]
    done = quantized(made, "none", preset, granularity, mitigation)
    tensors = load_file(saved(done, tmp_path) / "model.safetensors")
    scheme, total, stored = schemes(preset, granularity)[0], 0, 0
    for layer in range(2):
        for linear in LINEARS:
            entry, (m, n) = done.errors[f"{layer}.{linear}"], made.decoder.shape.linear_size(linear)
            found = 8 * bytes_on_disk(tensors, bare_name(layer, linear))
            assert 0 <= found - round(entry["stored_bits"] * m * n, 6) < 8 and entry["size"] == m * n
            blocks = {"tensor": 1, "channel": m, "group": m * n // (scheme.group_size or 1)}[scheme.granularity]
            scale_bits = {"fp32": 32, "bf16": 16, "e8m0": 8, "e4m3": 8}[scheme.scale_format]
            paper = scheme.element_format.bits + (
                blocks * (scale_bits + scheme.codebook_bits) + 32 * (scheme.global_scale in ("tensor", "site"))
            ) / (m * n)
            rank = 3 if mitigation is not rtn else 0
            assert math.isclose(entry["bits"], paper + 16 * rank * (m + n) / (m * n), rel_tol=1e-12)
            total, stored = total + m * n, stored + found
    assert math.isclose(summarize(done.errors)["stored_bits"], stored / total, abs_tol=8 * 14 / total)


def test_full_precision_counts_sixteen_bits(given, tmp_path):
    done = quantized(given["llama"], "hadamard", "bf16", mitigation=None)
    tensors = load_file(saved(done, tmp_path) / "model.safetensors")
    assert summarize(done.errors)["bits"] == summarize(done.errors)["stored_bits"] == 16.0
    assert all(
        bytes_on_disk(tensors, bare_name(0, linear)) == 2 * done.errors[f"0.{linear}"]["size"] for linear in LINEARS
    )


def test_equal_content_is_equal_bytes(given, tmp_path):
    made = given["llama"]
    one, other = (saved(quantized(made, "hadamard", "nvfp4", mitigation=gptq), tmp_path / name) for name in "ab")
    assert all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in ("model.safetensors", "quantgrid.json")
    )


def truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])


def alter(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-7] ^= 4
    (folder / "model.safetensors").write_bytes(content)


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def cut_manifest(folder: Path) -> None:
    (folder / "quantgrid.json").write_text((folder / "quantgrid.json").read_text()[:-20])


def drop_a_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    write_json(
        folder / "quantgrid.json",
        {**read_json(folder / "quantgrid.json"), "sha256": sha256_of(folder / "model.safetensors")},
    )


@pytest.mark.parametrize(
    "spoil, names",
    [
        (truncate, "model.safetensors"),
        (alter, "model.safetensors"),
        (empty, "model.safetensors"),
        (cut_manifest, "quantgrid.json"),
        (drop_a_norm, "model.norm.weight"),
    ],
)
def test_a_spoilt_checkpoint_is_refused_by_name(spoil, names, given, tmp_path):
    folder = saved(quantized(given["llama"]), tmp_path)
    load_quantized(folder)
    spoil(folder)
    with pytest.raises(ConfigError, match=str(tmp_path)) as refused:
        load_quantized(folder)
    assert names in str(refused.value)


def test_a_failed_cell_passes_its_reason_on(tmp_path):
    save_failed(
        tmp_path / "model.safetensors",
        tmp_path / "quantgrid.json",
        {"axes": {"model": "m"}},
        "GPTQ: layer 3 broke down",
    )
    assert read_json(tmp_path / "quantgrid.json")["status"] == "failed" and (tmp_path / "model.safetensors").is_file()
    with pytest.raises(NumericalFailure, match="GPTQ: layer 3 broke down"):
        load_quantized(tmp_path)


# -- quantizing a decoder --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mitigation", [rtn, gptq, partial(gptq_low_rank, rank=2)], ids=["rtn", "gptq", "gptq_low_rank"]
)
def test_layers_in_chunks_are_layers_at_once(mitigation, given, monkeypatch):
    made = given["qwen2"]
    whole = quantized(made, "hadamard", "int4", mitigation=mitigation)
    monkeypatch.setattr(devices, "LARGE", 1)
    assert chunks(made.decoder.shape, 1) == [range(0, 1), range(1, 2)]
    parts = quantized(made, "hadamard", "int4", mitigation=mitigation)
    assert whole.content.tensors.keys() == parts.content.tensors.keys() and whole.details == parts.details
    for name, tensor in whole.content.tensors.items():
        assert (tensor != parts.content.tensors[name]).float().mean() <= (0 if mitigation is rtn else 0.02), name


@pytest.mark.parametrize(
    "preset, granularity", [("int4", "channel"), ("w4a16", "channel"), ("int4", "tensor"), ("nvfp4", "channel")]
)
def test_errors_are_those_of_the_definition(preset, granularity, given):
    """The sample of these statistics is all tokens, so without rounded activations the joint error
    is the output error."""
    made = given["llama"]
    done = quantized(made, "hadamard", preset, granularity)
    weight_scheme, activation = schemes(preset, granularity)
    for layer in transformed_layers(made, fit(TRANSFORMS["hadamard"], made.decoder, made.statistics)):
        for linear in LINEARS:
            weight, x = layer.weights[linear], layer.statistics[SITE_OF[linear]].samples.double()
            used = fake_quantize(weight.float(), weight_scheme).double()
            statistics, rounded = layer.statistics[SITE_OF[linear]], x
            if activation is not None:
                static = granularity == "tensor"
                ends = statistics.minimum.min().item(), statistics.maximum.max().item()
                rounded = static_rounding(x, *ends) if static else fake_quantize(x, activation)
            wanted = {
                "weight_error": ((weight - used).norm() / weight.norm()) ** 2,
                "output_error": ((x @ (weight - used).T).norm() / (x @ weight.T).norm()) ** 2,
                "joint_output_error": ((rounded @ used.T - x @ weight.T).norm() / (x @ weight.T).norm()) ** 2,
            }
            entry = done.errors[f"{layer.index}.{linear}"]
            assert all(math.isclose(entry[name], value.item(), rel_tol=2e-3) for name, value in wanted.items()), (
                linear,
                entry,
                wanted,
            )


def test_nothing_but_linears_is_rounded(given):
    made = given["qwen3"]
    tensors, state = quantized(made).content.tensors, load_file(made.folder / "model.safetensors")
    linears = {f"{bare_name(layer, linear)}.weight" for layer in range(2) for linear in LINEARS}
    for name, tensor in state.items():
        if name in linears:
            assert name not in tensors and f"{name.removesuffix('.weight')}.codes" in tensors
        else:
            assert close(tensors[name].float(), tensor, 0 if "norm" in name or "bias" in name else 2**-8), name
