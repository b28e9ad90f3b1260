# Per run: verdicts on the claims, and the figures over all studies. These jobs do not import torch.


rule evaluate_claims:
    """Verdicts of this run on the findings of arXiv 2507.17417 (config/claims.yaml), model by model."""
    input:
        results=f"{RESULTS}/results.csv",
        samples=collect(f"{RESULTS}/studies/{{study}}.items.parquet", study=STUDIES),
        statements=local(CLAIMS),
        digests=[PLAN.digest("collect_results"), *collect(PLAN.digest("collect_study"), study=STUDIES)],
    output:
        claims=f"{RESULTS}/claims.csv",
        digest=f"{RESULTS}/digests/evaluate_claims/all.json",
    log:
        **PLAN.logs("evaluate_claims"),
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.reporting_spec("evaluate_claims"),
    shell:
        command("evaluate_claims", "results samples statements")


rule plot_pareto:
    """Figure of divergence against bits per weight, with the Pareto fronts of every model and kind of deployment."""
    input:
        results=f"{RESULTS}/results.csv",
        digest=PLAN.digest("collect_results"),
    output:
        png=f"{RESULTS}/pareto.png",
        pdf=f"{RESULTS}/pareto.pdf",
        svg=f"{RESULTS}/pareto.svg",
        csv=f"{RESULTS}/pareto.csv",
        digest=f"{RESULTS}/digests/plot_pareto/all.json",
    log:
        **PLAN.logs("plot_pareto"),
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.reporting_spec("plot_pareto"),
    shell:
        command("plot_pareto", "results")


rule plot_number_lines:
    """Figure of the values that INT4, FP4, MXFP4 and NVFP4 can represent."""
    output:
        png=f"{RESULTS}/number-lines.png",
        pdf=f"{RESULTS}/number-lines.pdf",
        svg=f"{RESULTS}/number-lines.svg",
        csv=f"{RESULTS}/number-lines.csv",
        digest=f"{RESULTS}/digests/plot_number_lines/all.json",
    log:
        **PLAN.logs("plot_number_lines"),
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.reporting_spec("plot_number_lines"),
    shell:
        command("plot_number_lines")


if LOSSES:

    rule plot_losses:
        """Training-loss curves of learned transforms and trained mitigations."""
        input:
            losses=LOSSES,
            digests=PLAN.digests(LOSSES),
        output:
            png=f"{RESULTS}/learning.png",
            pdf=f"{RESULTS}/learning.pdf",
            svg=f"{RESULTS}/learning.svg",
            csv=f"{RESULTS}/learning.csv",
            digest=f"{RESULTS}/digests/plot_losses/all.json",
        log:
            **PLAN.logs("plot_losses"),
        localrule: True
        conda:
            ENVIRONMENT
        params:
            spec=PLAN.reporting_spec("plot_losses"),
        shell:
            command("plot_losses", "losses")


if DISTRIBUTIONS:

    rule plot_distributions:
        """Figures of the inputs and weights of one model under its transforms, before rounding."""
        input:
            distributions=lambda w: DISTRIBUTIONS[w.model],
            digests=lambda w: PLAN.digests(DISTRIBUTIONS[w.model]),
        output:
            png=collect(f"{RESULTS}/distributions/{{model}}/{{figure}}.png", figure=FIGURES, allow_missing=True),
            pdf=collect(f"{RESULTS}/distributions/{{model}}/{{figure}}.pdf", figure=FIGURES, allow_missing=True),
            svg=collect(f"{RESULTS}/distributions/{{model}}/{{figure}}.svg", figure=FIGURES, allow_missing=True),
            csv=collect(f"{RESULTS}/distributions/{{model}}/{{figure}}.csv", figure=FIGURES, allow_missing=True),
            digest=f"{RESULTS}/digests/plot_distributions/{{model}}.json",
        log:
            **PLAN.logs("plot_distributions"),
        localrule: True
        conda:
            ENVIRONMENT
        params:
            spec=PLAN.reporting_spec("plot_distributions"),
        shell:
            command("plot_distributions", "distributions")


if RESIDUAL_ERRORS:

    rule plot_residual_error:
        """Figure of the error of the residual stream after every layer, a panel per cell."""
        input:
            measured=residual_errors,
            digests=lambda w: PLAN.digests(residual_errors(w)),
        output:
            png=f"{RESULTS}/residual-error.png",
            pdf=f"{RESULTS}/residual-error.pdf",
            svg=f"{RESULTS}/residual-error.svg",
            csv=f"{RESULTS}/residual-error.csv",
            digest=f"{RESULTS}/digests/plot_residual_error/all.json",
        log:
            **PLAN.logs("plot_residual_error"),
        localrule: True
        conda:
            ENVIRONMENT
        params:
            spec=PLAN.reporting_spec("plot_residual_error"),
        shell:
            command("plot_residual_error", "measured")


if ALLOCATIONS:

    rule plot_allocations:
        """Figure of divergence against stored bits of allocations, with the predicted front and the uniform schemes."""
        input:
            allocated=ALLOCATIONS,
            results=f"{RESULTS}/results.csv",
            digests=[*PLAN.digests(ALLOCATIONS), PLAN.digest("collect_results")],
        output:
            png=f"{RESULTS}/allocations.png",
            pdf=f"{RESULTS}/allocations.pdf",
            svg=f"{RESULTS}/allocations.svg",
            csv=f"{RESULTS}/allocations.csv",
            digest=f"{RESULTS}/digests/plot_allocations/all.json",
        log:
            **PLAN.logs("plot_allocations"),
        localrule: True
        conda:
            ENVIRONMENT
        params:
            spec=PLAN.reporting_spec("plot_allocations"),
        shell:
            command("plot_allocations", "allocated results")
