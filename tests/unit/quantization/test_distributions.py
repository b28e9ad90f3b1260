"""Distributions before rounding: their numbers against NumPy and SciPy on dense activations, their
figures, and which transforms are shown."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import tiny_decoders
from quantgrid.calibration.layers import DecoderFolder
from quantgrid.config import shown_transforms
from quantgrid.config.cells import Cell
from quantgrid.config.registry import load, method
from quantgrid.config.shown_transforms import FIGURES, shown
from quantgrid.ground.errors import ConfigError, NumericalFailure
from quantgrid.inference.transform import Transform, fit, layer_state
from quantgrid.models.plans import SITES
from quantgrid.models.shapes import layer_tensors
from quantgrid.quantization.distributions import BINS, describe, kurtosis, measures
from quantgrid.reporting.data import descriptions
from quantgrid.reporting.figures import distributions, study_figures
from quantgrid.reporting.page import page_context, report
from reference_decoder import site_inputs
from reference_statistics import run, write_statistics
from selection import others_slow

LAYERS = 3
EXCESSES = ("trace_excess", "largest_trace_excess")
NAMES = ("none", "random_hadamard", "scaling", "block_hadamard")


def fitted(name, decoder, statistics):
    """A method with its default options."""
    found = method("transforms", name)
    options = {**found.resolve({"method": name}, name)["options"], **({"seed": 1} if found.seeded else {})}
    return fit(load("transforms", name).primitives(**options), decoder, statistics)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model folder, its state and config, its statistics (of which all tokens are the sample),
    and descriptions of several transforms."""
    base = tmp_path_factory.mktemp("described")
    config, state = tiny_decoders.Case("LlamaForCausalLM", hidden=64, intermediate=288, layers=LAYERS).build()
    state = {name: tensor.float().double() for name, tensor in state.items()}
    tokens = tiny_decoders.random_tokens(config, 4, 24)
    decoder = DecoderFolder(tiny_decoders.save(base / "model", config, state))
    statistics = write_statistics(base / "statistics.safetensors", site_inputs(state, config, tokens))
    transforms = {name: fitted(name, decoder, statistics) for name in NAMES}
    paths = []
    for name, transform in transforms.items():
        paths.append(base / f"{name}.json")
        axes = {"model": "m", "transform": name, "target": "int4-channel" if name == "scaling" else "any"}
        paths[-1].write_text(json.dumps({"axes": axes, "status": "ok", **describe(decoder, transform, statistics)}))
    return SimpleNamespace(
        config=config,
        state=state,
        tokens=tokens,
        decoder=decoder,
        statistics=statistics,
        transforms=transforms,
        paths=paths,
    )


def folded(case, name):
    """(state, online) of the whole model with a transform folded in."""
    state, online = {}, {}
    for index in range(LAYERS):
        layer = case.decoder.layer(index)
        case.transforms[name].fold_layer(layer)
        tensors = layer_tensors(layer.shape, index)
        state |= {tensors[role]: weight for role, weight in layer.weights.items()}
        online |= {(index, site): operations for site, operations in layer.online.items()}
    ends = case.decoder.ends()
    case.transforms[name].fold_ends(ends)
    roles = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
    return state | {roles[role]: tensor for role, tensor in ends.items()}, online


def dense(case, name):
    """(layer, site) -> inputs of its linears in the transformed model, run token by token, and
    their weights, as NumPy arrays."""
    state, online = folded(case, name)
    _, inputs = run(state, case.config, case.tokens, online)
    tensors = {layer: layer_tensors(case.decoder.shape, layer) for layer in range(LAYERS)}
    return {
        (layer, site): {
            "inputs": x.numpy(),
            "weights": np.concatenate([state[tensors[layer][linear]].numpy() for linear in SITES[site]]),
        }
        for (layer, site), x in inputs.items()
    }


def excesses(tensors, size):
    """(sum of the products of the traces over that of their bounds, largest ratio) in blocks of ``size`` channels,
    from singular values."""
    products, bounds = [], []
    for start in range(0, tensors["inputs"].shape[1], size):
        x, w = (tensors[name][:, start : start + size] for name in ("inputs", "weights"))
        bounds.append(np.linalg.svd(x @ w.T, compute_uv=False).sum() ** 2)
        products.append((x**2).sum() * (w**2).sum())
    return sum(products) / sum(bounds), np.max(np.divide(products, bounds))


@pytest.mark.parametrize("name", NAMES)
def test_measures_are_those_of_the_transformed_model(case, name):
    found, rows = json.loads(case.paths[NAMES.index(name)].read_text()), dense(case, name)
    for (layer, site), tensors in rows.items():
        for tensor, x in tensors.items():
            ours, largest = {key: values[layer] for key, values in found[tensor][site].items()}, np.abs(x).max(0)
            assert ours["kurtosis"] == pytest.approx(
                stats.kurtosis(x.ravel(), fisher=False), rel=2e-5
            )  # statistics are kept in float32
            assert ours["row_kurtosis"] == pytest.approx(np.median(stats.kurtosis(x, axis=1, fisher=False)), rel=2e-5)
            assert ours["peak_to_median"] == pytest.approx(largest.max() / np.median(largest), rel=2e-5)
            width = found["sites"][site]["channels_per_bin"]
            assert ours["maximum"] == pytest.approx(
                [largest[start : start + width].max() for start in range(0, len(largest), width)], rel=2e-4
            )
    for (layer, site), tensors in rows.items():
        for size in (16, 32):
            ours = [found["trace_excess"][site][f"{name}_{size}"][layer] for name in EXCESSES]
            assert ours == pytest.approx(excesses(tensors, size), rel=1e-3)
    assert found["sites"] == {
        site: {
            "channels": 288 if site == "down_input" else 64,
            "channels_per_bin": 2 if site == "down_input" else 1,
        }
        for site in SITES
    }
    assert all(len(found["inputs"][site]["maximum"][0]) <= BINS for site in SITES)


def test_kurtosis_is_that_of_scipy_on_the_same_sample(case):
    found = json.loads(case.paths[0].read_text())
    for layer in range(LAYERS):
        for site, statistics in layer_state(case.decoder, layer, case.statistics).statistics.items():
            sample = statistics.samples.double().numpy()
            for ours, theirs in (
                (found["inputs"][site]["kurtosis"][layer], stats.kurtosis(sample.ravel(), fisher=False)),
                (found["inputs"][site]["row_kurtosis"][layer], np.median(stats.kurtosis(sample, axis=1, fisher=False))),
            ):
                assert abs(ours - theirs) <= 1e-9 * theirs


def test_the_kurtosis_of_known_distributions():
    one_hot = torch.zeros(64, dtype=torch.float64).index_fill_(0, torch.tensor(5), 1.0)
    assert kurtosis(one_hot).item() == pytest.approx(62 + 1 / 63)
    assert kurtosis(
        torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).item() == pytest.approx(3, abs=0.05)
    assert kurtosis(torch.tensor([1.0, -1.0] * 8, dtype=torch.float64)).item() == 1


def test_what_has_no_spread_has_no_kurtosis_and_what_is_not_finite_fails(case):
    flat = measures(torch.zeros(3, 8, dtype=torch.float64), 3)
    assert flat == {"kurtosis": None, "row_kurtosis": None, "peak_to_median": None, "maximum": [0.0] * 3}
    partly = measures(torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.float64), 4)
    assert (
        partly["row_kurtosis"] == pytest.approx(stats.kurtosis([1, 0, 0, 0], fisher=False))
        and partly["peak_to_median"] is None
    )

    class Broken(Transform):
        def fold_layer(self, layer):
            layer.weights["down"][0, 0] = torch.inf

    with pytest.raises(NumericalFailure, match=r"layers\.0\.down_input: the transformed weights hold NaN or infinity"):
        describe(case.decoder, Broken(), case.statistics)


# -- tables and figures ----------------------------------------------------------------------------


@pytest.fixture
def described(case, tmp_path):
    """The descriptions, and one of a transform whose fit failed."""
    failed = tmp_path / "failed.json"
    failed.write_text(
        json.dumps(
            {"axes": {"model": "m", "transform": "late", "target": "any"}, "status": "failed", "reason": "no factor"}
        )
    )
    return descriptions.read([*case.paths, failed])


def test_tables_hold_what_was_measured(described):
    assert [one.label for one in described] == [
        "no transform",
        "random_hadamard",
        "scaling (int4-channel)",
        "block_hadamard",
        "late",
    ]
    figure, table = distributions.build("kurtosis-inputs", described)
    assert table.dtypes[3:].eq(float).all()
    assert list(table.columns) == [
        "transform",
        "site",
        "layer",
        "kurtosis",
        "row_kurtosis",
        "peak_to_median",
    ]
    assert len(table) == 4 * 4 * LAYERS + 1 and table[table["transform"] == "late"]["kurtosis"].isna().all()
    row = table[(table["transform"] == "random_hadamard") & (table.site == "mlp_input") & (table.layer == 2)].iloc[0]
    assert row.row_kurtosis == described[1].content["inputs"]["mlp_input"]["row_kurtosis"][2]
    left, right = figure.axes[4:6]
    assert (
        left.get_title(loc="left") == "mlp_input, all values"
        and right.get_title(loc="left") == "mlp_input, within a token"
    )
    assert list(right.lines[2].get_ydata()) == described[1].content["inputs"]["mlp_input"]["row_kurtosis"]
    assert [text.get_text() for text in figure.legends[0].get_texts()][-2:] == ["normal distribution", "late: failed"]
    _, table = distributions.build("weights-down_input", described)
    assert list(table.columns)[:4] == ["transform", "layer", "0", "2"] and table.shape == (4 * LAYERS, 2 + 144)
    assert table.iloc[4, 2:].tolist() == described[1].content["weights"]["down_input"]["maximum"][1]


def test_the_distance_from_the_best_transform_is_drawn_for_both_block_sizes(described):
    figure, table = distributions.build("trace-excess", described)
    assert list(table.columns[3:]) == [*descriptions.EXCESSES] and len(table) == 4 * 4 * LAYERS + 1
    row = table[(table["transform"] == "random_hadamard") & (table.site == "mlp_input") & (table.layer == 2)].iloc[0]
    measured = described[1].content["trace_excess"]["mlp_input"]
    assert row.largest_trace_excess_32 == measured["largest_trace_excess_32"][2] > row.trace_excess_32 > 1
    small, large = figure.axes[4:6]
    assert [ax.get_title(loc="left") for ax in (small, large)] == ["mlp_input, blocks of 16", "mlp_input, blocks of 32"]
    assert list(small.lines[0].get_ydata()) == [1, 1], "the bound"
    assert list(large.lines[2].get_ydata()) == measured["trace_excess_32"]
    assert [text.get_text() for text in figure.legends[0].get_texts()][-2:] == ["lower bound", "late: failed"]


def test_heat_maps_share_colours_and_show_every_layer(described):
    figure, _ = distributions.build("inputs-down_input", described)
    maps = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title(loc="left") for ax in maps] == [one.label for one in described[:4]]
    limits = {ax.images[0].get_clim() for ax in maps}
    everything = np.concatenate([one.maxima("inputs", "down_input").ravel() for one in described[:4]])
    assert [*limits] == [pytest.approx((np.percentile(everything, distributions.FAINTEST), everything.max()))]
    assert (
        maps[0].images[0].get_array().shape == (LAYERS, 144)
        and maps[0].get_xlim() == (0, 288)
        and maps[0].get_ylim() == (-0.5, LAYERS - 0.5)
    )
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == ["× failed: no factor"]
    [bar] = [ax for ax in figure.axes if "largest |x|" in ax.get_ylabel()]
    figure.draw_without_rendering()
    assert not any("$" in tick.get_text() for tick in bar.get_yticklabels())


@pytest.mark.parametrize("name", others_slow(["kurtosis-weights", "inputs-mlp_input"], "kurtosis-weights".__eq__))
def test_the_same_figure_is_the_same_bytes(described, tmp_path, name):
    for folder in ("a", "b"):
        study_figures.save(
            distributions.build(name, described)[0],
            [tmp_path / folder / f"{name}{suffix}" for suffix in (".png", ".svg", ".pdf")],
        )
    assert all(
        (tmp_path / "a" / f"{name}{suffix}").read_bytes() == (tmp_path / "b" / f"{name}{suffix}").read_bytes()
        for suffix in (".png", ".svg", ".pdf")
    )


def test_figures_stand_in_the_report_with_their_captions(tmp_path):
    for name in FIGURES:
        (tmp_path / "m" / f"{name}.svg").parent.mkdir(exist_ok=True)
        (tmp_path / "m" / f"{name}.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    drawn = page_context.shown_distributions([tmp_path / "m" / f"{name}.svg" for name in FIGURES])
    assert {figure["model"] for figure in drawn} == {"m"} and len({figure["caption"] for figure in drawn}) == len(
        FIGURES
    )
    text = report.build([], {"distributions": drawn})
    assert text.count("data:image/svg+xml") == len(FIGURES) and "Inputs and weights before rounding" in text
    assert "Inputs and weights before rounding" not in report.build([], {})


def test_transforms_that_all_failed_give_figures_and_tables_that_say_so(described):
    for name in ("kurtosis-inputs", "weights-down_input"):
        figure, table = distributions.build(name, described[-1:])
        figure.draw_without_rendering()
        assert table.empty or table["kurtosis"].isna().all()


@pytest.mark.parametrize("content", [{}, {"inputs": {}, "weights": {}, "sites": {}}])  # the last of an old version
def test_another_file_is_refused_by_name(content, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"status": "ok", **content}))
    with pytest.raises(ConfigError, match=r"x\.json: not a description of a transform"):
        descriptions.read([tmp_path / "x.json"])


# -- which transforms are shown --------------------------------------------------------------------


def test_the_unchanged_model_comes_first_and_a_name_with_seeds_stands_for_its_first():
    config = {
        "report": {"distributions": ["rotation", "awq"]},
        "transforms": {"rotation": {"method": "random_hadamard", "seeds": [4, 5]}},
    }
    cells = [
        Cell("m", "none", "none", "-", "bf16"),
        Cell("m", "awq", "none", "-", "bf16"),
        Cell("m", "awq", "rtn", "channel", "int8"),
        Cell("m", "awq", "rtn", "channel", "int4"),
        Cell("m", "rotation-s5", "rtn", "channel", "int4"),
        Cell("m", "rotation-s4", "rtn", "channel", "int4"),
        Cell("n", "none", "none", "-", "bf16"),
    ]
    assert shown(config, cells) == {"m": [cells[0], cells[5], cells[2]], "n": [cells[6]]}
    assert shown({**config, "report": {"distributions": []}}, cells) == {}
    with pytest.raises(
        ConfigError,
        match=r"report\.distributions: no study has the transform 'rotation-s4'; add it to one, or leave it out here",
    ):
        shown(config, cells[:4])
    assert len(set(shown_transforms.FIGURES)) == 11


def test_tables_of_numbers_are_read_back(described):
    _, table = distributions.build("kurtosis-weights", described)
    again = pd.read_csv(pd.io.common.StringIO(table.to_csv(index=False)))
    assert again.layer.max() == LAYERS - 1 and set(again.site.dropna()) == set(SITES)
