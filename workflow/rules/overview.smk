# Of a whole run: its findings, and the figures that no single study has. Nothing here imports torch.


rule evaluate_claims:
    input:
        results=PLAN.pattern("collect_results", "csv"),
        samples=collect(PLAN.pattern("collect_study", "items"), study=STUDIES),
        claims=local(CLAIMS),
        digests=[PLAN.digest("collect_results"), *collect(PLAN.digest("collect_study"), study=STUDIES)],
    output:
        claims=PLAN.pattern("evaluate_claims", "claims"),
        digest=PLAN.digest("evaluate_claims"),
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
        results=PLAN.pattern("collect_results", "csv"),
        digest=PLAN.digest("collect_results"),
    output:
        png=PLAN.pattern("plot_pareto", "png"),
        pdf=PLAN.pattern("plot_pareto", "pdf"),
        svg=report(
            PLAN.pattern("plot_pareto", "svg"),
            caption="../report/pareto.rst",
            category="Figures",
            subcategory="Whole run",
            labels={"figure": "perplexity against bits"},
        ),
        csv=PLAN.pattern("plot_pareto", "csv"),
        digest=PLAN.digest("plot_pareto"),
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
        png=PLAN.pattern("plot_number_lines", "png"),
        pdf=PLAN.pattern("plot_number_lines", "pdf"),
        svg=report(
            PLAN.pattern("plot_number_lines", "svg"),
            caption="../report/number-lines.rst",
            category="Figures",
            subcategory="Whole run",
            labels={"figure": "number lines of formats"},
        ),
        csv=PLAN.pattern("plot_number_lines", "csv"),
        digest=PLAN.digest("plot_number_lines"),
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
            digests=PLAN.digests(LOSSES),
        output:
            png=PLAN.pattern("plot_losses", "png"),
            pdf=PLAN.pattern("plot_losses", "pdf"),
            svg=report(
                PLAN.pattern("plot_losses", "svg"),
                caption="../report/losses.rst",
                category="Figures",
                subcategory="Whole run",
                labels={"figure": "losses of trainings"},
            ),
            csv=PLAN.pattern("plot_losses", "csv"),
            digest=PLAN.digest("plot_losses"),
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
            described=lambda w: DISTRIBUTIONS[w.model],
            digests=lambda w: PLAN.digests(DISTRIBUTIONS[w.model]),
        output:
            png=collect(PLAN.pattern("plot_distributions", "png"), figure=FIGURES, allow_missing=True),
            pdf=collect(PLAN.pattern("plot_distributions", "pdf"), figure=FIGURES, allow_missing=True),
            svg=[
                report(
                    PLAN.pattern("plot_distributions", "svg").replace("{figure}", figure),
                    caption="../report/distributions.rst",
                    category="Figures",
                    subcategory="Inputs and weights",
                    labels={"model": "{model}", "figure": figure},
                )
                for figure in FIGURES
            ],
            csv=collect(PLAN.pattern("plot_distributions", "csv"), figure=FIGURES, allow_missing=True),
            digest=PLAN.digest("plot_distributions"),
        log:
            f"{RESULTS}/logs/plot_distributions/{{model}}.log",
        localrule: True
        conda:
            ENVIRONMENT
        params:
            spec=PLAN.reporting_spec("plot_distributions"),
        shell:
            'python "$QUANTGRID_SCRIPTS"/run_job.py plot_distributions --spec {params.spec:q} --distributions {input.described:q} --png {output.png:q}'
            " --pdf {output.pdf:q} --svg {output.svg:q} --csv {output.csv:q} > {log:q} 2>&1"


if DEPTHS:

    rule plot_depth:
        input:
            depths=DEPTHS,
            digests=PLAN.digests(DEPTHS),
        output:
            png=PLAN.pattern("plot_depth", "png"),
            pdf=PLAN.pattern("plot_depth", "pdf"),
            svg=report(
                PLAN.pattern("plot_depth", "svg"),
                caption="../report/depth.rst",
                category="Figures",
                subcategory="Whole run",
                labels={"figure": "error over depth"},
            ),
            csv=PLAN.pattern("plot_depth", "csv"),
            digest=PLAN.digest("plot_depth"),
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
