# From the evaluations to tables, figures and the report: seconds each, with the driver. Nothing here imports torch.


rule collect_study:
    input:
        evaluations=lambda w: PLAN.study_inputs(w.study),
        # Not ancient, unlike a cell's gate: of what lies behind a job that runs again, Snakemake plans only what some other way leads to.
        gates=lambda w: GATES.of_study(GATES.pattern, w.study),
        digests=lambda w: [*PLAN.digests(PLAN.study_inputs(w.study)), *GATES.of_study(GATES.digest, w.study)],
    output:
        records=PLAN.pattern("collect_study", "records"),
        samples=PLAN.pattern("collect_study", "items"),
        digest=PLAN.digest("collect_study"),
    log:
        f"{RESULTS}/logs/collect_study/{{study}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/collect_study/{{study}}.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=lambda w: PLAN.study_spec(w.study),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py collect_study --spec {params.spec:q} --first {input.evaluations[0]:q} --gate {input.gates:q}'
        " --records {output.records:q} --items {output.samples:q} > {log:q} 2>&1"


rule collect_results:
    input:
        studies=collect(PLAN.pattern("collect_study", "records"), study=STUDIES),
        digests=collect(PLAN.digest("collect_study"), study=STUDIES),
    output:
        csv=PLAN.pattern("collect_results", "csv"),
        parquet=PLAN.pattern("collect_results", "parquet"),
        cells=PLAN.pattern("collect_results", "cells"),
        digest=PLAN.digest("collect_results"),
    log:
        f"{RESULTS}/logs/collect_results.log",
    benchmark:
        f"{RESULTS}/benchmarks/collect_results/all.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.reporting_spec("collect_results"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py collect_results --spec {params.spec:q} --studies {input.studies:q} --csv {output.csv:q}'
        " --parquet {output.parquet:q} --cells {output.cells:q} > {log:q} 2>&1"


rule list_steps:
    output:
        steps=PLAN.pattern("list_steps", "steps"),
        digest=PLAN.digest("list_steps"),
    log:
        f"{RESULTS}/logs/list_steps.log",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.steps_spec(),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py list_steps --spec {params.spec:q} --steps {output.steps:q} > {log:q} 2>&1'


rule tabulate_study:
    input:
        records=PLAN.pattern("collect_study", "records"),
        digest=PLAN.digest("collect_study"),
    output:
        csv=PLAN.pattern("tabulate_study", "csv"),
        md=report(
            PLAN.pattern("tabulate_study", "md"),
            caption="../report/table.rst",
            category="Tables",
            subcategory="Values",
            labels={"study": "{study}"},
        ),
        tex=PLAN.pattern("tabulate_study", "tex"),
        digest=PLAN.digest("tabulate_study"),
    log:
        f"{RESULTS}/logs/tabulate_study/{{study}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/tabulate_study/{{study}}.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=lambda w: PLAN.reporting_spec("tabulate_study", w.study),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py tabulate_study --spec {params.spec:q} --records {input.records:q} --csv {output.csv:q} --md {output.md:q}'
        " --tex {output.tex:q} > {log:q} 2>&1"


rule compare_study:
    input:
        records=PLAN.pattern("collect_study", "records"),
        samples=PLAN.pattern("collect_study", "items"),
        digest=PLAN.digest("collect_study"),
    output:
        csv=PLAN.pattern("compare_study", "csv"),
        md=report(
            PLAN.pattern("compare_study", "md"),
            caption="../report/comparison.rst",
            category="Tables",
            subcategory="Differences",
            labels={"study": "{study}"},
        ),
        tex=PLAN.pattern("compare_study", "tex"),
        digest=PLAN.digest("compare_study"),
    log:
        f"{RESULTS}/logs/compare_study/{{study}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/compare_study/{{study}}.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=lambda w: PLAN.reporting_spec("compare_study", w.study),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py compare_study --spec {params.spec:q} --records {input.records:q} --items {input.samples:q}'
        " --csv {output.csv:q} --md {output.md:q} --tex {output.tex:q} > {log:q} 2>&1"


rule plot_study:
    input:
        records=PLAN.pattern("collect_study", "records"),
        digest=PLAN.digest("collect_study"),
    output:
        png=PLAN.pattern("plot_study", "png"),
        pdf=PLAN.pattern("plot_study", "pdf"),
        svg=report(
            PLAN.pattern("plot_study", "svg"),
            caption="../report/figure.rst",
            category="Figures",
            subcategory="Studies",
            labels={"study": "{study}"},
        ),
        csv=PLAN.pattern("plot_study", "csv"),
        digest=PLAN.digest("plot_study"),
    log:
        f"{RESULTS}/logs/plot_study/{{study}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/plot_study/{{study}}.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=lambda w: PLAN.reporting_spec("plot_study", w.study),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py plot_study --spec {params.spec:q} --records {input.records:q} --png {output.png:q} --pdf {output.pdf:q}'
        " --svg {output.svg:q} --csv {output.csv:q} > {log:q} 2>&1"


rule build_report:
    input:
        results=PLAN.pattern("collect_results", "csv"),
        studies=collect(PLAN.pattern("collect_study", "records"), study=STUDIES),
        tables=collect(PLAN.pattern("tabulate_study", "csv"), study=STUDIES),
        comparisons=collect(PLAN.pattern("compare_study", "csv"), study=COMPARED),
        figures=collect(PLAN.pattern("plot_study", "svg"), study=STUDIES),
        losses=PLAN.pattern("plot_losses", "svg") if LOSSES else [],
        distributions=collect(PLAN.pattern("plot_distributions", "svg"), model=DISTRIBUTIONS, figure=FIGURES),
        claims=PLAN.pattern("evaluate_claims", "claims"),
        pareto=PLAN.pattern("plot_pareto", "svg"),
        lines=PLAN.pattern("plot_number_lines", "svg"),
        depth=PLAN.pattern("plot_depth", "svg") if DEPTHS else [],
        digests=REPORTED,
    output:
        report=PLAN.pattern("build_report", "report"),
        digest=PLAN.digest("build_report"),
    log:
        f"{RESULTS}/logs/build_report.log",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.reporting_spec("build_report"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py build_report --spec {params.spec:q} --results {input.results:q} --studies {input.studies:q}'
        " --gate {input.comparisons:q} --figures {input.figures:q} --losses {input.losses:q} --distributions {input.distributions:q} --claims {input.claims:q}"
        " --pareto {input.pareto:q} --lines {input.lines:q} --depth {input.depth:q} --report {output.report:q} > {log:q} 2>&1"
