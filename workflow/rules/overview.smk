# Of a whole run: its findings, and the figures that no single study has. Nothing here imports torch.


rule evaluate_claims:
    input:
        results=f"{RESULTS}/results.csv",
        samples=collect(f"{RESULTS}/studies/{{study}}.items.parquet", study=STUDIES),
        claims=local(CLAIMS),
    output:
        claims=f"{RESULTS}/claims.csv",
    log:
        f"{RESULTS}/logs/evaluate_claims.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate_claims/all.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.reporting_spec("evaluate_claims"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py evaluate_claims --spec {params.spec:q} --results {input.results:q} --items {input.samples:q}'
        " --statements {input.claims:q} --claims {output.claims:q} > {log:q} 2>&1"


rule plot_pareto:
    input:
        results=f"{RESULTS}/results.csv",
    output:
        png=f"{RESULTS}/pareto.png",
        pdf=f"{RESULTS}/pareto.pdf",
        svg=report(
            f"{RESULTS}/pareto.svg",
            caption="../report/pareto.rst",
            category="Figures",
            subcategory="Whole run",
            labels={"figure": "perplexity against bits"},
        ),
        csv=f"{RESULTS}/pareto.csv",
    log:
        f"{RESULTS}/logs/plot_pareto.log",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.reporting_spec("plot_pareto"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py plot_pareto --spec {params.spec:q} --results {input.results:q} --png {output.png:q}'
        " --pdf {output.pdf:q} --svg {output.svg:q} --csv {output.csv:q} > {log:q} 2>&1"


rule plot_number_lines:
    output:
        png=f"{RESULTS}/number-lines.png",
        pdf=f"{RESULTS}/number-lines.pdf",
        svg=report(
            f"{RESULTS}/number-lines.svg",
            caption="../report/number-lines.rst",
            category="Figures",
            subcategory="Whole run",
            labels={"figure": "number lines of formats"},
        ),
        csv=f"{RESULTS}/number-lines.csv",
    log:
        f"{RESULTS}/logs/plot_number_lines.log",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.reporting_spec("plot_number_lines"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py plot_number_lines --spec {params.spec:q} --png {output.png:q} --pdf {output.pdf:q}'
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
                subcategory="Whole run",
                labels={"figure": "losses of trainings"},
            ),
            csv=f"{RESULTS}/learning.csv",
        log:
            f"{RESULTS}/logs/plot_losses.log",
        localrule: True
        conda:
            ENVIRONMENT
        params:
            spec=PLAN.reporting_spec("plot_losses"),
        shell:
            'python "$QUANTGRID_SCRIPTS"/run_job.py plot_losses --spec {params.spec:q} --losses {input.losses:q} --png {output.png:q} --pdf {output.pdf:q}'
            " --svg {output.svg:q} --csv {output.csv:q} > {log:q} 2>&1"


if DISTRIBUTIONS:

    rule plot_distributions:
        input:
            lambda w: DISTRIBUTIONS[w.model],
        output:
            png=collect(f"{RESULTS}/distributions/{{{{model}}}}/{{figure}}.png", figure=FIGURES),
            pdf=collect(f"{RESULTS}/distributions/{{{{model}}}}/{{figure}}.pdf", figure=FIGURES),
            svg=[
                report(
                    f"{RESULTS}/distributions/{{model}}/{figure}.svg",
                    caption="../report/distributions.rst",
                    category="Figures",
                    subcategory="Inputs and weights",
                    labels={"model": "{model}", "figure": figure},
                )
                for figure in FIGURES
            ],
            csv=collect(f"{RESULTS}/distributions/{{{{model}}}}/{{figure}}.csv", figure=FIGURES),
        log:
            f"{RESULTS}/logs/plot_distributions/{{model}}.log",
        localrule: True
        conda:
            ENVIRONMENT
        params:
            spec=PLAN.reporting_spec("plot_distributions"),
        shell:
            'python "$QUANTGRID_SCRIPTS"/run_job.py plot_distributions --spec {params.spec:q} --distributions {input:q} --png {output.png:q}'
            " --pdf {output.pdf:q} --svg {output.svg:q} --csv {output.csv:q} > {log:q} 2>&1"


if DEPTHS:

    rule plot_depth:
        input:
            depths=DEPTHS,
        output:
            png=f"{RESULTS}/depth.png",
            pdf=f"{RESULTS}/depth.pdf",
            svg=report(
                f"{RESULTS}/depth.svg",
                caption="../report/depth.rst",
                category="Figures",
                subcategory="Whole run",
                labels={"figure": "error over depth"},
            ),
            csv=f"{RESULTS}/depth.csv",
        log:
            f"{RESULTS}/logs/plot_depth.log",
        localrule: True
        conda:
            ENVIRONMENT
        params:
            spec=PLAN.reporting_spec("plot_depth"),
        shell:
            'python "$QUANTGRID_SCRIPTS"/run_job.py plot_depth --spec {params.spec:q} --depths {input.depths:q} --png {output.png:q}'
            " --pdf {output.pdf:q} --svg {output.svg:q} --csv {output.csv:q} > {log:q} 2>&1"
