# Inputs that races determine: decisions, and the evaluations of the recipes that they keep.

import json


def decided(step):
    """Read the decision of a step; Snakemake makes it first where it is missing."""
    made = checkpoints.decide_race.get(**step.wildcards).output.decision
    with open(made, encoding="utf-8") as file:
        return json.load(file)


def last_decision(race):
    """Find the decision that ends a race: its path and its content."""
    for step in PLAN.decisions(race):
        found = decided(step)
        if found["ended"]:
            break
    return step.outputs["decision"], found


def decision_inputs(wildcards):
    """Name the inputs of a decision, which the one before it determines."""
    number = int(wildcards.look) - 1
    race = PLAN.race(wildcards.study, wildcards.model)
    before = decided(PLAN.decide_race(race, number - 1)) if number > race.first else None
    return PLAN.decision_inputs(wildcards, before)


def ends(study):
    """Read the decisions that end the races of a study."""
    return [last_decision(race)[1] for race in PLAN.raced.get(study, ())]


def last_decisions(study):
    """List the decisions that end the races of a study."""
    return [last_decision(race)[0] for race in PLAN.raced.get(study, ())]


def evaluations_of(study):
    """List the evaluations of a study; those of a race are known once it has ended."""
    return PLAN.study_inputs(study, ends(study))


def residual_errors(wildcards):
    """List the measurements of the residual error; those of a race are known once it has ended."""
    return PLAN.residual_errors({study: ends(study) for study in PLAN.raced})


def race_evaluations(wildcards):
    """List the evaluations and decisions of all studies with a race."""
    return [path for study in PLAN.raced for path in (*evaluations_of(study), *last_decisions(study))]
