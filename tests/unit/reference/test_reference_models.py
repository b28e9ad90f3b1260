"""The language models that quantgrid ships: their recipe, what was shipped, and the shapes that the
family is there for."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import asdict, replace

import pytest
import torch

from quantgrid.calibration.layers import DecoderFolder
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import read_tensors, sha256_of
from quantgrid.linalg.hadamard_orders import is_reachable
from quantgrid.models.folders import BUILTIN, check_folder
from quantgrid.models.shapes import shape_from_config, shape_from_folder
from quantgrid.reference import measuring, training
from quantgrid.reference.family import FAMILY, SMALLEST, Reference, Size, Training
from quantgrid.reference.ngrams import Ngrams
from quantgrid.reference.planting import Planting, plant
from quantgrid.reference.publishing import publish
from quantgrid.reference.text import VOCABULARY
from quantgrid.reference.training import Trainer, first_steps, loss_of, new_model
from selection import others_slow

SHIPPED = sorted(
    path.name for path in BUILTIN.iterdir()
)  # reference-12m takes hours and is trained by those who want it
TRAINED = [name for name in FAMILY if name in SHIPPED]
PLANTED = [name for name in TRAINED if FAMILY[name].planting is not None]
SHORT = Training(steps=6, rate=1e-3, batch=2, window=16, warm_up=2)
TINY = Reference(Size(32, 64, 2, 4, 2, 8), SHORT)
MIXTURE, POST_NORM = (
    replace(
        FAMILY[name], size=TINY.size, training=replace(SHORT, balance=FAMILY[name].training.balance), settings=settings
    )
    for name, settings in (
        ("reference-3m-moe", {**FAMILY["reference-3m-moe"].settings, "moe_intermediate_size": 16}),
        ("reference-1m-gemma3", {**FAMILY["reference-1m-gemma3"].settings, "layer_types": ["full_attention"] * 2}),
    )
)
WINDOWS = torch.randint(4096, (20, 16), generator=torch.Generator().manual_seed(0))


def card_of(name: str) -> str:
    return (BUILTIN / name / "README.md").read_text()


def stated_losses(name: str) -> dict[str, float]:
    """Nats per token by row of the card's table."""
    return {
        row: float(value)
        for row, value in re.findall(
            r"^\| ([a-z ]+) \| (\d+\.\d+) \| \d+\.\d+ \| \d+\.\d+ \|$", card_of(name), re.MULTILINE
        )
    }


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_a_recipe_trains_in_the_dtype_of_its_products(products: str, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(training, "loss_of", lambda *given, **named: seen.append(given[2]) or loss_of(*given, **named))
    trainer = Trainer(replace(TINY, training=replace(SHORT, products=products)))
    trainer.run(WINDOWS, WINDOWS[:2], until=1)
    assert set(seen) == {products == "bfloat16"}


@pytest.mark.slow
def test_the_first_steps_of_the_smallest_fall_as_recorded():
    """On NumPy's docstrings, from the recipe; other processors round products otherwise, so the
    losses agree in two digits."""
    recorded = list(csv.DictReader((BUILTIN / SMALLEST / "first-steps.csv").open()))
    measured = list(csv.DictReader(first_steps(FAMILY[SMALLEST], BUILTIN / SMALLEST, steps=len(recorded)).splitlines()))
    expected = [float(row["training_loss"]) for row in recorded]
    assert [float(row["training_loss"]) for row in measured] == pytest.approx(expected, abs=0.05)
    assert expected[-1] < expected[0] - 0.5


def test_a_resumed_training_gives_the_same_bytes(tmp_path):
    through, halves = tmp_path / "through.safetensors", tmp_path / "halves.safetensors"
    Trainer(TINY, through).run(WINDOWS, WINDOWS[:2])
    Trainer(TINY, halves).run(WINDOWS, WINDOWS[:2], until=3)
    resumed = Trainer(TINY, halves)
    assert resumed.step == 3
    resumed.run(WINDOWS, WINDOWS[:2])
    expected, found = read_tensors(through), read_tensors(halves)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    losses = [[row.split(",")[:4] for row in one.rows] for one in (Trainer(TINY, through), resumed)]
    assert losses[0] == losses[1]


def test_a_training_can_be_lengthened(tmp_path):
    state, longer = tmp_path / "state.safetensors", replace(TINY, training=replace(TINY.training, steps=9))
    Trainer(TINY, state).run(WINDOWS, WINDOWS[:2], until=5)
    assert Trainer(longer, state).step == 5


@pytest.mark.parametrize("changed", [{"rate": 2e-3}, {"seed": 1}, {"steps": 5}])
def test_a_training_by_another_recipe_is_not_continued(tmp_path, changed):
    """Nor one of so few steps that the rate should have fallen by now."""
    state = tmp_path / "state.safetensors"
    Trainer(TINY, state).run(WINDOWS, WINDOWS[:2], until=5)
    with pytest.raises(ConfigError, match="another recipe, 5 steps"):
        Trainer(replace(TINY, training=replace(TINY.training, **changed)), state)


def test_the_rate_is_a_trapezoid():
    training = Training(steps=100, rate=1.0, warm_up=10, decay_share=0.3, final_share=0.1)
    rates = [training.rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:71] == pytest.approx([1.0] * 61)
    assert rates[-1] == pytest.approx(0.1 + 0.9 / 30)
    assert rates[70:] == sorted(rates[70:], reverse=True)


def test_bigrams_of_a_text_worked_by_hand():
    ngrams = Ngrams(torch.tensor([[0, 1, 0, 1], [0, 1, 1, 0]]), 2)
    assert ngrams.frequencies.tolist() == pytest.approx(
        [3 / 8, 5 / 8]
    )  # second tokens 1 0 1 1 1 0, one added to each count
    assert ngrams.bigram_loss(torch.tensor([[0, 1]]), 2.0) == pytest.approx(-math.log((3 + 2 * 5 / 8) / (3 + 2)))
    assert ngrams.unigram_loss(torch.tensor([[1, 0]])) == pytest.approx(-math.log(3 / 8))


def test_planting_leaves_the_function_as_it_is():
    """In float64, also with factors that are not powers of two."""
    size = Size(32, 64, 2, 4, 2, 8)
    model = new_model(replace(TINY, size=size)).double().eval()
    with torch.no_grad():
        before = model(input_ids=WINDOWS[:2]).logits
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        planted = plant(
            weights, Planting({3: 30.0, 9: 7.0}, {5: 12.0}, {1: 5.0}), size.num_hidden_layers, size.head_dim
        )
        changed = [name for name in weights if not torch.equal(weights[name], planted[name])]
        model.load_state_dict(planted, strict=False)
        torch.testing.assert_close(model(input_ids=WINDOWS[:2]).logits, before, rtol=1e-12, atol=1e-12)
    assert len(changed) == 9 * size.num_hidden_layers


def test_publishing_writes_models_with_their_cards(tmp_path, monkeypatch):
    """A model of two layers and its planted variant: folders that quantgrid takes, the same
    function twice, cards of what is in them."""
    monkeypatch.setitem(FAMILY, "tiny", replace(TINY, planting=Planting({3: 32.0}, {5: 16.0}, {1: 8.0})))
    monkeypatch.setattr(measuring, "part", lambda name, tokenizer, window: WINDOWS)
    trainer, text = (
        Trainer(TINY),
        {"versions": {"numpy": "2"}, "documents": 3, "characters": 99, "tokens": 320, "text_sha256": "abc"},
    )
    trainer.run(WINDOWS, WINDOWS[:2])
    publish("tiny", trainer, BUILTIN / SMALLEST, text, WINDOWS, tmp_path)
    assert (tmp_path / "tiny" / "training.csv").read_text() == trainer.curve()
    assert "Planted outliers" not in (tmp_path / "tiny" / "README.md").read_text()
    assert "3: 32; channels" in (tmp_path / "tiny-planted" / "README.md").read_text()
    losses = [measuring.loss_of_model(measuring.load(tmp_path / name), WINDOWS) for name in ("tiny", "tiny-planted")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name in ("tiny", "tiny-planted"):
        card = (tmp_path / name / "README.md").read_text()
        assert check_folder(tmp_path / name).hidden_size == 32
        assert f"| this model | {losses[0]:.3f} |" in card and sha256_of(tmp_path / name / "model.safetensors") in card
        assert "192 tokens, 60% of the text" in card


@pytest.mark.parametrize(("reference", "kind"), [(MIXTURE, "Qwen2-MoE"), (POST_NORM, "Gemma 3")])
def test_other_architectures_are_published_too(tmp_path, monkeypatch, reference, kind):
    """Trained, written in the layout of their public checkpoints, read by transformers and by quantgrid."""
    monkeypatch.setitem(FAMILY, "tiny", reference)
    monkeypatch.setattr(measuring, "part", lambda name, tokenizer, window: WINDOWS)
    trainer = Trainer(reference)
    trainer.run(WINDOWS, WINDOWS[:2])
    text = {"versions": {"numpy": "2"}, "documents": 3, "characters": 99, "tokens": 320, "text_sha256": "abc"}
    publish("tiny", trainer, BUILTIN / SMALLEST, text, WINDOWS, tmp_path)
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert f"A {kind} decoder of " in card and "| `down_input` |" in card
    assert all(f"| {name} | " in card for name in reference.settings)
    assert ("load-balancing" in card) == (reference.training.balance > 0)
    check_folder(tmp_path / "tiny")
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.copy_(parameter.bfloat16())
        wanted = trainer.model.eval()(input_ids=WINDOWS[:2]).logits
        read = measuring.load(tmp_path / "tiny")(input_ids=WINDOWS[:2]).logits
    torch.testing.assert_close(read, wanted)
    decoder = DecoderFolder(tmp_path / "tiny")
    assert decoder.layer(0).weights.keys() >= {"q", "gate.7" if reference is MIXTURE else "gate"}


def test_the_loss_of_a_mixture_has_a_part_that_balances_its_experts():
    model = new_model(MIXTURE)
    with torch.no_grad():
        loss, trained_on = loss_of(model, WINDOWS[:2], autocast=False, balance=0.5)
        routed = model(input_ids=WINDOWS[:2], output_router_logits=True)
    assert loss == loss_of(model, WINDOWS[:2], autocast=False)[0]
    assert (trained_on - loss).item() == pytest.approx(0.5 * routed.aux_loss.item())
    assert routed.aux_loss > 1


def test_what_ships_is_of_the_family():
    planted = [f"{name}-planted" for name in PLANTED]
    assert SMALLEST in TRAINED and planted
    assert sorted([*TRAINED, *planted]) == SHIPPED
    assert sum(file.stat().st_size for file in BUILTIN.rglob("*") if file.is_file()) < 60e6


@pytest.mark.parametrize("name", others_slow(SHIPPED, lambda name: name == f"{SMALLEST}-planted"))
def test_a_shipped_model_is_what_its_card_says(name):
    """Its checksums; far below the bigrams of all its text; and on the first evaluation windows as
    good as on all of them."""
    for file in ("model.safetensors", "tokenizer.json"):
        assert f"`{file}` `{sha256_of(BUILTIN / name / file)}`" in card_of(name)
    losses = stated_losses(name)
    assert losses["this model"] < losses["bigrams of the whole text"] - 0.2
    assert (
        losses["bigrams of the whole text"]
        < losses["bigrams of the tokens that it saw"]
        < losses["frequencies of the tokens that it saw"]
    )
    windows = measuring.part("evaluation", BUILTIN / name, FAMILY[name.removesuffix("-planted")].training.window)
    measured = measuring.loss_of_model(measuring.load(BUILTIN / name), windows[::25])
    assert measured == pytest.approx(losses["this model"], abs=0.15)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_document_says_what_the_cards_say(name):
    document = (BUILTIN.parent / "docs" / "explanation" / "reference-models.md").read_text()
    parameters = re.search(r"^A [\w -]+ decoder of ([\d,]+) parameters", card_of(name), re.MULTILINE).group(1)
    perplexity, bigrams = (
        re.search(rf"^\| {row} \| [\d.]+ \| ([\d.]+) \|", card_of(name), re.MULTILINE).group(1)
        for row in ("this model", "bigrams of the whole text")
    )
    row = next(line for line in document.splitlines() if line.startswith(f"| `{name}` | {parameters} |"))
    assert f"| {perplexity} | {bigrams} |" in row
    for activations in re.findall(r"^\| `(?:attention|output|mlp|down)_input` \|.*$", card_of(name), re.MULTILINE):
        assert f"| `{name}` {activations}" in document


@pytest.mark.parametrize("name", TRAINED)
def test_the_curve_of_a_shipped_model_is_of_its_recipe(name):
    rows, training = list(csv.DictReader((BUILTIN / name / "training.csv").open())), FAMILY[name].training
    assert [int(row["step"]) for row in rows] == list(range(1, training.steps + 1))
    assert int(rows[-1]["tokens"]) == training.steps * training.tokens_per_step
    assert float(rows[-1]["held_out_loss"]) < float(rows[0]["training_loss"]) - 3


@pytest.mark.parametrize("name", others_slow(PLANTED, lambda name: name == SMALLEST))
def test_planted_outliers_are_those_of_the_card_and_of_the_same_function(name):
    reference = FAMILY[name]
    weights, planted = (read_tensors(BUILTIN / folder / "model.safetensors") for folder in (name, f"{name}-planted"))
    expected = plant(weights, reference.planting, reference.size.num_hidden_layers, reference.size.head_dim)
    assert all(torch.equal(expected[key], planted[key]) for key in expected)
    windows = measuring.part("evaluation", BUILTIN / name, 64)[:1]
    with torch.no_grad():
        logits = [
            measuring.load(BUILTIN / folder).double()(input_ids=windows).logits for folder in (name, f"{name}-planted")
        ]
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-10)


def test_the_family_holds_the_shapes_it_is_there_for():
    shapes = [
        shape_from_config(
            {
                **asdict(reference.size),
                **reference.settings,
                "architectures": [reference.architecture],
                "vocab_size": VOCABULARY,
            }
        )
        for reference in FAMILY.values()
    ]
    assert all(shape_from_folder(BUILTIN / name) == shape for name, shape in zip(FAMILY, shapes) if name in TRAINED)
    sizes = {shape.site_size(site) for shape in shapes for plan, _ in shape.plans() for site in plan.sites}
    powers = {size for size in sizes if size & (size - 1) == 0}
    assert powers and sizes - powers
    assert all(is_reachable(size) and size % 128 == 0 for size in sizes)
    assert all(shape.heads > shape.kv_heads for shape in shapes)
    assert {is_reachable(shape.heads) for shape in shapes} == {True, False}
