"""Records of what jobs leave: places, verification, weights that are verified when they are read,
repair and adoption."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from checkouts import ROOT
from quantgrid.config import check
from quantgrid.ground import storage
from quantgrid.ground.errors import ConfigError
from quantgrid.jobs.audit import adopt, audit, planned, repair
from quantgrid.jobs.integrity import (
    Damaged,
    Unrecorded,
    has_record,
    origin_of,
    read_record,
    sound,
    verify,
    write_record,
)
from quantgrid.plan.pipeline import Plan
from quantgrid.plan.preflight import made_again
from quantgrid.plan.steps import DIGESTS, OUTPUTS, REPORTS
from quantgrid.quantization.checkpoints import load_full_precision

WINDOWS = "corpora/m/docs/0123456789.safetensors"


def left(root: Path, place: str, text: str = "content") -> Path:
    """A file of a results folder with the record of its job."""
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    write_record(origin_of(path).rule, [path])
    return path


def model(root: Path) -> Path:
    """The model folder of a job ``fetch_model``, with its record; its weights are two tensors."""
    folder = root / "models" / "m" / "0123456789"
    storage.write_tensors(
        folder / "model.safetensors",
        {"model.embed_tokens.weight": torch.ones(4, 2), "model.norm.weight": torch.ones(2)},
    )
    (folder / "tokenizer.json").write_text("{}")
    write_record("fetch_model", [folder])
    return folder


def test_every_rule_of_the_workflow_records_what_it_writes():
    text = "".join(path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    rules = re.findall(r"^ *(?:rule|checkpoint) (\w+):", text, re.MULTILINE)
    assert sorted(rules) == sorted({**OUTPUTS, **REPORTS}) == sorted(DIGESTS)
    assert all(text.count(f'        digest=f"{{RESULTS}}/digests/{rule}/') == 1 for rule in rules)


def test_the_place_of_a_file_names_its_job():
    origin = origin_of("/elsewhere/results/evaluations/m/none/rtn/channel/int4/perplexity/error/0123456789.json")
    assert (origin.rule, origin.root) == ("merge_shards", "/elsewhere/results") and dict(origin.axes)[
        "corpus"
    ] == "error"
    assert origin.record == "/elsewhere/results/digests/merge_shards/m/none/rtn/channel/int4/error/0123456789.json"
    assert origin_of("results.csv").record == "digests/collect_results/all.json"
    assert origin_of("results/comparisons/claims.csv").rule == "compare_study", (
        "a study may be called as a file of the run"
    )
    with pytest.raises(ConfigError, match=r"notes\.md: no step of the workflow writes a file of this name"):
        origin_of("results/notes.md")


def test_a_file_is_as_it_was_written_or_the_message_says_what_to_delete(tmp_path):
    path = left(tmp_path, WINDOWS)
    verify(path)
    record = tmp_path / "digests" / "tokenize_corpus" / "m" / "docs" / "0123456789.json"
    assert json.loads(record.read_text())["files"][WINDOWS]["bytes"] == len("content")
    path.write_text("Content")
    with pytest.raises(
        Damaged,
        match=rf"{path}: its content has changed: not what tokenize_corpus wrote; delete {path} and {record} and run "
        rf"again",
    ):
        verify(path)
    path.write_text("")
    with pytest.raises(Damaged, match="holds 0 bytes, not 7"):
        verify(path)
    path.unlink()
    with pytest.raises(Damaged, match="is gone"):
        verify(path)
    record.unlink()
    with pytest.raises(Unrecorded, match=r"tokenize_corpus left no record of its content .*make verify ADOPT=1"):
        verify(path)
    assert not sound(path) and not has_record(path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"rule": "tokenize_corpus"}',
        '{"rule": "tokenize_corpus", "axes": {}, "files": []}',
        "\xff",
        '{"rule": "tokenize_corpus", "axes": {}, "files": {"a": 1}}',
    ],
)
def test_a_record_that_is_none_is_damage(tmp_path, content):
    path = left(tmp_path, WINDOWS)
    Path(origin_of(path).record).write_text(content, encoding="latin-1")
    with pytest.raises(Damaged, match="not a whole record"):
        read_record(origin_of(path))


def test_weights_are_verified_when_they_are_read_and_the_rest_of_a_model_at_once(tmp_path):
    folder = model(tmp_path)
    weights = folder / "model.safetensors"
    verify(folder, weights_later=True)
    assert storage.tensor_names(weights) and [*storage.put_off] == [str(weights)], "names are no weights"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Damaged, match=r"model\.safetensors: its content has changed"), storage.open_tensors(weights):
        pass
    assert not storage.put_off
    verify(folder, weights_later=True)
    with pytest.raises(Damaged, match=r"model\.safetensors: its content has changed"):
        load_full_precision(folder)
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(Damaged, match=r"tokenizer\.json"):
        verify(folder, weights_later=True)
    storage.put_off.clear()


def plan_in(folder: Path) -> Plan:
    """The plan of the smoke config, with results in ``folder``."""
    content = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    for corpus in content["corpora"].values():
        corpus["path"] = str(ROOT / corpus["path"])
    return Plan(check({**content, "results_dir": str(folder / "results")}))


def test_a_plan_names_the_record_and_the_outputs_of_every_job(tmp_path):
    found = dict(planned(plan_in(tmp_path)))
    for record, outputs in found.items():
        assert {origin_of(path).record for path in outputs} == {record}


def test_repair_deletes_what_is_damaged_and_adoption_records_what_is_whole(tmp_path):
    plan = plan_in(tmp_path)
    jobs = {
        record: outputs
        for record, outputs in planned(plan)
        if "/measure_distributions/" in record or "/plot_study/" in record
    }
    for outputs in jobs.values():
        for path in outputs:
            storage.write_text(path, "{}")
    found = audit(plan)
    assert set(found.unrecorded) == set(jobs) and not found.damaged
    assert set(adopt(found)) == set(jobs)
    assert all(
        Path(record).stat().st_mtime_ns == max(Path(path).stat().st_mtime_ns for path in outputs)
        for record, outputs in jobs.items()
    )
    record, outputs = next(iter(jobs.items()))
    Path(outputs[0]).write_text("Content")
    found = audit(plan)
    assert [*found.damaged] == [outputs[0]] and found.whole == sum(map(len, jobs.values())) - 1
    assert repair(found) == [outputs[0], record] and not Path(outputs[0]).exists()
    assert not audit(plan).damaged


@pytest.mark.parametrize(
    ("rule", "output"),
    [("fit_transform", "transform"), ("evaluate_perplexity", "result"), ("quantize_model", "manifest")],
)
def test_a_file_of_another_step_or_none_that_can_be_read_is_not_adopted(tmp_path, rule, output):
    """Copied into the place of another without a record: damage that `make verify` names and a
    repair deletes."""
    plan = plan_in(tmp_path)
    own, other = list(plan.all_steps()[rule])[:2]
    for path in own.outputs.values():
        about = {"axes": dict(own.wildcards)}
        if path.endswith(".safetensors"):
            storage.write_tensors(path, {"a": torch.ones(1)}, about)
        else:
            storage.write_json(path, about)
    assert not audit(plan).damaged
    path = Path(own.outputs[output])
    copied = path.read_bytes().replace(own.key.encode(), other.key.encode())
    for content, wrong in (
        (copied, "the file of another step"),
        (copied[:9], "cannot be read"),
        (b"[]", "cannot be read"),
    ):
        path.write_bytes(content)
        found = audit(plan)
        assert (
            [*found.damaged] == [str(path)]
            and wrong in str(found.damaged[str(path)])
            and "\n" not in str(found.damaged[str(path)])
        )
        assert adopt(found) == [] and not Path(own.digest).exists()
    assert repair(found) == [str(path)] and not audit(plan).damaged


def test_a_results_folder_below_a_folder_named_digests_is_repaired_as_any_other(tmp_path):
    plan = plan_in(tmp_path / "digests")
    path = left(Path(plan.results), "checks/m.json", "{}")
    record = origin_of(path).record
    path.write_text("[]")
    assert repair(audit(plan)) == [str(path), record]
    Path(record).write_text("{")
    assert repair(audit(plan)) == [record]


def test_steps_from_before_there_were_records_are_counted_once(tmp_path):
    path, gone = left(tmp_path, WINDOWS), str(tmp_path / "gone")
    record = origin_of(path).record
    jobs = [
        {"windows": str(path), "digest": record},
        {"windows": str(path), "digest": gone},
        {"windows": gone, "digest": gone},
        {"all": str(path)},
    ]
    [line] = made_again(jobs)
    assert line.startswith("1 steps left files without a record") and "make verify ADOPT=1" in line
    assert made_again(jobs[:1]) == []
