# Races of studies with `race`: the first look of each candidate, and a decision per look. A decision
# determines which shards the next look needs, so it is a checkpoint of Snakemake. Its jobs are the
# only ones that no dry run lists in advance.


rule screen_cell:
    """First look of a race at one candidate: quantized and evaluated in one job, without its checkpoint."""
    input:
        unpack(inputs_of_cell("screen_cell")),
    output:
        result=f"{RESULTS}/evaluations/{CELL}/screened/{{corpus}}/{{shard}}/{{key}}.json",
        error=f"{RESULTS}/evaluations/{CELL}/screening/{{corpus}}/{{shard}}/{{key}}.json",
        digest=f"{RESULTS}/digests/screen_cell/{CELL}/{{corpus}}/{{shard}}/{{key}}.json",
    log:
        **PLAN.logs("screen_cell"),
    conda:
        ENVIRONMENT
    threads: max(map(PLAN.threads, ("quantize_model", "evaluate_perplexity")))
    resources:
        **limits("screen_cell"),
    params:
        spec=PLAN.spec("screen_cell"),
        transform="{transform}",
        granularity="{granularity}",
        format="{format}",
    shell:
        command(
            "screen_cell",
            "model transform statistics windows allocation evaluated reference",
            verify="baseline_check gates",
        )


checkpoint decide_race:
    """Decision of one look of a race: the candidates that stay, and why the others leave."""
    input:
        unpack(decision_inputs),
    output:
        decision=f"{RESULTS}/races/{{study}}/{{model}}/{{look}}/{{key}}.json",
        digest=f"{RESULTS}/digests/decide_race/{{study}}/{{model}}/{{look}}/{{key}}.json",
    log:
        **PLAN.logs("decide_race"),
    priority: 20  # checkpoints stay on disk until the last decision
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.decision_spec,
    shell:
        command("decide_race", "previous")
