# From the evaluations to tables, figures and the report. Nothing here imports torch.


rule collect_study:
    input:
        lambda w: PLAN.study_inputs(w.study),
    output:
        records=f"{RESULTS}/studies/{{study}}.csv",
        samples=f"{RESULTS}/studies/{{study}}.items.parquet",
    log:
        f"{RESULTS}/logs/collect_study/{{study}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/collect_study/{{study}}.tsv"
    conda:
        "../../envs/cpu.yaml"
    params:
        spec=lambda w: PLAN.study_spec(w.study),
    shell:
        'python "$QUANTGRID_SCRIPTS"/collect_study.py --spec {params.spec:q} --records {output.records:q}'
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
    conda:
        "../../envs/cpu.yaml"
    params:
        spec=PLAN.reporting_spec("collect_results"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/collect_results.py --spec {params.spec:q} --studies {input.studies:q} --csv {output.csv:q}'
        " --parquet {output.parquet:q} --cells {output.cells:q} > {log:q} 2>&1"


rule tabulate_study:
    input:
        records=f"{RESULTS}/studies/{{study}}.csv",
    output:
        csv=f"{RESULTS}/tables/{{study}}.csv",
        md=report(
            f"{RESULTS}/tables/{{study}}.md",
            caption="../report/table.rst",
            category="Tables",
            labels={"study": "{study}"},
        ),
        tex=f"{RESULTS}/tables/{{study}}.tex",
    log:
        f"{RESULTS}/logs/tabulate_study/{{study}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/tabulate_study/{{study}}.tsv"
    conda:
        "../../envs/cpu.yaml"
    params:
        spec=lambda w: PLAN.reporting_spec("tabulate_study", w.study),
    shell:
        'python "$QUANTGRID_SCRIPTS"/tabulate_study.py --spec {params.spec:q} --records {input.records:q} --csv {output.csv:q} --md {output.md:q}'
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
            labels={"study": "{study}, differences"},
        ),
        tex=f"{RESULTS}/comparisons/{{study}}.tex",
    log:
        f"{RESULTS}/logs/compare_study/{{study}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/compare_study/{{study}}.tsv"
    conda:
        "../../envs/cpu.yaml"
    params:
        spec=lambda w: PLAN.reporting_spec("compare_study", w.study),
    shell:
        'python "$QUANTGRID_SCRIPTS"/compare_study.py --spec {params.spec:q} --records {input.records:q} --items {input.samples:q}'
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
            labels={"study": "{study}"},
        ),
        csv=f"{RESULTS}/figures/{{study}}.csv",
    log:
        f"{RESULTS}/logs/plot_study/{{study}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/plot_study/{{study}}.tsv"
    conda:
        "../../envs/cpu.yaml"
    params:
        spec=lambda w: PLAN.reporting_spec("plot_study", w.study),
    shell:
        'python "$QUANTGRID_SCRIPTS"/plot_study.py --spec {params.spec:q} --records {input.records:q} --png {output.png:q} --pdf {output.pdf:q}'
        " --svg {output.svg:q} --csv {output.csv:q} > {log:q} 2>&1"


if LOSSES:

    rule plot_losses:
        input:
            losses=LOSSES,
        output:
            png=f"{RESULTS}/learning.png",
            pdf=f"{RESULTS}/learning.pdf",
            svg=report(
                f"{RESULTS}/learning.svg",
                caption="../report/losses.rst",
                category="Figures",
            ),
            csv=f"{RESULTS}/learning.csv",
        log:
            f"{RESULTS}/logs/plot_losses.log",
        conda:
            "../../envs/cpu.yaml"
        params:
            spec=PLAN.reporting_spec("plot_losses"),
        shell:
            'python "$QUANTGRID_SCRIPTS"/plot_losses.py --spec {params.spec:q} --losses {input.losses:q} --png {output.png:q} --pdf {output.pdf:q}'
            " --svg {output.svg:q} --csv {output.csv:q} > {log:q} 2>&1"


if DISTRIBUTIONS:

    rule plot_distributions:
        input:
            lambda w: DISTRIBUTIONS[w.model],
        output:
            png=collect(f"{RESULTS}/distributions/{{{{model}}}}/{{figure}}.png", figure=FIGURES),
            pdf=collect(f"{RESULTS}/distributions/{{{{model}}}}/{{figure}}.pdf", figure=FIGURES),
            svg=report(
                collect(f"{RESULTS}/distributions/{{{{model}}}}/{{figure}}.svg", figure=FIGURES),
                caption="../report/distributions.rst",
                category="Figures",
                labels={"model": "{model}"},
            ),
            csv=collect(f"{RESULTS}/distributions/{{{{model}}}}/{{figure}}.csv", figure=FIGURES),
        log:
            f"{RESULTS}/logs/plot_distributions/{{model}}.log",
        conda:
            "../../envs/cpu.yaml"
        params:
            spec=PLAN.reporting_spec("plot_distributions"),
        shell:
            'python "$QUANTGRID_SCRIPTS"/plot_distributions.py --spec {params.spec:q} --distributions {input:q} --png {output.png:q}'
            " --pdf {output.pdf:q} --svg {output.svg:q} --csv {output.csv:q} > {log:q} 2>&1"


rule build_report:
    input:
        results=f"{RESULTS}/results.csv",
        studies=collect(f"{RESULTS}/studies/{{study}}.csv", study=STUDIES),
        tables=collect(f"{RESULTS}/tables/{{study}}.csv", study=STUDIES),
        comparisons=collect(f"{RESULTS}/comparisons/{{study}}.csv", study=COMPARED),
        figures=collect(f"{RESULTS}/figures/{{study}}.svg", study=STUDIES),
        losses=f"{RESULTS}/learning.svg" if LOSSES else [],
        distributions=collect(f"{RESULTS}/distributions/{{model}}/{{figure}}.svg", model=DISTRIBUTIONS, figure=FIGURES),
    output:
        report=f"{RESULTS}/report.html",
    log:
        f"{RESULTS}/logs/build_report.log",
    conda:
        "../../envs/cpu.yaml"
    params:
        spec=PLAN.reporting_spec("build_report"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/build_report.py --spec {params.spec:q} --results {input.results:q} --studies {input.studies:q}'
        " --figures {input.figures:q} --losses {input.losses:q} --distributions {input.distributions:q} --report {output.report:q} > {log:q} 2>&1"
