"""Progress of a run: the tally by hand and on recorded runs, and the logger plugin on records in
Snakemake's form."""

from __future__ import annotations

import csv
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from logging import LogRecord
from pathlib import Path
from types import SimpleNamespace

import pytest
from snakemake_interface_logger_plugins.common import LogEvent

from checkouts import ROOT
from quantgrid.jobs.progress import Tally, duration, key_of, predict
from quantgrid.machine.usage import Usage

sys.path.insert(0, str(ROOT / "workflow" / "logger"))

from snakemake_logger_plugin_quantgrid import LogHandler

TIMELINES = sorted((ROOT / "tests" / "data" / "timelines").glob("*.csv"))
MOMENTS = ("submitted", "begun", "ended")
CELL = {"model": "m", "transform": "none", "mitigation": "gptq", "granularity": "channel", "format": "int4"}


def quantize(number: int) -> dict[str, str]:
    return {**CELL, "mitigation": f"m{number}", "key": f"{number:010d}"}


def evaluate(number: int) -> dict[str, str]:
    return {**quantize(number), "corpus": "text"}


def tally_of(jobs: Iterable[tuple[str, dict[str, str], float]]) -> Tally:
    """A run of ``jobs``: rule, wildcards, predicted seconds."""
    found = list(jobs)
    return Tally(Counter(rule for rule, _, _ in found), {key_of(rule, axes): seconds for rule, axes, seconds in found})


def take(tally: Tally, number: int, job: tuple[str, dict[str, str]], begin: float, end: float) -> None:
    tally.submit(number, *job, begin)
    tally.begin(number, begin)
    tally.end(number, end)


def test_predictions_weight_the_steps_and_measurements_correct_them():
    """One job at a time, each twice as long as predicted; the last one is by far the largest."""
    jobs = [("quantize_model", quantize(number), 10.0 if number < 9 else 1000.0) for number in range(10)]
    tally, now = tally_of(jobs), 0.0
    assert tally.seconds_left(now) is None
    for number in range(9):
        take(tally, number, jobs[number][:2], now, now + 20)
        now += 20
    # 90 predicted seconds took 180: that says little about 1000
    assert 1000 < tally.seconds_left(now) < 1300
    tally.submit(9, *jobs[9][:2], now)
    tally.begin(9, now)
    assert tally.seconds_left(now + 100) == pytest.approx(tally.seconds_left(now) - 100, rel=0.01)


def test_rules_and_methods_have_their_own_corrections():
    """Quantizations take as long as predicted by one method and four times as long by another."""
    jobs = [("quantize_model", {**quantize(m), "format": f"f{n}"}, 10.0) for m in (1, 4) for n in range(20)]
    tally, now = tally_of(jobs), 0.0
    for number in (*range(10), *range(20, 30)):
        taken = 10.0 if number < 20 else 40.0
        take(tally, number, jobs[number][:2], now, now + taken)
        now += taken
    assert tally.seconds_left(now) == pytest.approx(10 * 10 + 10 * 40, rel=0.1)


def test_queued_is_not_running():
    """Two of twenty submitted jobs compute at a time, and a job's time in the queue is not its own."""
    jobs = [("quantize_model", quantize(number), 5.0) for number in range(20)]
    tally = tally_of(jobs)
    for number, (rule, axes, _) in enumerate(jobs):
        tally.submit(number, rule, axes, 0.0)
    assert tally.counts() == (0, 20)
    for now in range(0, 50, 10):
        for number in (now // 5, now // 5 + 1):
            tally.begin(number, now)
        assert tally.counts() == (2, 18 - now // 5)
        for number in (now // 5, now // 5 + 1):
            assert tally.end(number, now + 10).seconds == 10
    assert tally.width() == pytest.approx(2, rel=0.01) and tally.seconds_left(50.0) == pytest.approx(50, rel=0.01)


def test_a_job_that_is_seen_late_has_the_seconds_that_it_recorded():
    """Slurm is asked for the end of a job every so often."""
    jobs = [("quantize_model", quantize(number), 5.0) for number in range(2)]
    tally = tally_of(jobs)
    tally.submit(0, *jobs[0][:2], 0.0)
    assert tally.end(0, 180.0, seconds=5.0).seconds == 5.0
    take(tally, 1, jobs[1][:2], 180.0, 185.0)
    assert tally.seconds_left(185.0) == 0.0


def test_a_cell_is_finished_when_all_its_jobs_of_this_run_are():
    """This run evaluates one cell again, without quantizing it."""
    jobs = [("quantize_model", quantize(1), 1.0), ("evaluate_perplexity", evaluate(1), 1.0)]
    jobs += [
        ("evaluate_perplexity", {**evaluate(1), "corpus": "other"}, 1.0),
        ("evaluate_perplexity", evaluate(2), 1.0),
    ]
    tally, said = tally_of([*jobs, ("build_report", {}, 1.0)]), []
    for number, (rule, axes, _) in enumerate(jobs):
        take(tally, number, (rule, axes), number, number + 1)
        said.append(str(tally))
    assert said == [f"{n}/5 steps, {cells}/2 cells" for n, cells in ((1, 0), (2, 0), (3, 1), (4, 2))]


def test_a_failed_job_is_not_counted_and_an_unknown_one_is_no_error():
    tally = tally_of([("quantize_model", quantize(1), 1.0)])
    tally.submit(1, "quantize_model", quantize(1), 0.0)
    assert str(tally.end(1, 5.0, failed=True)) == "quantize_model m none m1 channel int4"
    assert str(tally) == "0/1 steps, 0/1 cells"
    assert tally.end(7, 5.0) is None and tally.seconds_left(5.0) is None


def test_jobs_that_a_race_adds_count_and_take_as_long_as_the_last_ones():
    """Two jobs were planned; the decision behind them adds ten evaluations."""
    jobs = [("screen_cell", quantize(number), 30.0) for number in range(2)]
    tally = tally_of(jobs)
    for number in range(2):
        take(tally, number, jobs[number][:2], 12.0 * number, 12.0 * number + 12)
    assert str(tally).startswith("2/2 steps") and tally.seconds_left(24.0) == 0
    tally.total = 12
    assert tally.seconds_left(24.0) == pytest.approx(120, rel=0.05)
    for number in range(2, 7):
        take(tally, number, ("evaluate_perplexity", evaluate(number)), 12.0 * number, 12.0 * number + 12)
    assert str(tally).startswith("7/12 steps") and tally.seconds_left(84.0) == pytest.approx(60, rel=0.05)
    tally.submit(7, "evaluate_perplexity", evaluate(7), 84.0)
    tally.begin(7, 84.0)
    assert tally.seconds_left(90.0) == pytest.approx(54, rel=0.05)


def test_added_jobs_leave_the_predictions_of_their_rule_alone():
    """Eleven evaluations were planned, of 60 seconds as predicted; a decision adds twenty as long."""
    jobs = [("evaluate_perplexity", evaluate(number), 60.0) for number in range(11)]
    tally = tally_of(jobs)
    take(tally, 0, jobs[0][:2], 0.0, 60.0)
    tally.total = 31
    for number in range(1, 21):
        take(tally, 100 + number, ("evaluate_perplexity", evaluate(100 + number)), 60.0 * number, 60.0 * number + 60)
    assert str(tally).startswith("21/31 steps") and tally.seconds_left(1260.0) == pytest.approx(600, rel=0.05)


def test_without_predictions_all_jobs_count_alike_and_no_cells():
    """As with --no-hooks."""
    tally = Tally({"plot_study": 4})
    assert str(tally) == "0/4 steps"
    for number in range(2):
        take(tally, number, ("plot_study", {"study": f"s{number}"}), 10.0 * number, 10.0 * number + 10)
    assert str(tally) == "2/4 steps" and tally.seconds_left(20.0) == pytest.approx(20, rel=0.2)


def replay(path: Path) -> Iterator[tuple[float, float, float, Tally]]:
    """(share of the work done, estimated and true seconds left, tally) after every job of a recorded
    run; rows are jobs, in the seconds of that run."""
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    jobs = [(row["rule"], dict(pair.split("=", 1) for pair in row["axes"].split())) for row in rows]
    tally = tally_of((*job, float(row["predicted"])) for job, row in zip(jobs, rows))
    moments = [(float(row[moment]), order, n) for n, row in enumerate(rows) for order, moment in enumerate(MOMENTS)]
    whole = sum(float(row["ended"]) - float(row["begun"]) for row in rows)
    done, last = 0.0, max(float(row["ended"]) for row in rows)
    for now, order, number in sorted(moments):
        if order == 0:
            tally.submit(number, *jobs[number], now)
        elif order == 1:
            tally.begin(number, now)
        else:
            done += tally.end(number, now).seconds
            yield done / whole, tally.seconds_left(now), last - now, tally


@pytest.mark.parametrize("path", TIMELINES, ids=lambda path: path.stem)
def test_after_a_tenth_of_the_work_the_time_left_is_right_within_a_factor_of_1_5(path: Path):
    """On recorded runs, until a tenth of the work is left."""
    ratios = [left / true for done, left, true, _ in replay(path) if 0.1 <= done <= 0.9]
    assert len(ratios) > 10 and min(ratios) > 1 / 1.5 and max(ratios) < 1.5


@pytest.mark.parametrize("path", TIMELINES, ids=lambda path: path.stem)
def test_finished_cells_never_exceed_planned_ones_and_all_are_finished_in_the_end(path: Path):
    said = [re.search(r"(\d+)/(\d+) cells", str(tally)).groups() for *_, tally in replay(path)]
    assert all(int(done) <= int(planned) for done, planned in said) and said[-1][0] == said[-1][1] != "0"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min"), (3600, "1 h 00 min"), (7630, "2 h 07 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def record(event: LogEvent | None, now: float, message: str = "", **fields) -> LogRecord:
    made = LogRecord("snakemake", 20, "", 0, message, (), None)
    made.created = now
    made.__dict__.update(fields | ({"event": event} if event else {}))
    return made


@pytest.fixture
def handler() -> Iterator[LogHandler]:
    """The handler in a run that has predicted three quantizations."""
    predict(("quantize_model", quantize(job), 10.0) for job in (1, 2, 3))
    yield LogHandler(SimpleNamespace(), None)
    predict(())


def test_a_line_for_each_finished_step_and_once_a_minute_what_runs(handler: LogHandler, capsys: pytest.CaptureFixture):
    handler.emit(record(LogEvent.RUN_INFO, 1000.0, "Job stats", stats={"quantize_model": 3, "total": 3}))
    for job in (1, 2, 3):
        handler.emit(record(LogEvent.JOB_INFO, 1000.0, jobid=job, rule_name="quantize_model", wildcards=quantize(job)))
        handler.emit(record(LogEvent.SHELLCMD, 1000.0, "python scripts/run_job.py ..."))
    handler.emit(record(None, 1000.0, "Select jobs to execute..."))
    handler.emit(record(None, 1000.0, "a warning"))
    handler.emit(record(LogEvent.JOB_FINISHED, 1012.0, job_id=1))
    handler.emit(record(LogEvent.PROGRESS, 1012.0, done=1, total=5))  # a decision has added two jobs
    handler.emit(record(LogEvent.JOB_FINISHED, 1024.0, job_id=2))
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[:2] == ["Job stats", "a warning"] and len(lines) == 5
    assert "1/3 steps, 1/3 cells" in lines[2] and lines[2].endswith(": quantize_model m none m1 channel int4 (12 s)")
    assert (
        lines[3]
        == "          running: quantize_model m none m2 channel int4 (12 s), quantize_model m none m3 channel int4 "
        "(12 s)"
    )
    assert "2/5 steps" in lines[4]


def test_a_job_of_another_machine_waits_until_its_log_begins(
    handler: LogHandler, capsys: pytest.CaptureFixture, tmp_path: Path
):
    """The log of an earlier run does not count, and the costs that a job recorded are its seconds."""
    logs = {job: [tmp_path / f"{job}.log", tmp_path / f"{job}.tsv"] for job in (1, 2, 3)}
    for text, _ in logs.values():
        text.touch()
        os.utime(text, (500, 500))
    handler.emit(record(LogEvent.RUN_INFO, 1000.0, "Job stats", stats={"quantize_model": 3, "total": 3}))
    for job, paths in logs.items():
        about = {"jobid": job, "rule_name": "quantize_model", "wildcards": quantize(job), "local": False}
        handler.emit(record(LogEvent.JOB_INFO, 1000.0, log=list(map(str, paths)), **about))
    os.utime(logs[2][0], (1090, 1090))
    logs[1][1].write_text(Usage(12.0, 400.0, 10.0, "cold").table())
    handler.emit(record(LogEvent.JOB_FINISHED, 1100.0, job_id=1))
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].endswith(": quantize_model m none m1 channel int4 (12 s)")
    assert lines[2] == "          running: quantize_model m none m2 channel int4 (10 s); queued: 1"


def test_a_failed_job_is_named_with_the_end_of_its_log_and_without_its_command(
    handler: LogHandler, capsys: pytest.CaptureFixture, tmp_path
):
    log = tmp_path / "job.log"
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    handler.emit(record(LogEvent.JOB_INFO, 0.0, jobid=1, rule_name="quantize_model", wildcards=quantize(1)))
    handler.emit(
        record(
            LogEvent.JOB_ERROR,
            9.0,
            "Error in rule",
            jobid=1,
            rule_name="quantize_model",
            rule_msg=None,
            log=[str(log)],
            shellcmd="python scripts/run_job.py --spec {...}",
        )
    )
    said = capsys.readouterr().err
    assert "FAILED quantize_model m none m1 channel int4\n" in said and f"log: {log}" in said and "--spec" not in said
    assert "| line 99" in said and "| line 85" in said and "| line 84\n" not in said


def test_a_result_that_is_a_failure_is_said_with_its_reason_and_counted(
    handler: LogHandler, capsys: pytest.CaptureFixture, tmp_path
):
    """The job succeeds and logs the reason; its cell has no number."""
    log = tmp_path / "job.log"
    log.write_text(
        "quantize_model: model m\nseed 0\nthe result is a failure: layers.1.down_proj holds NaN\ndone in 1.0 s, peak "
        "memory 400 MiB\n"
    )
    handler.emit(record(LogEvent.RUN_INFO, 0.0, "Job stats", stats={"quantize_model": 3, "total": 3}))
    for job, where in ((1, log), (2, tmp_path / "none.log")):
        handler.emit(
            record(
                LogEvent.JOB_INFO, 0.0, jobid=job, rule_name="quantize_model", wildcards=quantize(job), log=[str(where)]
            )
        )
        handler.emit(record(LogEvent.JOB_FINISHED, 9.0, job_id=job))
    lines = capsys.readouterr().err.splitlines()
    assert [line.strip() for line in lines if "failure" in line] == [
        "the result is a failure: layers.1.down_proj holds NaN"
    ]
    assert [re.search(r"\d/3 cells.*\)", line)[0].split(",")[0] for line in lines if "steps" in line] == [
        "1/3 cells (1 failed)",
        "2/3 cells (1 failed)",
    ]
