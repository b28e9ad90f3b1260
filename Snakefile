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


localrules:
    all,
    tables,
    figures,
    evaluations,


rule all:
    default_target: True
    input:
        EVALUATIONS,
        CHECKPOINTS,
        f"{RESULTS}/report.html",
        f"{RESULTS}/results.csv",


rule evaluations:
    input:
        EVALUATIONS,


rule tables:
    input:
        collect(f"{RESULTS}/tables/{{study}}.md", study=STUDIES),


rule figures:
    input:
        collect(f"{RESULTS}/figures/{{study}}.png", study=STUDIES),


onerror:
    # What was computed is shown all the same; the page lists what is missing.
    shell('python "$QUANTGRID_SCRIPTS"/build_partial_report.py --spec {PARTIAL_REPORT:q} --report {RESULTS:q}/report.partial.html')
