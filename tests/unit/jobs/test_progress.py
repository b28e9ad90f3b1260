"""Progress output of a run: the tally by hand, and the logger plugin on records in Snakemake's
form."""

from __future__ import annotations

import sys
from logging import LogRecord
from types import SimpleNamespace

import pytest
from snakemake_interface_logger_plugins.common import LogEvent

from checkouts import ROOT
from quantgrid.jobs.progress import Tally, duration

sys.path.insert(0, str(ROOT / "workflow" / "logger"))

from snakemake_logger_plugin_quantgrid import LogHandler

CELL = {"model": "m", "transform": "none", "mitigation": "gptq", "granularity": "channel", "format": "int4"}


def quantize(number: int) -> dict[str, str]:
    return {**CELL, "mitigation": f"m{number}", "key": f"{number:010d}"}


def test_steps_cells_and_the_time_left():
    tally = Tally({"quantize_model": 4, "evaluate_perplexity": 4, "build_report": 1})
    assert str(tally) == "0/9 steps, 0/4 cells" and tally.seconds_left(0.0) is None
    tally.start(1, "quantize_model", quantize(1), 0.0)
    tally.start(2, "quantize_model", quantize(2), 0.0)
    tally.end(1, 10.0)
    assert tally.seconds_left(10.0) == pytest.approx(
        3 * 10 + 4 * 10 + 1 * 10 - 10
    )  # rules without a finished job count as the others do
    tally.start(3, "evaluate_perplexity", {**quantize(1), "corpus": "text"}, 10.0)
    tally.end(3, 30.0)
    assert str(tally) == "2/9 steps, 1/4 cells"
    tally.start(4, "evaluate_perplexity", {**quantize(2), "corpus": "text"}, 30.0)
    # job 2 is longer at it than the mean, job 4 for five seconds
    left = 3 * 10 + 3 * 20 + 1 * 15 - 10 - 5
    assert tally.seconds_left(35.0) == pytest.approx(left / 2)


def test_a_failed_job_is_not_counted_and_an_unknown_one_is_no_error():
    tally = Tally({"quantize_model": 1})
    tally.start(1, "quantize_model", quantize(1), 0.0)
    assert (
        str(tally.end(1, 5.0, failed=True)) == "quantize_model m none m1 channel int4"
        and str(tally) == "0/1 steps, 0/1 cells"
    )
    assert tally.end(7, 5.0) is None and tally.seconds_left(5.0) is None


def test_a_run_that_quantizes_nothing_counts_steps_alone():
    assert str(Tally({"plot_study": 2})) == "0/2 steps"


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
def handler() -> LogHandler:
    return LogHandler(SimpleNamespace(), None)


def test_a_line_for_each_finished_step_and_once_a_minute_what_runs(handler: LogHandler, capsys: pytest.CaptureFixture):
    handler.emit(record(LogEvent.RUN_INFO, 1000.0, "Job stats", stats={"quantize_model": 3, "total": 3}))
    for job in (1, 2, 3):
        handler.emit(record(LogEvent.JOB_INFO, 1000.0, jobid=job, rule_name="quantize_model", wildcards=quantize(job)))
        handler.emit(record(LogEvent.SHELLCMD, 1000.0, "python scripts/run_job.py ..."))
    handler.emit(record(None, 1000.0, "Select jobs to execute..."))
    handler.emit(record(None, 1000.0, "a warning"))
    handler.emit(record(LogEvent.JOB_FINISHED, 1012.0, job_id=1))
    handler.emit(record(LogEvent.JOB_FINISHED, 1024.0, job_id=2))
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[:2] == ["Job stats", "a warning"] and len(lines) == 5
    assert "1/3 steps, 0/3 cells" in lines[2] and lines[2].endswith(": quantize_model m none m1 channel int4 (12 s)")
    assert (
        lines[3]
        == "          running: quantize_model m none m2 channel int4 (12 s), quantize_model m none m3 channel int4 "
        "(12 s)"
    )
    assert "2/3 steps" in lines[4]


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
    handler.emit(record(LogEvent.RUN_INFO, 0.0, "Job stats", stats={"quantize_model": 2, "total": 2}))
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
    assert all("0/2 cells (1 failed)" in line for line in lines if "steps" in line)
