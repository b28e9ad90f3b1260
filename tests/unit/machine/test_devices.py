"""Placement of layers: dtype of factorizations by GPU, groups that fit, smaller parts where memory runs out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from quantgrid.calibration.collect import advance
from quantgrid.jobs import rule_job
from quantgrid.machine import devices, gpus
from quantgrid.machine.devices import Placement, in_smaller_parts, solver_dtype
from quantgrid.machine.malloc import LARGE

CUDA = torch.device("cuda")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.")


class Card:
    """A GPU for ``most`` items at a time; ``calls`` are the parts that were tried."""

    def __init__(self, most: int):
        self.most, self.calls = most, []

    def __call__(self, part: range) -> None:
        self.calls.append(part)
        if len(part) > self.most:
            raise FULL


@pytest.mark.parametrize(
    "capability, fast", [((8, 0), True), ((9, 0), True), ((8, 6), False), ((8, 9), False), ((12, 0), False)]
)
def test_factorizations_are_float64_where_the_gpu_is_fast_at_it(capability, fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert solver_dtype("auto", CUDA) == (torch.float64 if fast else torch.float32)
    assert solver_dtype("float64", CUDA) == torch.float64
    assert solver_dtype("auto", torch.device("cpu")) == torch.float64
    assert solver_dtype("float32", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("free, expected", [(1 << 40, LARGE), (9 << 20, 2 << 20)])
def test_groups_fit_in_the_free_memory_of_a_gpu(free, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    assert Placement(CUDA).budget() == expected
    assert Placement().budget() == LARGE


def test_parts_are_halved_until_they_fit(capsys):
    card = Card(2)
    assert in_smaller_parts([range(7), range(7, 8)], card) == [
        range(1), range(1, 3), range(3, 5), range(5, 7), range(7, 8)
    ]  # fmt: skip
    assert "too little GPU memory for 7 at a time" in capsys.readouterr().err
    with pytest.raises(torch.OutOfMemoryError):
        in_smaller_parts([range(2)], Card(0))


def test_other_errors_are_not_tried_again():
    def run(part):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        in_smaller_parts([range(4)], run)


def test_windows_pass_a_layer_in_smaller_batches():
    class Layer(nn.Module):
        def forward(self, hidden):
            if len(hidden) > 2:
                raise FULL
            return 2 * hidden

    hidden = torch.arange(10.0).view(5, 1, 2)
    wanted = 2 * hidden
    advance(Layer(), hidden, {}, batch_size=4)
    assert torch.equal(hidden, wanted)


@pytest.mark.parametrize(
    "rule, spec, setting",
    [
        ("evaluate_perplexity", {}, "lower `evaluation.batch_size`; or set `compute: {device: cpu}`"),
        ("fit_transform", {"transform": {"learned": True}}, "lower `batch_size` of the transform"),
        (
            "fit_transform",
            {"transform": {"learned": False}},
            "memory (Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.): set",
        ),
        ("quantize_model", {"propagation": {}}, "fewer or shorter windows"),
        ("quantize_model", {}, "set `compute: {device: cpu}` or use a GPU with more memory"),
    ],
)
def test_a_gpu_without_memory_is_one_line_with_the_setting_to_change(rule, spec, setting):
    said = rule_job.one_line(FULL, rule, spec)
    assert setting in said and "\n" not in said
    assert rule_job.one_line(RuntimeError("no"), rule, spec) == ""


@pytest.mark.parametrize("printed, expected", [("81920\n24576\n", 24576 << 20), ("", None), ("[N/A]\n", None)])
def test_the_memory_of_the_smallest_gpu_is_read(printed, expected, monkeypatch):
    monkeypatch.setattr(gpus.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=printed))
    assert gpus.card_memory() == expected


def test_without_nvidia_smi_no_memory_is_known(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert gpus.card_memory() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_budget_of_a_real_gpu():
    assert 0 < devices.Placement(CUDA).budget() <= LARGE
