# Per (model, corpus): the unmodified model's output. Per cell: perplexity and divergence, the error over depth, and zero-shot tasks.


rule evaluate_reference:
    input:
        unpack(PLAN.inputs("evaluate_reference")),
    output:
        reference=PLAN.pattern("evaluate_reference", "reference"),
        digest=PLAN.digest("evaluate_reference"),
    log:
        f"{RESULTS}/logs/evaluate_reference/{{model}}/{{corpus}}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate_reference/{{model}}/{{corpus}}/{{key}}.tsv"
    priority: 10  # evaluated checkpoints free their space
    conda:
        ENVIRONMENT
    threads: PLAN.threads("evaluate_reference")
    resources:
        mem_mb=PLAN.memory_mb("evaluate_reference"),
        runtime=runtime("evaluate_reference"),
    params:
        spec=PLAN.spec("evaluate_reference"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py evaluate_reference --spec {params.spec:q} --model {input.model:q} --windows {input.windows:q}'
        " --reference {output.reference:q} > {log:q} 2>&1"


rule check_model:
    input:
        unpack(lambda w: GATES.inputs(w.model)),
    output:
        result=GATES.pattern,
        digest=PLAN.digest("check_model"),
    log:
        f"{RESULTS}/logs/check_model/{{model}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/check_model/{{model}}.tsv"
    priority: 20  # what it refuses is better refused early
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=lambda w: GATES.spec(w.model),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py check_model --spec {params.spec:q} --calibrations {input.calibrations:q}'
        " --evaluations {input.evaluations:q} --measured {input.measured:q} --result {output.result:q} > {log:q} 2>&1"


rule evaluate_perplexity:
    input:
        unpack(PLAN.inputs("evaluate_perplexity")),
    output:
        result=PLAN.pattern("evaluate_perplexity", "result"),
        digest=PLAN.digest("evaluate_perplexity"),
    log:
        f"{RESULTS}/logs/evaluate_perplexity/{CELL}/{{corpus}}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate_perplexity/{CELL}/{{corpus}}/{{key}}.tsv"
    priority: 10  # evaluated checkpoints free their space
    conda:
        ENVIRONMENT
    threads: PLAN.threads("evaluate_perplexity")
    resources:
        mem_mb=PLAN.memory_mb("evaluate_perplexity"),
        runtime=runtime("evaluate_perplexity"),
    params:
        spec=PLAN.spec("evaluate_perplexity"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py evaluate_perplexity --spec {params.spec:q} --model {input.model:q} --checkpoint {input.checkpoint:q}'
        " --manifest {input.manifest:q} --windows {input.windows:q} --reference {input.reference:q} --result {output.result:q} > {log:q} 2>&1"


rule measure_depth:
    input:
        unpack(PLAN.inputs("measure_depth")),
    output:
        result=PLAN.pattern("measure_depth", "result"),
        digest=PLAN.digest("measure_depth"),
    log:
        f"{RESULTS}/logs/measure_depth/{CELL}/{{corpus}}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/measure_depth/{CELL}/{{corpus}}/{{key}}.tsv"
    priority: 10  # evaluated checkpoints free their space
    conda:
        ENVIRONMENT
    threads: PLAN.threads("measure_depth")
    resources:
        mem_mb=PLAN.memory_mb("measure_depth"),
        runtime=runtime("measure_depth"),
    params:
        spec=PLAN.spec("measure_depth"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py measure_depth --spec {params.spec:q} --model {input.model:q} --transform {input.transform:q}'
        " --checkpoint {input.checkpoint:q} --manifest {input.manifest:q} --windows {input.windows:q} --result {output.result:q} > {log:q} 2>&1"


rule evaluate_tasks:
    input:
        unpack(PLAN.inputs("evaluate_tasks")),
    output:
        result=PLAN.pattern("evaluate_tasks", "result"),
        digest=PLAN.digest("evaluate_tasks"),
    log:
        f"{RESULTS}/logs/evaluate_tasks/{CELL}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate_tasks/{CELL}/{{key}}.tsv"
    priority: 10  # evaluated checkpoints free their space
    conda:
        ENVIRONMENT
    threads: PLAN.threads("evaluate_tasks")
    resources:
        mem_mb=PLAN.memory_mb("evaluate_tasks"),
        runtime=runtime("evaluate_tasks"),
    params:
        spec=PLAN.spec("evaluate_tasks"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py evaluate_tasks --spec {params.spec:q} --model {input.model:q} --checkpoint {input.checkpoint:q}'
        " --manifest {input.manifest:q} --result {output.result:q} > {log:q} 2>&1"
