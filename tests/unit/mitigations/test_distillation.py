"""Quantization-aware distillation: the best of several checks, a teacher that is the student, a start at the
codes of a base."""

from __future__ import annotations

from learned_cases import HELD_OUT, recipe_of, trained
from quantgrid.learning.straight_weight import StraightWeight
from quantgrid.learning.transformed import TransformedModel
from quantgrid.mitigations.methods.qat_finetune import Divergence, RoundedModel
from quantgrid.mitigations.methods.rtn import rtn
from quantgrid.schemes import scheme
from quantgrid.schemes.cell_schemes import CellSchemes
from tiny_decoders import VARIED


def test_the_best_of_several_checks_is_kept(given):
    """At a rate that soon destroys the model the first check is the best, and the last one worse than the
    start."""
    made, options = given(VARIED[1]), {"steps": 4, "learning_rate": 3e-3, "schedule": "linear"}
    one, many = (trained(made, "qat_finetune", checks=checks, **options).ends["all"] for checks in (1, 4))
    assert one["start"] == many["start"] and many["end"] <= one["end"]


def test_distillation_of_what_is_not_rounded_has_no_loss(given):
    """Weights of 8 bits that are codes already, inputs unrounded: teacher and student are one model."""
    made = given(VARIED[1])
    wanted = CellSchemes(scheme("int8"))
    model = TransformedModel(recipe_of(made, wanted, "none"), made.context(), "range")
    learned = {}
    for index in range(len(model.layers)):
        for linear, weight in model.weights(model.folded(index)).items():
            learned[f"{index}.{linear}"] = StraightWeight.of(weight, rtn(weight, None, wanted.weight), "rtn", "range")
    exact = {name: straight.weight.clone().requires_grad_() for name, straight in learned.items()}

    class Unrounded(StraightWeight):
        def rounded(self, values):
            return values["weight"]

    network = RoundedModel(model, {name: Unrounded(w.weight, w.base, False, "range") for name, w in learned.items()})

    def teacher(window, **_):
        return type("Output", (), {"logits": network.logits(window, {n: w.detach() for n, w in exact.items()})})

    (loss,) = Divergence(network, HELD_OUT, teacher).pieces(exact, [0])
    loss.backward()
    assert abs(loss.item()) < 1e-7 and all(tensor.grad.abs().max() < 1e-6 for tensor in exact.values())
