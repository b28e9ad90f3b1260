"""Sequential quantization after an interruption: it goes on behind the last finished layer, with the
same bytes, and never from a state of something else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from checkouts import ROOT
from checkpoint_cases import LLAMA, Given
from quantgrid.ground.storage import read_json, write_tensors
from quantgrid.inference.transform import fit
from quantgrid.mitigations.methods.gptaq import gptaq
from quantgrid.mitigations.methods.gptq import gptq
from quantgrid.models.plans import SITES
from quantgrid.quantization import sequential_state
from quantgrid.quantization.cached import Quantized, Recipe
from quantgrid.quantization.checkpoints import save_quantized
from quantgrid.quantization.sequential import Sequential, quantize_sequentially
from quantgrid.quantization.sequential_state import SPOOL, STATE, SequentialState
from quantgrid.schemes import activation_scheme, scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from quantgrid.transforms.recipes import random_hadamard
from reference_decoder import site_inputs
from reference_statistics import write_statistics
from selection import others_slow
from tiny_decoders import random_tokens, save

LAYERS, FINGERPRINT = 4, {"spec": {"code": "a"}, "inputs": {"windows": "1"}}
CASE = replace(LLAMA, layers=LAYERS)


class Interrupted(Exception):
    """The end of a process."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Given:
    config, state = CASE.build()
    folder, tokens = save(tmp_path_factory.mktemp("model"), config, state), random_tokens(config, 4, 24)
    statistics = write_statistics(folder / "statistics", site_inputs(state, config, tokens))
    return Given(folder, config, tokens, statistics)


@pytest.fixture(autouse=True)
def save_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential_state, "SAVE_SECONDS", 0.0)


def quantize(
    made: Given, folder: Path, end: int | None = None, fingerprint: dict = FINGERPRINT, paired: bool = False
) -> tuple[Quantized, list[int]]:
    """(result, layers computed); interrupted before layer ``end``."""
    computed: list[int] = []

    def progress(layers: Iterable[int]) -> Iterator[int]:
        for layer in layers:
            if layer == end:
                raise Interrupted
            computed.append(layer)
            yield layer

    fitted = fit(random_hadamard.primitives(1), made.decoder, made.statistics)
    schemes = CellSchemes(scheme("int4"), activation={site: [activation_scheme("int8")] for site in SITES})
    recipe = Recipe(fitted, schemes, gptaq if paired else gptq, str(made.statistics))
    how = Sequential(made.tokens, quantized_activations=True, paired=paired)
    return quantize_sequentially(made.decoder, recipe, how, progress, SequentialState(folder, fingerprint)), computed


def left(done: Quantized, folder: Path) -> tuple[bytes, dict, dict]:
    """Checkpoint, manifest and errors of a result."""
    paths = folder / "model.safetensors", folder / "quantgrid.json"
    save_quantized(done.content, *paths, {"axes": {}})
    found = {"summary": done.summary(), "linears": done.errors, "details": done.details, "choices": done.choices}
    return paths[0].read_bytes(), read_json(paths[1]), found


@pytest.fixture(scope="module")
def whole(made: Given, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict, dict]:
    folder = tmp_path_factory.mktemp("whole")
    done, computed = quantize(made, folder)
    assert computed == list(range(LAYERS))
    return left(done, folder)


@pytest.mark.parametrize("paired", [False, True])
def test_interrupted_before_every_layer_it_computes_each_once_and_ends_in_the_same_bytes(
    made: Given, tmp_path: Path, paired: bool
):
    wanted = left(quantize(made, tmp_path / "whole", paired=paired)[0], tmp_path / "whole")
    for end in range(1, LAYERS):
        with pytest.raises(Interrupted):
            quantize(made, tmp_path / "resumed", end, paired=paired)
    done, computed = quantize(made, tmp_path / "resumed", paired=paired)
    assert computed == [LAYERS - 1] and left(done, tmp_path / "resumed") == wanted


KILLED = """
import os, signal, sys
from pathlib import Path
from quantgrid.ground.storage import read_tensors
from test_sequential_state import Given, quantize, sequential_state

sequential_state.SAVE_SECONDS = 0.0
model, folder, layers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
tokens, save = read_tensors(model / "tokens")["tokens"], sequential_state.SequentialState.save

def save_and_die(self, done, result, hidden):
    save(self, done, result, hidden)
    if done == layers:
        self.packed["half"] = hidden[0].float()
        os.kill(os.getpid(), signal.SIGKILL)

sequential_state.SequentialState.save = save_and_die
quantize(Given(model, {}, tokens, model / "statistics"), folder)
"""


@pytest.mark.parametrize("layers", others_slow([1, 3], lambda layers: layers == 1))
def test_killed_behind_a_layer_it_computes_the_rest_in_another_process(
    made: Given, whole: tuple, tmp_path: Path, layers: int
):
    """Packed tensors that follow the saved state are dropped."""
    write_tensors(made.folder / "tokens", {"tokens": made.tokens})
    paths = [ROOT / "scripts", ROOT / "tests", Path(__file__).parent]
    command = [sys.executable, "-c", KILLED, made.folder, tmp_path, str(layers)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found, computed = quantize(made, tmp_path)
    assert computed == list(range(layers, LAYERS)) and left(found, tmp_path) == whole
    assert not any(name == "half" for name in found.content.tensors)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("file", [STATE, SPOOL])
@pytest.mark.parametrize("damage", [flip, shorten, Path.unlink])
def test_a_damaged_state_is_not_used(
    made: Given, whole: tuple, tmp_path: Path, file: str, damage: Callable, capfd: pytest.CaptureFixture
):
    with pytest.raises(Interrupted):
        quantize(made, tmp_path, 2)
    damage(tmp_path / file)
    done, computed = quantize(made, tmp_path)
    assert computed == list(range(LAYERS)) and left(done, tmp_path) == whole
    assert ("starts over" in capfd.readouterr().err) == ((file, damage) != (STATE, Path.unlink))


@pytest.mark.parametrize(
    "other", [{**FINGERPRINT, "spec": {"code": "b"}}, {**FINGERPRINT, "inputs": {"windows": "2"}}, {}]
)
def test_a_state_of_something_else_is_not_used(
    made: Given, whole: tuple, tmp_path: Path, other: dict, capfd: pytest.CaptureFixture
):
    with pytest.raises(Interrupted):
        quantize(made, tmp_path, 2, fingerprint=other)
    done, computed = quantize(made, tmp_path)
    assert computed == list(range(LAYERS)) and left(done, tmp_path) == whole
    assert "another specification, code or input" in capfd.readouterr().err


@pytest.mark.parametrize("seconds", [1, 31])
def test_a_state_is_saved_every_half_minute(made: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int):
    """Each look at the clock is ``seconds`` after the last one."""
    clock = count(0, seconds)
    monkeypatch.setattr(sequential_state, "SAVE_SECONDS", 30.0)
    monkeypatch.setattr(sequential_state.time, "monotonic", lambda: next(clock))
    quantize(made, tmp_path)
    assert (tmp_path / STATE).exists() == (seconds > 30)
