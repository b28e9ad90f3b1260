"""Packed checkpoints: what comes back from disk is what was quantized, runs as the definition says, and weighs what was accounted."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantgrid import linear as linear_module
from quantgrid import quantization
from quantgrid.architecture import END_ROLES, LINEARS, SITE_OF, SITES, layer_tensors
from quantgrid.architecture import linear_module as linear_module_of
from quantgrid.cell_schemes import CellSchemes
from quantgrid.checkpoints import bare_name, load_full_precision, load_quantized, save_failed, save_quantized
from quantgrid.decoders import DecoderFolder, DecoderLayer
from quantgrid.errors import ConfigError, NumericalFailure
from quantgrid.granularities import cell_schemes
from quantgrid.layer_errors import output_square
from quantgrid.mitigations.gptq import gptq
from quantgrid.mitigations.gptq_low_rank import gptq_low_rank
from quantgrid.mitigations.low_rank import low_rank
from quantgrid.mitigations.rtn import rtn
from quantgrid.quantization import Quantized, Recipe, quantize_decoder, summarize
from quantgrid.quantizer import PRESETS, QuantScheme, fake_quantize
from quantgrid.storage import read_json, sha256_of, write_json
from quantgrid.transforms import block_hadamard, duquant, quarot, random_hadamard, reordering, scaling, shifting
from quantgrid.transforms.composition import Transform, fit, layer_state
from reference_decoder import logits, site_inputs
from reference_statistics import apply_online, close, write_statistics
from tiny_decoders import CASES, random_tokens, save

SCRIPTS = Path(quantization.__file__).parents[1]
LLAMA = next(case for case in CASES if case.bias and case.tied)
CASE_OF = {"llama": LLAMA, **{name: next(case for case in CASES if case.architecture.lower().startswith(name) and want(case)) for name, want in (
    ("mistral", lambda c: c.head_dim == 32), ("qwen2", lambda c: not c.tied and c.heads == 4), ("qwen3", lambda c: c.bias))}}
TRANSFORMS = {"none": [], "scaling": scaling.primitives(0.5, list(SITES)), "hadamard": random_hadamard.primitives(1),
              "shifting": [*shifting.primitives("midrange", list(SITES)), *quarot.primitives(2, "orthogonal")],
              "blocks": [*reordering.primitives("rms", list(SITES), "across"), *block_hadamard.primitives(16, list(SITES), False)],
              "duquant": duquant.primitives(3, 0.6, 16, 4, list(SITES), True)}
QUANTIZED = [name for name, preset in PRESETS.items() if preset["weight"]]
GRANULAR = [*((name, "channel") for name in QUANTIZED), ("int4", "tensor"), ("int4_asym", "tensor"), ("int4_asym", "group-16"), ("int3", "group-32"),
            ("fp4", "group-16"), ("kmeans4", "group-32"), ("fp4_ue2m2", "group-16")]


@dataclass
class Given:
    """A tiny decoder on disk, tokens, and calibration statistics of all of them."""

    folder: Path
    config: dict
    tokens: Tensor
    statistics: Path

    @property
    def decoder(self) -> DecoderFolder:
        return DecoderFolder(self.folder)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Given]:
    made = {}
    for name, case in CASE_OF.items():
        config, state = case.build(torch.float32)
        folder, tokens = save(tmp_path_factory.mktemp(name), config, state), random_tokens(config, 8, 24)
        made[name] = Given(folder, config, tokens, write_statistics(folder / "statistics", site_inputs(state, config, tokens)))
    return made


def schemes(preset: str, granularity: str = "channel") -> tuple[QuantScheme | None, QuantScheme | None]:
    if preset == "bf16":
        return None, None
    found = cell_schemes({"preset": preset}, granularity, "test")
    candidates = found["activation"].get("down_input")
    return QuantScheme.from_dict(found["weight"]) if found["weight"] else None, QuantScheme.from_dict(candidates[0]) if candidates else None


def everywhere(scheme: QuantScheme | None) -> dict[str, list[QuantScheme]]:
    """One activation scheme at every site."""
    return {site: [scheme] for site in SITES} if scheme else {}


def quantized(made: Given, transform="none", preset="int4", granularity="channel", mitigation=rtn) -> Quantized:
    fitted = fit(TRANSFORMS[transform], made.decoder, made.statistics)
    weight, activation = schemes(preset, granularity)
    return quantize_decoder(made.decoder, Recipe(fitted, CellSchemes(weight, everywhere(activation)), mitigation, made.statistics))


def saved(done: Quantized, folder: Path) -> Path:
    save_quantized(done.content, folder / "model.safetensors", folder / "quantgrid.json", {"axes": {}})
    return folder


def transformed_layers(made: Given, transform: Transform) -> list[DecoderLayer]:
    layers = [layer_state(made.decoder, index, made.statistics) for index in range(made.decoder.shape.layers)]
    for layer in layers:
        transform.fold_layer(layer)
    return layers


# -- the running model ---------------------------------------------------------------------------------------------------------------------


def static_rounding(x: Tensor, low: float, high: float) -> Tensor:
    """Asymmetric INT4 with one range [low, high], from its definition."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = torch.tensor((high - low) / 15, dtype=torch.float32).double()
    zero = torch.round(-torch.tensor(low) / step.float()).double()
    return (torch.clamp(torch.round(x / step) + zero, 0, 15) - zero) * step


def logits_and_inputs(model: torch.nn.Module, tokens: Tensor) -> tuple[Tensor, dict[tuple[int, str], Tensor]]:
    """Logits of a running model, and what reaches every site before it is prepared."""
    seen: dict[tuple[int, str], Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        for site, linears in SITES.items():
            layer.get_submodule(linear_module_of(linears[0])).register_forward_pre_hook(
                lambda _module, inputs, key=(index, site): seen.update({key: inputs[0]}))
    with torch.no_grad():
        return model(tokens).logits.double(), seen


def as_stored(operation: dict) -> dict:
    """An online operation with its tensors as a checkpoint keeps them: float32."""
    return {name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for name, value in operation.items()}


def expected_logits(made: Given, transform: str, preset: str, granularity: str, done: Quantized, seen: dict | None = None) -> Tensor:
    """The reference decoder on weights rounded by definition, inputs prepared by a hook, norms and biases in float32, ends in bfloat16.

    Where the running model's inputs are ``seen`` they must be those of the reference, and are rounded in their place: transformers' norms
    work in float32, which would turn a rounding here and there (bfloat16 embeddings make ties).
    """
    fitted = fit(TRANSFORMS[transform], made.decoder, made.statistics)
    layers, (weight, activation) = transformed_layers(made, fitted), schemes(preset, granularity)
    ends = made.decoder.ends()
    fitted.fold_ends(ends)
    state = {END_ROLES[role]: tensor.float() if role == "final_norm" else tensor.bfloat16() for role, tensor in ends.items()}
    for layer in layers:
        names = layer_tensors(layer.shape.architecture, layer.index)
        for role, tensor in layer.weights.items():
            if role not in LINEARS:
                state[names[role]] = tensor.float()
                continue
            rounded = tensor.bfloat16() if weight is None else fake_quantize(tensor.float(), weight)
            parts = [done.content.tensors.get(f"{bare_name(layer.index, role)}.{part}") for part in ("left", "right")]
            state[names[role]] = rounded.double() if parts[0] is None else rounded.double() + parts[0].double() @ parts[1].double()

    def hook(index: int, site: str, x: Tensor) -> Tensor:
        if seen is not None:
            assert close(seen[index, site], x, 2e-6), (index, site)
            x = seen[index, site]
        x = apply_online([as_stored(operation) for operation in layers[index].online[site]], x)
        if activation is None:
            return x
        if activation.granularity == "tensor":
            statistics = layers[index].statistics[site]
            return static_rounding(x, statistics.minimum.min().item(), statistics.maximum.max().item())
        return fake_quantize(x, activation)

    return logits(state, made.config, made.tokens, hook)


RUNS = [("llama", "none", preset, granularity, rtn) for preset, granularity in (*GRANULAR, ("bf16", "channel"), ("w16a4", "channel"))
        if granularity != "tensor" or preset == "int4"]
RUNS += [(case, transform, preset, "channel", rtn) for case in CASE_OF for transform in ("scaling", "hadamard") for preset in ("int4", "bf16")]
RUNS += [(case, transform, preset, "channel", rtn) for case in ("llama", "mistral") for transform in ("shifting", "blocks", "duquant")
         for preset in ("int4", "bf16")]
RUNS += [("qwen3", "shifting", "int4", "tensor", rtn)]
RUNS += [("llama", "hadamard", "nvfp4", "channel", rtn), ("qwen2", "hadamard", "int4", "tensor", rtn), ("mistral", "scaling", "int4", "tensor", rtn),
         ("llama", "hadamard", "int4", "channel", partial(low_rank, rank=4)),
         ("qwen3", "none", "mxfp4", "channel", partial(low_rank, rank=4, metric="qera_exact"))]


@pytest.mark.parametrize("case, transform, preset, granularity, mitigation", RUNS, ids=lambda value: getattr(value, "__name__", None) or
                         (f"{value.func.__name__}" if isinstance(value, partial) else str(value)))
def test_the_loaded_model_computes_what_the_definition_says(case, transform, preset, granularity, mitigation, given, tmp_path):
    made = given[case]
    done = quantized(made, transform, preset, granularity, mitigation if PRESETS[preset]["weight"] else None)
    found, seen = logits_and_inputs(load_quantized(saved(done, tmp_path), torch.float64), made.tokens)
    assert close(found, expected_logits(made, transform, preset, granularity, done, seen), 2e-6)
    if preset != "bf16":
        assert not close(found, expected_logits(made, transform, "bf16", "channel", done), 1e-3)


@pytest.mark.parametrize("preset, granularity", [("int4", "channel"), ("int4", "tensor"), ("nvfp4", "channel"), ("int4", "group-16")])
def test_a_token_does_not_depend_on_its_batch(preset, granularity, given, tmp_path):
    site_input = load_quantized(saved(quantized(given["llama"], "hadamard", preset, granularity), tmp_path)).model.layers[1].mlp.down_proj.site_input
    x = torch.randn(8, 24, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 8)[:, None, None]
    assert torch.equal(site_input.prepare(x), torch.cat([site_input.prepare(window[None]) for window in x]))


def test_the_online_hadamard_is_recorded_for_one_site(given, tmp_path):
    saved(quantized(given["llama"], "hadamard"), tmp_path)
    assert read_json(tmp_path / "quantgrid.json")["online"] == {f"layers.{layer}.down_input": [{"operation": "hadamard"}] for layer in range(2)}


def test_the_tensors_of_online_operations_are_kept_with_the_weights(given, tmp_path):
    done = quantized(given["llama"], "blocks")
    tensors, about = load_file(saved(done, tmp_path) / "model.safetensors"), read_json(tmp_path / "quantgrid.json")
    assert about["online"]["layers.0.mlp_input"] == [{"operation": "gather"}, {"operation": "block_hadamard", "size": 16}]
    assert about["online"]["layers.0.down_input"] == [{"operation": "block_hadamard", "size": 16}]
    order = tensors["layers.0.mlp_input.online.0.order"]
    assert order.dtype == torch.int32 and sorted(order.tolist()) == list(range(64))
    assert {name for name in tensors if ".online." in name} == {
        f"layers.{layer}.{site}.online.0.order" for layer in range(2) for site in ("attention_input", "output_input", "mlp_input")}
    model = load_quantized(tmp_path, torch.bfloat16)
    assert not any("online" in name for name in model.state_dict())


def test_online_tensors_run_in_the_dtype_of_the_model(given, tmp_path):
    folder = saved(quantized(given["llama"], "duquant"), tmp_path)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        site_input = load_quantized(folder, dtype).model.layers[0].mlp.down_proj.site_input
        assert {buffer.dtype for name, buffer in site_input.named_buffers() if "blocks" in name} == {dtype}
        x = torch.randn(1, 5, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert site_input.prepare(x).dtype == dtype


@pytest.mark.parametrize("transform, operations, added, untied", [
    ("none", 0, 0, 0), ("scaling", 0, 0, 0),
    ("hadamard", 2 * 96 * (3 + 12), 0, 61 * 64),  # H96 = H12 ⊗ H8
    ("shifting", 2 * (64 + 64 + 96 + 64 * 2 * 4 + 96 * 15), 2 * (64 + 64 + 96 + 16), 61 * 64),  # llama has all biases already
    ("blocks", 2 * (64 * 3 + 96) * 4, 2 * 3 * 64, 0),
    ("duquant", 2 * (64 * 3 + 96) * 2 * 32, 2 * (64 * 3 + 96 + 4 * 2 * 16**2), 0)])
def test_what_a_transform_costs_while_the_model_runs(transform, operations, added, untied, given, tmp_path):
    made = given["llama"]
    done = quantized(made, transform)
    expected = {"online_operations": operations, "added_parameters": added, "untied_parameters": untied}
    assert {name: done.costs[name] for name in expected} == expected
    bare = given["mistral"]
    more = quantized(bare, transform).costs["added_parameters"]
    heads, kept = bare.decoder.shape.heads * bare.decoder.shape.head_dim, load_file(saved(quantized(bare, transform), tmp_path) / "model.safetensors")
    assert more == sum(t.numel() for name, t in kept.items() if name.endswith("_proj.bias") or ".online." in name) and heads == 128


def test_the_input_of_a_site_is_prepared_once(given, tmp_path, monkeypatch):
    made, calls = given["llama"], []
    model = load_quantized(saved(quantized(made, "hadamard"), tmp_path))
    monkeypatch.setattr(linear_module, "fake_quantize", lambda x, *rest, **options: calls.append(x.shape) or fake_quantize(x, *rest, **options))
    with torch.no_grad():
        first, second = model(made.tokens).logits, model(made.tokens).logits
    assert len(calls) == 2 * 2 * len(SITES) and torch.equal(first, second)
    assert all(module._source is None and module._prepared is None for module in model.modules() if isinstance(module, linear_module.SiteInput))


@pytest.mark.parametrize("transform, tied", [("none", True), ("scaling", True), ("hadamard", False)])
def test_a_tied_head_stays_tied_unless_the_transform_unties_it(transform, tied, given, tmp_path):
    model = load_quantized(saved(quantized(given["llama"], transform), tmp_path))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied == model.config.tie_word_embeddings
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)


def test_full_precision_without_a_transform_is_the_model_in_bfloat16(given, tmp_path):
    made = given["qwen2"]
    model = load_quantized(saved(quantized(made, "none", "bf16", mitigation=None), tmp_path))
    original = load_full_precision(made.folder)
    for name, tensor in original.state_dict().items():
        rounded = tensor if "norm" in name or name.endswith("bias") else tensor.bfloat16().float()
        assert torch.equal(model.state_dict()[name], rounded), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_runs_in_the_dtype_asked_for(dtype, given, tmp_path):
    made = given["llama"]
    folder = saved(quantized(made, "hadamard", "int4", mitigation=partial(low_rank, rank=3)), tmp_path)
    model, exact = load_quantized(folder, dtype), load_quantized(folder, torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} and not any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        found, wanted = model(made.tokens).logits, exact(made.tokens).logits
    assert found.dtype == dtype and (found.double() - wanted).norm() < (0.3 if dtype == torch.bfloat16 else 0.05) * wanted.norm()


# -- disk ----------------------------------------------------------------------------------------------------------------------------------

OTHER_PROCESS = """
import hashlib, json, sys, torch
from quantgrid.checkpoints import load_quantized
found = {}
for folder in sys.argv[1:]:
    weights = load_quantized(folder).state_dict()
    found[folder] = {name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for name, tensor in weights.items()}
print(json.dumps(found))
"""


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_another_process_reads_the_same_weights(given, tmp_path):
    """Bit for bit what the mitigations returned, in every format, granularity and for every mitigation."""
    made, wanted = given["llama"], {}
    cells = [("hadamard", preset, granularity, rtn) for preset, granularity in GRANULAR]
    cells += [("scaling", "int4", "channel", method) for method in (gptq, partial(low_rank, rank=3), partial(gptq_low_rank, rank=3))]
    for number, (transform, preset, granularity, mitigation) in enumerate(cells):
        solved = {}

        def remembering(weight, statistics, scheme, mitigation=mitigation, solved=solved):
            done = mitigation(weight, statistics, scheme)
            solved[len(solved)] = done
            return done

        folder = saved(quantized(made, transform, preset, granularity, remembering), tmp_path / str(number))
        expected = {}
        for linear, done in zip(LINEARS, solved.values(), strict=True):
            for layer in range(2):
                name = bare_name(layer, linear)
                expected[f"{name}.weight"] = digest(done.quantized.dequantize(torch.float32)[layer])
                if done.low_rank:
                    expected |= {f"{name}.{part}": digest(factor[layer].float()) for part, factor in zip(("left", "right"), done.low_rank)}
        wanted[str(folder)] = expected
    done = subprocess.run([sys.executable, "-c", OTHER_PROCESS, *wanted], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(SCRIPTS)})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == list(wanted)
    for folder, expected in wanted.items():
        assert {name: found[folder][name] for name in expected} == expected


def bytes_on_disk(tensors: dict[str, Tensor], name: str) -> int:
    return sum(tensor.numel() * tensor.element_size() for key, tensor in tensors.items()
               if key.startswith(f"{name}.") and not key.endswith(".bias"))


@pytest.mark.parametrize("mitigation", [rtn, partial(low_rank, rank=3)], ids=["rtn", "low_rank"])
@pytest.mark.parametrize("preset, granularity", GRANULAR)
def test_the_accounted_bits_are_the_bytes_on_disk(preset, granularity, mitigation, given, tmp_path):
    """To less than a byte per tensor: rows and zero points of odd length are padded."""
    done = quantized(given["llama"], "none", preset, granularity, mitigation)
    tensors = load_file(saved(done, tmp_path) / "model.safetensors")
    scheme, total, stored = schemes(preset, granularity)[0], 0, 0
    for layer in range(2):
        for linear in LINEARS:
            entry, (m, n) = done.errors[f"{layer}.{linear}"], given["llama"].decoder.shape.linear_size(linear)
            found = 8 * bytes_on_disk(tensors, bare_name(layer, linear))
            assert 0 <= found - round(entry["stored_bits"] * m * n, 6) < 8 and entry["size"] == m * n
            blocks = {"tensor": 1, "channel": m, "group": m * n // (scheme.group_size or 1)}[scheme.granularity]
            scale_bits = {"fp32": 32, "e8m0": 8, "e4m3": 8}[scheme.scale_format]
            paper = scheme.element_format.bits + (blocks * (scale_bits + scheme.codebook_bits) + 32 * (scheme.global_scale == "tensor")) / (m * n)
            rank = 3 if mitigation is not rtn else 0
            assert math.isclose(entry["bits"], paper + 16 * rank * (m + n) / (m * n), rel_tol=1e-12)
            total, stored = total + m * n, stored + found
    assert math.isclose(summarize(done.errors)["stored_bits"], stored / total, abs_tol=8 * 14 / total)


def test_full_precision_counts_sixteen_bits(given, tmp_path):
    done = quantized(given["llama"], "hadamard", "bf16", mitigation=None)
    tensors = load_file(saved(done, tmp_path) / "model.safetensors")
    assert summarize(done.errors)["bits"] == summarize(done.errors)["stored_bits"] == 16.0
    assert all(bytes_on_disk(tensors, bare_name(0, linear)) == 2 * done.errors[f"0.{linear}"]["size"] for linear in LINEARS)


def test_equal_content_is_equal_bytes(given, tmp_path):
    made = given["llama"]
    one, other = (saved(quantized(made, "hadamard", "nvfp4", mitigation=gptq), tmp_path / name) for name in "ab")
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in ("model.safetensors", "quantgrid.json"))


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
    write_json(folder / "quantgrid.json", {**read_json(folder / "quantgrid.json"), "sha256": sha256_of(folder / "model.safetensors")})


@pytest.mark.parametrize("spoil, names", [(truncate, "model.safetensors"), (alter, "model.safetensors"), (empty, "model.safetensors"),
                                          (cut_manifest, "quantgrid.json"), (drop_a_norm, "model.norm.weight")])
def test_a_spoilt_checkpoint_is_refused_by_name(spoil, names, given, tmp_path):
    folder = saved(quantized(given["llama"]), tmp_path)
    load_quantized(folder)
    spoil(folder)
    with pytest.raises(ConfigError, match=str(tmp_path)) as refused:
        load_quantized(folder)
    assert names in str(refused.value)


def test_a_failed_cell_passes_its_reason_on(tmp_path):
    save_failed(tmp_path / "model.safetensors", tmp_path / "quantgrid.json", {"axes": {"model": "m"}}, "GPTQ: layer 3 broke down")
    assert read_json(tmp_path / "quantgrid.json")["status"] == "failed" and (tmp_path / "model.safetensors").is_file()
    with pytest.raises(NumericalFailure, match="GPTQ: layer 3 broke down"):
        load_quantized(tmp_path)


# -- quantizing a decoder ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mitigation", [rtn, gptq, partial(gptq_low_rank, rank=2)], ids=["rtn", "gptq", "gptq_low_rank"])
def test_layers_in_chunks_are_layers_at_once(mitigation, given, monkeypatch):
    made = given["qwen2"]
    whole = quantized(made, "hadamard", "int4", mitigation=mitigation)
    monkeypatch.setattr(quantization, "BUDGET", 1)
    assert quantization.chunks(made.decoder) == [range(0, 1), range(1, 2)]
    parts = quantized(made, "hadamard", "int4", mitigation=mitigation)
    assert whole.content.tensors.keys() == parts.content.tensors.keys() and whole.details == parts.details
    for name, tensor in whole.content.tensors.items():
        assert (tensor != parts.content.tensors[name]).float().mean() <= (0 if mitigation is rtn else 0.02), name


@pytest.mark.parametrize("preset, granularity", [("int4", "channel"), ("w4a16", "channel"), ("int4", "tensor"), ("nvfp4", "channel")])
def test_errors_are_those_of_the_definition(preset, granularity, given):
    """The sample of these statistics is all tokens, so without rounded activations the joint error is the output error."""
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
            wanted = {"weight_error": ((weight - used).norm() / weight.norm()) ** 2,
                      "output_error": ((x @ (weight - used).T).norm() / (x @ weight.T).norm()) ** 2,
                      "joint_output_error": ((rounded @ used.T - x @ weight.T).norm() / (x @ weight.T).norm()) ** 2}
            entry = done.errors[f"{layer.index}.{linear}"]
            assert all(math.isclose(entry[name], value.item(), rel_tol=2e-3) for name, value in wanted.items()), (linear, entry, wanted)


def test_nothing_but_linears_is_rounded(given):
    made = given["qwen3"]
    tensors, state = quantized(made).content.tensors, load_file(made.folder / "model.safetensors")
    linears = {f"{bare_name(layer, linear)}.weight" for layer in range(2) for linear in LINEARS}
    for name, tensor in state.items():
        if name in linears:
            assert name not in tensors and f"{name.removesuffix('.weight')}.codes" in tensors
        else:
            assert close(tensors[name].float(), tensor, 0 if "norm" in name or "bias" in name else 2**-8), name


@pytest.mark.parametrize("columns", [96, 192, 193, 500])
def test_the_output_square_counts_every_block_of_the_moment(columns):
    generator = torch.Generator().manual_seed(columns)
    weight, x = (torch.randn(rows, columns, generator=generator) for rows in (33, 2 * columns))
    found = output_square(weight, x.mT @ x / len(x))
    torch.testing.assert_close(found.double(), (x.double() @ weight.double().mT).square().sum() / len(x), rtol=1e-5, atol=0)
