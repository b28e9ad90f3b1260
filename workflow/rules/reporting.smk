# From the evaluations to tables, figures and the report: seconds each, run with the driver. These
# jobs do not import torch.


rule collect_study:
    """Records of one study: a row for every cell, metric and data set; and the samples behind the means."""
    input:
        evaluations=lambda w: evaluations_of(w.study),
        decisions=lambda w: last_decisions(w.study),
        # Not ancient, unlike the check of a cell: Snakemake plans the jobs behind an ancient input of a
        # job that reruns only if another path leads to them.
        baseline_checks=lambda w: CHECKS.of_study(CHECKS.pattern, w.study),
        gates=lambda w: [gate.outputs["result"] for gate in PLAN.study_gates(w.study)],
        digests=lambda w: [
            *PLAN.digests([*evaluations_of(w.study), *last_decisions(w.study)]),
            *CHECKS.of_study(CHECKS.digest, w.study),
            *(gate.digest for gate in PLAN.study_gates(w.study)),
        ],
    output:
        records=f"{RESULTS}/studies/{{study}}.csv",
        samples=f"{RESULTS}/studies/{{study}}.items.parquet",
        digest=f"{RESULTS}/digests/collect_study/{{study}}.json",
    log:
        **PLAN.logs("collect_study"),
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=lambda w: PLAN.study_spec(w.study),
    shell:
        command("collect_study", "decisions", verify="baseline_checks gates", first="{input.evaluations[0]:q}")


rule collect_results:
    """Records of all studies in one table, `results.csv`, each shared cell once."""
    input:
        studies=collect(f"{RESULTS}/studies/{{study}}.csv", study=STUDIES),
        digests=collect(PLAN.digest("collect_study"), study=STUDIES),
    output:
        csv=f"{RESULTS}/results.csv",
        parquet=f"{RESULTS}/results.parquet",
        cells=f"{RESULTS}/cells.csv",
        digest=f"{RESULTS}/digests/collect_results/all.json",
    log:
        **PLAN.logs("collect_results"),
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.reporting_spec("collect_results"),
    shell:
        command("collect_results", "studies")


rule list_steps:
    """List of all steps of the config, `steps.csv`: rule, axes, key and path of every output."""
    output:
        steps=f"{RESULTS}/steps.csv",
        digest=f"{RESULTS}/digests/list_steps/all.json",
    log:
        **PLAN.logs("list_steps"),
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.steps_spec(),
    shell:
        command("list_steps")


rule tabulate_study:
    """Table of one study as CSV, Markdown and LaTeX."""
    input:
        records=f"{RESULTS}/studies/{{study}}.csv",
        digest=PLAN.digest("collect_study"),
    output:
        csv=f"{RESULTS}/tables/{{study}}.csv",
        md=f"{RESULTS}/tables/{{study}}.md",
        tex=f"{RESULTS}/tables/{{study}}.tex",
        digest=f"{RESULTS}/digests/tabulate_study/{{study}}.json",
    log:
        **PLAN.logs("tabulate_study"),
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=lambda w: PLAN.reporting_spec("tabulate_study", w.study),
    shell:
        command("tabulate_study", "records")


rule compare_study:
    """Paired comparisons of the cells of one study that differ in one axis alone, with p-values adjusted by Holm."""
    input:
        records=f"{RESULTS}/studies/{{study}}.csv",
        samples=f"{RESULTS}/studies/{{study}}.items.parquet",
        digest=PLAN.digest("collect_study"),
    output:
        csv=f"{RESULTS}/comparisons/{{study}}.csv",
        md=f"{RESULTS}/comparisons/{{study}}.md",
        tex=f"{RESULTS}/comparisons/{{study}}.tex",
        digest=f"{RESULTS}/digests/compare_study/{{study}}.json",
    log:
        **PLAN.logs("compare_study"),
    wildcard_constraints:
        study="|".join(map(re.escape, COMPARED)) or "(?!)",  # no target of a study that compares nothing
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=lambda w: PLAN.reporting_spec("compare_study", w.study),
    shell:
        command("compare_study", "records samples")


rule plot_study:
    """Figure of one study as PNG, PDF and SVG, and its numbers as CSV."""
    input:
        records=f"{RESULTS}/studies/{{study}}.csv",
        digest=PLAN.digest("collect_study"),
    output:
        png=f"{RESULTS}/figures/{{study}}.png",
        pdf=f"{RESULTS}/figures/{{study}}.pdf",
        svg=f"{RESULTS}/figures/{{study}}.svg",
        csv=f"{RESULTS}/figures/{{study}}.csv",
        digest=f"{RESULTS}/digests/plot_study/{{study}}.json",
    log:
        **PLAN.logs("plot_study"),
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=lambda w: PLAN.reporting_spec("plot_study", w.study),
    shell:
        command("plot_study", "records")


rule build_report:
    """Report of all studies: one HTML page with recommended recipes, all cells, tables, figures and verdicts on claims."""
    input:
        results=f"{RESULTS}/results.csv",
        studies=collect(f"{RESULTS}/studies/{{study}}.csv", study=STUDIES),
        samples=collect(f"{RESULTS}/studies/{{study}}.items.parquet", study=STUDIES),
        tables=collect(f"{RESULTS}/tables/{{study}}.csv", study=STUDIES),
        comparisons=collect(f"{RESULTS}/comparisons/{{study}}.csv", study=COMPARED),
        figures=collect(f"{RESULTS}/figures/{{study}}.svg", study=STUDIES),
        losses=f"{RESULTS}/learning.svg" if LOSSES else [],
        distributions=collect(f"{RESULTS}/distributions/{{model}}/{{figure}}.svg", model=DISTRIBUTIONS, figure=FIGURES),
        claims=f"{RESULTS}/claims.csv",
        pareto=f"{RESULTS}/pareto.svg",
        lines=f"{RESULTS}/number-lines.svg",
        residual_error=f"{RESULTS}/residual-error.svg" if RESIDUAL_ERRORS else [],
        allocations=f"{RESULTS}/allocations.svg" if ALLOCATIONS else [],
        decisions=lambda w: [path for study in PLAN.raced for path in last_decisions(study)],
        digests=REPORTED,
    output:
        report=f"{RESULTS}/report.html",
        digest=f"{RESULTS}/digests/build_report/all.json",
    log:
        **PLAN.logs("build_report"),
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.reporting_spec("build_report"),
    shell:
        command(
            "build_report",
            "results studies samples figures losses distributions claims pareto lines residual_error allocations"
            " decisions",
            verify="comparisons",
        )
