"""A campaign of damaged files: whatever a job left is flipped, cut, emptied, edited or exchanged,
and no job computes from it, no report shows it."""

from __future__ import annotations

import os
import random
import runpy
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from checkouts import RESULT_FILES, Checkout, one_cell
from damages import (
    Damage,
    Job,
    another_epsilon,
    any_bit,
    appended,
    data_bit,
    emptied,
    exponent_bit,
    failed,
    header_bit,
    jobs_of,
    not_a_number,
    number,
    other_of_its_kind,
    truncated,
    without_a_key,
    without_a_row,
)
from quantgrid.config import load
from quantgrid.ground.storage import open_tensors, put_off
from quantgrid.jobs import integrity, rule_job
from quantgrid.jobs.audit import adopt, audit, repair
from quantgrid.plan.pipeline import Plan
from quantgrid.plan.steps import outputs_of

pytestmark = [pytest.mark.damage, pytest.mark.slow, pytest.mark.workflow]
RESULTS = "results-smoke"
# rules whose script verifies what is not on its command line
IN_SCRIPT = ("collect_study", "build_report")
CELL = "*/smoothquant/gptq/*/*"


def exchanged(content: bytes, drawn: random.Random) -> bytes:
    """Stands for the file of another step, with that step's record left where it is."""
    raise NotImplementedError


DAMAGES: dict[str, tuple[Damage, ...]] = {
    "models/*/*/config.json": (another_epsilon, truncated, emptied, without_a_key),
    "models/*/*/model.safetensors": (header_bit, data_bit, exponent_bit, truncated),
    "models/*/*/tokenizer.json": (number, emptied),
    "models/*/*/provenance.json": (number,),
    "corpora/*/docs/*.safetensors": (header_bit, data_bit, truncated, exchanged),
    "calibration/*/*/*/statistics.safetensors": (header_bit, data_bit, exponent_bit, truncated, emptied),
    "transforms/*/smoothquant/*/*/transform.safetensors": (header_bit, data_bit, exponent_bit, exchanged),
    "transforms/*/learned/*/*/losses.csv": (number, without_a_row, emptied),
    "references/*/*/*/*.safetensors": (data_bit, exponent_bit, truncated),
    f"quantized/{CELL}/*/model.safetensors": (header_bit, data_bit, exponent_bit, exchanged),
    f"quantized/{CELL}/*/quantgrid.json": (number, without_a_key, failed, exchanged, appended),
    f"evaluations/{CELL}/error/*.json": (number, not_a_number, without_a_key, failed),
    f"evaluations/{CELL}/perplexity/docs/*/*.json": (number, failed, exchanged),
    f"evaluations/{CELL}/perplexity/docs/*.json": (number, not_a_number, failed, emptied, exchanged),
    f"evaluations/{CELL}/residual_error/docs/*.json": (number, exchanged),
    "checks/*.json": (emptied, truncated, appended),
    "gates/*/*.json": (number, emptied),
    "gates/*/smoothquant/*/*.json": (number, truncated),
    "distributions/*/smoothquant/*/*.json": (number, not_a_number, exchanged),
    "studies/methods.csv": (number, without_a_row, emptied),
    "studies/methods.items.parquet": (any_bit, truncated),
    "results.csv": (number, without_a_row),
    "results.parquet": (any_bit,),
    "cells.csv": (without_a_row,),
    "claims.csv": (number,),
    "steps.csv": (without_a_row,),
    "tables/methods.csv": (number, emptied),
    "comparisons/methods.csv": (number, without_a_row),
    "figures/methods.svg": (truncated,),
    "figures/methods.csv": (number,),
    "figures/methods.png": (any_bit,),
    "learning.svg": (emptied,),
    "residual-error.csv": (number,),
    "pareto.pdf": (truncated,),
    "report.html": (truncated,),
    "digests/calibrate_model/*/*/*.json": (emptied, any_bit, without_a_key, exchanged),
    f"digests/merge_shards/{CELL}/docs/*.json": (truncated, number, exchanged),
    "digests/check_baseline/*.json": (emptied, exchanged),
}
CASES = [(pattern, damage) for pattern, damages in DAMAGES.items() for damage in damages]


class Run:
    """A finished run: its checkout, its plan, and every job with the words that it was given."""

    def __init__(self, checkout: Checkout):
        self.checkout, self.jobs = checkout, jobs_of(checkout, "smoke")
        self.plan = Plan(load("config/smoke.yaml"))
        self.contents = checkout.contents(RESULTS, *RESULT_FILES)

    def readers(self, place: str) -> list[Job]:
        """The jobs that read the file ``place`` (below the checkout), or a file that is vouched for
        by the record ``place``."""
        record = integrity.origin_of_record(place, RESULTS)
        places = [f"{RESULTS}/{name}" for name in integrity.read_record(record)] if record else [place]
        found = [job for job in self.jobs for path in places if job.reads(path) and not self.writes(job, path)]
        read_in_script = {("evaluations", ".json"): IN_SCRIPT[:1], ("figures", ".csv"): IN_SCRIPT[1:]}
        found += [
            job
            for job in self.jobs
            for path in places
            if job.rule in read_in_script.get((path.split("/")[1], Path(path).suffix), ())
            and not self.writes(job, path)
            and integrity.origin_of(path).rule != "evaluate_perplexity"  # shards, which merge_shards reads
        ]
        return list(dict.fromkeys(found))

    @staticmethod
    def writes(job: Job, path: str) -> bool:
        return (
            integrity.origin_of(
                path if not path.startswith(f"{RESULTS}/models/") else "/".join(path.split("/")[:4])
            ).rule
            == job.rule
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run with every kind of file: a calibrated and a learned transform, descriptions, residual
    errors, comparisons; checkpoints are kept."""
    checkout = one_cell(Checkout.make(tmp_path_factory.mktemp("damage") / "quantgrid"))
    config = checkout.config()
    config["transforms"] |= {"smoothquant": {"method": "scaling"}, "learned": {"method": "flatquant", "steps": 1}}
    config["studies"]["methods"] |= {
        "transforms": ["none", "smoothquant", "learned"],
        "compare": {"axis": "transform", "to": "none"},
    }
    config |= {"keep_checkpoints": True, "report": {"distributions": ["none", "smoothquant"]}}
    checkout.write_config(config, "smoke")
    checkout.run("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout.folder)
        yield Run(checkout)


def refusal(job: Job, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a job in this process and return the message that ends it; fail if it would compute. A
    script that verifies its inputs itself runs, and writes into ``folder``."""
    words = list(job.words)
    if job.rule in IN_SCRIPT:
        outputs = [path for name in outputs_of(job.rule) for path in rule_job.named(words)[name]]
        words = [f"{folder}/{word}" if word in outputs else word for word in words]
    monkeypatch.setattr(sys, "argv", ["run_job.py", job.rule, *words])
    script = runpy.run_path

    def believed(path: str, run_name: str) -> None:
        for weights in [*put_off]:  # as the script would that reads them
            with open_tensors(weights):
                pass
        assert job.rule in IN_SCRIPT, f"{job.rule} believes what it reads"
        script(path, run_name=run_name)

    monkeypatch.setattr(runpy, "run_path", believed)
    with pytest.raises(SystemExit) as refused:
        rule_job.main()
    monkeypatch.setattr(runpy, "run_path", script)
    return str(refused.value)


@contextmanager
def holding(file: Path, content: bytes) -> Iterator[None]:
    """``file`` with another content, as old as it was before and after: Snakemake is to see nothing
    of it."""
    whole, age = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(content)
    os.utime(file, ns=age)
    try:
        yield
    finally:
        file.write_bytes(whole)
        os.utime(file, ns=age)


@pytest.mark.parametrize(
    ("pattern", "damage"), CASES, ids=[f"{pattern}-{damage.__name__}" for pattern, damage in CASES]
)
def test_no_damage_is_believed(run: Run, pattern: str, damage: Damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every job that reads the file ends with one line that names it, `make verify` lists it alone,
    and would delete it alone."""
    drawn = random.Random(f"{pattern} {damage.__name__}")
    file = drawn.choice(sorted(Path(RESULTS).glob(pattern)))
    whole, place, readers = file.read_bytes(), str(file), run.readers(str(file))
    with holding(
        file, other_of_its_kind(file, Path(RESULTS)).read_bytes() if damage is exchanged else damage(whole, drawn)
    ):
        assert file.read_bytes() != whole
        for job in readers:
            said = refusal(job, tmp_path, monkeypatch)
            assert (
                said.startswith(f"{job.rule}: {RESULTS}/")
                and "\n" not in said
                and ("not what" in said or "record" in said)
            ), said
            assert place in said and "make verify REPAIR=1" in said
        found = audit(run.plan)
        [(output, wrong)] = found.damaged.items()
        assert place.startswith(output) or place in str(wrong)


def test_the_campaign_covers_every_kind_of_file(run: Run):
    assert len(CASES) >= 40
    assert not audit(run.plan).damaged and not audit(run.plan).unrecorded
    for pattern in DAMAGES:
        assert list(Path(RESULTS).glob(pattern)), pattern
    damaged = {rule for pattern in DAMAGES for file in Path(RESULTS).glob(pattern) for rule in [rule_of(file)]}
    assert {job.rule for job in run.jobs} - damaged == {"plot_number_lines", "plot_distributions"}, (
        "of the kinds of other figures"
    )


def rule_of(file: Path) -> str:
    record = integrity.origin_of_record(file, RESULTS)
    return record.rule if record else integrity.origin_of(file.parent if file.parts[1] == "models" else file).rule


def test_a_file_copied_with_its_record_is_that_of_another_step(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Windows of one corpus in the place of another's, each with the record of its step."""
    reader = next(job for job in run.jobs if job.rule == "evaluate_reference")
    with ExitStack() as held:
        for folder in ("corpora", "digests/tokenize_corpus"):
            [into], [of] = ([*Path(RESULTS, folder).glob(f"*/{corpus}/*")] for corpus in ("docs", "docs-calibration"))
            held.enter_context(holding(into, of.read_bytes()))
        assert "the record of another step" in refusal(reader, tmp_path, monkeypatch)


def test_a_foreign_file_in_a_model_folder_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    [folder] = Path(RESULTS, "models").glob("*/*")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    reader = next(job for job in run.jobs if job.rule == "calibrate_model")
    assert "index.json: was not there when this was written" in refusal(reader, tmp_path, monkeypatch)
    (folder / "model.safetensors.index.json").unlink()


def test_records_are_the_same_bytes_when_files_are_adopted(run: Run, tmp_path: Path):
    digests = Path(RESULTS, "digests")
    shutil.copytree(digests, tmp_path / "digests")
    shutil.rmtree(digests)
    found = audit(run.plan)
    assert sorted(found.unrecorded) == sorted(adopt(found)) and not audit(run.plan).unrecorded
    for record in digests.rglob("*.json"):
        content = record.read_bytes()
        assert content == (tmp_path / "digests" / record.relative_to(digests)).read_bytes()
        assert str(run.checkout.folder).encode() not in content
    assert "Nothing to be done" in run.checkout.run("smoke", "--dry-run")


def test_a_run_ends_with_the_file_the_report_is_there_and_a_repair_leads_back_to_the_same_bytes(run: Run):
    """An evaluation with a NaN, statistics with a flipped bit, an emptied check: two failed runs,
    one repair, one whole run."""
    [evaluation], [statistics], [check] = (
        sorted(Path(RESULTS).glob(pattern))
        for pattern in (
            f"evaluations/{CELL}/perplexity/docs/*.json",
            "calibration/*/*/*/statistics.safetensors",
            "checks/*.json",
        )
    )
    evaluation.write_bytes(not_a_number(evaluation.read_bytes(), random.Random(1)))
    Path(RESULTS, "studies", "methods.csv").unlink()
    output = run.checkout.run("smoke", ok=False)
    assert f"collect_study: {evaluation}: " in output and "Traceback" not in output
    page = Path(RESULTS, "report.partial.html").read_text()
    assert f"{evaluation}: " in page and "not what merge_shards wrote" in page
    statistics.write_bytes(data_bit(statistics.read_bytes(), random.Random(1)))
    check.write_bytes(b"")
    for file in Path(RESULTS).glob(f"quantized/{CELL}/*/*"):
        file.unlink()
    output = run.checkout.run("smoke", ok=False)
    assert (
        f"quantize_model: {statistics}: its content has changed" in output
        or f"quantize_model: {check}: holds 0 bytes" in output
    ), output[-3000:]
    assert run.checkout.contents(RESULTS, "evaluations/**/*.json") != {}, "nothing else is lost"
    deleted = repair(audit(run.plan))
    assert {str(evaluation), str(statistics), str(check)} < set(deleted)
    run.checkout.run("smoke")
    assert run.checkout.contents(RESULTS, *RESULT_FILES) == run.contents
    assert not audit(run.plan).damaged
