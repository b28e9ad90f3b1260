# Races of studies with `race`: the first look of each candidate, and a decision per look. A decision
# determines which shards the next look needs, so it is a checkpoint of Snakemake. Its jobs are the
# only ones that no dry run lists in advance.

import json


def decided(race, number):
    """Read the decision of a look, from 0; Snakemake makes it first where it is missing."""
    made = checkpoints.decide_race.get(**PLAN.decide_race(race, number).wildcards).output.decision
    with open(made, encoding="utf-8") as file:
        return json.load(file)


def last_decision(race):
    """Find the decision that ends a race: its path and its content."""
    for number, step in enumerate(PLAN.decisions(race)):
        found = decided(race, number)
        if found["ended"]:
            break
    return step.outputs["decision"], found


def decision_inputs(wildcards):
    """Name the inputs of a decision, which the one before it determines."""
    number = int(wildcards.look) - 1
    race = PLAN.race(wildcards.study, wildcards.model)
    return PLAN.decision_inputs(wildcards, decided(race, number - 1) if number else None)


def finalists(study):
    """List the candidates of a study that its races keep."""
    ends = {race: last_decision(race)[1] for race in PLAN.raced.get(study, ())}
    return [cell for race, end in ends.items() for cell in race.named(end["survivors"])]


def last_decisions(study):
    """List the decisions that end the races of a study."""
    return [last_decision(race)[0] for race in PLAN.raced.get(study, ())]


def evaluations_of(study):
    """List the evaluations of a study; those of a race are known once it has ended."""
    return PLAN.study_inputs(study, finalists(study))


def race_evaluations(wildcards):
    """List the evaluations and decisions of all studies with a race."""
    return [path for study in PLAN.raced for path in (*evaluations_of(study), *last_decisions(study))]


rule screen_cell:
    """First look of a race at one candidate: quantized and evaluated in one job, without its checkpoint."""
    input:
        unpack(PLAN.inputs("screen_cell")),
        baseline_check=ancient(CHECKS.of_cell(CHECKS.pattern)),
        baseline_check_digest=ancient(CHECKS.of_cell(CHECKS.digest)),
        gates=ancient(lambda w: [gate.outputs["result"] for gate in gates_of(w)]),
        gate_digests=ancient(lambda w: [gate.digest for gate in gates_of(w)]),
    output:
        result=f"{RESULTS}/evaluations/{CELL}/screened/{{corpus}}/{{shard}}/{{key}}.json",
        error=f"{RESULTS}/evaluations/{CELL}/screening/{{corpus}}/{{shard}}/{{key}}.json",
        digest=f"{RESULTS}/digests/screen_cell/{CELL}/{{corpus}}/{{shard}}/{{key}}.json",
    log:
        PLAN.log("screen_cell"),
    benchmark:
        PLAN.benchmark("screen_cell")
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
        command("screen_cell", "model transform statistics windows evaluated reference", verify="baseline_check gates")


checkpoint decide_race:
    """Decision of one look of a race: the candidates that stay, and why the others leave."""
    input:
        unpack(decision_inputs),
    output:
        decision=f"{RESULTS}/races/{{study}}/{{model}}/{{look}}/{{key}}.json",
        digest=f"{RESULTS}/digests/decide_race/{{study}}/{{model}}/{{look}}/{{key}}.json",
    log:
        PLAN.log("decide_race"),
    priority: 20  # checkpoints stay on disk until the last decision
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.decision_spec,
    shell:
        command("decide_race", "previous")
