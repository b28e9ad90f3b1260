# From the evaluations to tables, figures and the report: seconds each, with the driver. Nothing here imports torch.


rule collect_study:
    input:
        evaluations=lambda w: PLAN.study_inputs(w.study),
        # Not ancient, unlike a cell's gate: of what lies behind a job that runs again, Snakemake plans only what some other way leads to.
        gates=lambda w: GATES.of_study(w.study),
    output:
        records=f"{RESULTS}/studies/{{study}}.csv",
        samples=f"{RESULTS}/studies/{{study}}.items.parquet",
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
        'python "$QUANTGRID_SCRIPTS"/run_job.py collect_study --spec {params.spec:q} --first {input.evaluations[0]:q} --records {output.records:q}'
        " --items {output.samples:q} > {log:q} 2>&1"


rule collect_results:
    input:
        studies=collect(f"{RESULTS}/studies/{{study}}.csv", study=STUDIES),
    output:
        csv=f"{RESULTS}/results.csv",
        parquet=f"{RESULTS}/results.parquet",
        cells=f"{RESULTS}/cells.csv",
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
        steps=f"{RESULTS}/steps.csv",
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
        records=f"{RESULTS}/studies/{{study}}.csv",
    output:
        csv=f"{RESULTS}/tables/{{study}}.csv",
        md=report(
            f"{RESULTS}/tables/{{study}}.md",
            caption="../report/table.rst",
            category="Tables",
            subcategory="Values",
            labels={"study": "{study}"},
        ),
        tex=f"{RESULTS}/tables/{{study}}.tex",
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
        records=f"{RESULTS}/studies/{{study}}.csv",
        samples=f"{RESULTS}/studies/{{study}}.items.parquet",
    output:
        csv=f"{RESULTS}/comparisons/{{study}}.csv",
        md=report(
            f"{RESULTS}/comparisons/{{study}}.md",
            caption="../report/comparison.rst",
            category="Tables",
            subcategory="Differences",
            labels={"study": "{study}"},
        ),
        tex=f"{RESULTS}/comparisons/{{study}}.tex",
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
        records=f"{RESULTS}/studies/{{study}}.csv",
    output:
        png=f"{RESULTS}/figures/{{study}}.png",
        pdf=f"{RESULTS}/figures/{{study}}.pdf",
        svg=report(
            f"{RESULTS}/figures/{{study}}.svg",
            caption="../report/figure.rst",
            category="Figures",
            subcategory="Studies",
            labels={"study": "{study}"},
        ),
        csv=f"{RESULTS}/figures/{{study}}.csv",
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
        results=f"{RESULTS}/results.csv",
        studies=collect(f"{RESULTS}/studies/{{study}}.csv", study=STUDIES),
        tables=collect(f"{RESULTS}/tables/{{study}}.csv", study=STUDIES),
        comparisons=collect(f"{RESULTS}/comparisons/{{study}}.csv", study=COMPARED),
        figures=collect(f"{RESULTS}/figures/{{study}}.svg", study=STUDIES),
        losses=f"{RESULTS}/learning.svg" if LOSSES else [],
        distributions=collect(f"{RESULTS}/distributions/{{model}}/{{figure}}.svg", model=DISTRIBUTIONS, figure=FIGURES),
        claims=f"{RESULTS}/claims.csv",
        pareto=f"{RESULTS}/pareto.svg",
        lines=f"{RESULTS}/number-lines.svg",
        depth=f"{RESULTS}/depth.svg" if DEPTHS else [],
    output:
        report=f"{RESULTS}/report.html",
    log:
        f"{RESULTS}/logs/build_report.log",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.reporting_spec("build_report"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py build_report --spec {params.spec:q} --results {input.results:q} --studies {input.studies:q}'
        " --figures {input.figures:q} --losses {input.losses:q} --distributions {input.distributions:q} --claims {input.claims:q}"
        " --pareto {input.pareto:q} --lines {input.lines:q} --depth {input.depth:q} --report {output.report:q} > {log:q} 2>&1"
