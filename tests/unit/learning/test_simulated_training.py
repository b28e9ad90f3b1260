"""Everything that needs gradients, on a simulated device: it computes what it does on the CPU, and no tensors of
two devices meet."""

from __future__ import annotations

import pytest

from learned_cases import OBJECTIVES
from simulated_training import NAME, process

TRAININGS = [
    *(("transform", name, options) for name, options in OBJECTIVES),
    *(("transform", "optimized_rotation", {"objective": objective}) for objective in ("kurtosis", "whip")),
    ("mitigation", "tune_scales", {}),
    ("mitigation", "tune_scales", {"base": "gptq"}),
    ("mitigation", "learned_rounding", {}),
    ("mitigation", "learned_rounding", {"base": "gptq", "error": "fisher"}),
    ("mitigation", "learned_rounding", {"error": "trimmed"}),
    ("mitigation", "distill_blocks", {}),
    ("mitigation", "qat_finetune", {}),
    ("mitigation", "qat_finetune", {"base": "gptq", "loss": "cross_entropy"}),
    ("sensitivity", "", {}),
]
MIXED = f"tensors on {NAME} and on cpu"


@pytest.fixture(scope="module")
def run():
    with process() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("decoder")


@pytest.mark.slow
@pytest.mark.parametrize("what, name, options", TRAININGS, ids=str)
def test_a_training_is_that_of_the_cpu(what, name, options, run, folder):
    wanted, found = (run(what, folder, device, name, options, None) for device in ("cpu", NAME))
    assert found.losses and found.losses == pytest.approx(wanted.losses, rel=1e-4)
    assert found.devices == {"cpu"}
    assert found.tensors.keys() == wanted.tensors.keys()
    for key, sums in wanted.tensors.items():
        assert found.tensors[key] == pytest.approx(sums, rel=1e-2, abs=1e-3), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "planted, what, name, options",
    [
        ("inputs of a transform", "transform", "optimized_scaling", {}),
        ("inputs of a mitigation", "mitigation", "tune_scales", {}),
        ("gradient of rounding", "transform", "optimized_rotation", {"objective": "layer_wise"}),
    ],
)
def test_a_tensor_left_on_the_cpu_is_found(planted, what, name, options, run, folder):
    with pytest.raises(RuntimeError, match=MIXED):
        run(what, folder, NAME, name, options, planted)
