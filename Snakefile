"""quantgrid: models x transforms x mitigations x granularities x formats, quantized and evaluated."""

import gc
import os
import re
import sys

from snakemake.utils import min_version

min_version("9.27")  # version in envs/requirements.txt; not tested with older ones

if not config:

    configfile: "config/config.yaml"


include: "workflow/rules/plan.smk"
include: "workflow/rules/preparation.smk"
include: "workflow/rules/quantization.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/race_inputs.smk"
include: "workflow/rules/racing.smk"
include: "workflow/rules/export.smk"
include: "workflow/rules/reporting.smk"
include: "workflow/rules/overview.smk"


rule all:
    """The whole run, from models to the report; the default."""
    default_target: True
    input:
        EVALUATIONS,
        PLAN.digests(EVALUATIONS),  # outputs without a record are recomputed
        race_evaluations,
        lambda w: PLAN.digests(race_evaluations(w)),
        CHECKPOINTS,
        EXPORTS,
        PLAN.digests(EXPORTS),
        collect(PLAN.pattern("collect_study", "records"), study=STUDIES),
        f"{RESULTS}/report.html",
        f"{RESULTS}/results.csv",
        f"{RESULTS}/steps.csv",
        REPORTED,
        [PLAN.digest(rule) for rule in ("list_steps", "build_report")],


rule evaluations:
    """All evaluations of all cells, without tables, figures and the report."""
    input:
        EVALUATIONS,
        race_evaluations,
        AWAITED,  # ancient inputs of cells: if one is made again, Snakemake plans no new cell without this


rule exports:
    """All exports that the config asks for, and what they need."""
    input:
        EXPORTS,
        PLAN.digests(EXPORTS),
        AWAITED,


rule tables:
    """The tables of all studies, and what they need."""
    input:
        collect(f"{RESULTS}/tables/{{study}}.md", study=STUDIES),


rule figures:
    """The figures of all studies, and what they need."""
    input:
        collect(f"{RESULTS}/figures/{{study}}.png", study=STUDIES),


onstart:
    # Before the first job: lock the results folder; predict the time; stop if the largest jobs do not fit this machine.
    gc.enable()
    leave_no_timers()
    take_lock()
    forecast(planned_jobs(), runs_locally())
    preflight(planned_jobs(), runs_locally())


onerror:
    # A report of the finished cells; the page lists the missing ones.
    shell(
        'python "$QUANTGRID_SCRIPTS"/build_partial_report.py --spec {PARTIAL_REPORT:q} '
        "--report {RESULTS:q}/report.partial.html"
    )
