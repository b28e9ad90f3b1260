"""quantgrid: models x transforms x mitigations x granularities x formats, calibrated once, quantized, evaluated, reported."""

import os
import re
import sys

if not config:

    configfile: "config/config.yaml"


include: "workflow/rules/plan.smk"
include: "workflow/rules/preparation.smk"
include: "workflow/rules/quantization.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/reporting.smk"
include: "workflow/rules/overview.smk"


if CACHE:  # Snakemake refuses to time what it may take from a cache
    for cached in workflow.rules:
        if cached.cache and cached.cache.output:
            cached._benchmark = None


rule all:
    default_target: True
    input:
        EVALUATIONS,
        PLAN.digests(EVALUATIONS),  # what has no record is made again
        CHECKPOINTS,
        collect(PLAN.pattern("collect_study", "records"), study=STUDIES),
        f"{RESULTS}/report.html",
        f"{RESULTS}/results.csv",
        f"{RESULTS}/steps.csv",
        REPORTED,
        [PLAN.digest(rule) for rule in ("list_steps", "build_report")],


rule evaluations:
    input:
        EVALUATIONS,


rule tables:
    input:
        collect(f"{RESULTS}/tables/{{study}}.md", study=STUDIES),


rule figures:
    input:
        collect(f"{RESULTS}/figures/{{study}}.png", study=STUDIES),


onstart:
    # Before the first job: one run at a time in the results folder; the largest jobs of this run beside the machine, what cannot fit stops here.
    take_lock()
    preflight(workflow.dag.needrun_jobs(), workflow.local_exec)


onerror:
    # What was computed is shown all the same; the page lists what is missing.
    shell('python "$QUANTGRID_SCRIPTS"/build_partial_report.py --spec {PARTIAL_REPORT:q} --report {RESULTS:q}/report.partial.html')
