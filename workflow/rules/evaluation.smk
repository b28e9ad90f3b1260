# Per (model, corpus): the unmodified model's output. Per cell: perplexity and divergence, and zero-shot tasks.


rule evaluate_reference:
    input:
        unpack(PLAN.inputs("evaluate_reference")),
    output:
        reference=PLAN.pattern("evaluate_reference", "reference"),
    log:
        f"{RESULTS}/logs/evaluate_reference/{{model}}/{{corpus}}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate_reference/{{model}}/{{corpus}}/{{key}}.tsv"
    priority: 10  # evaluated checkpoints free their space
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=lambda w, attempt: 4000 * attempt,
    params:
        spec=PLAN.spec("evaluate_reference"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/evaluate_reference.py --spec {params.spec:q} --model {input.model:q} --windows {input.windows:q}'
        " --reference {output.reference:q} > {log:q} 2>&1"


rule evaluate_perplexity:
    input:
        unpack(PLAN.inputs("evaluate_perplexity")),
    output:
        result=PLAN.pattern("evaluate_perplexity", "result"),
    log:
        f"{RESULTS}/logs/evaluate_perplexity/{CELL}/{{corpus}}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate_perplexity/{CELL}/{{corpus}}/{{key}}.tsv"
    priority: 10  # evaluated checkpoints free their space
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=lambda w, attempt: 4000 * attempt,
    params:
        spec=PLAN.spec("evaluate_perplexity"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/evaluate_perplexity.py --spec {params.spec:q} --model {input.model:q} --checkpoint {input.checkpoint:q}'
        " --manifest {input.manifest:q} --windows {input.windows:q} --reference {input.reference:q} --result {output.result:q} > {log:q} 2>&1"


rule evaluate_tasks:
    input:
        unpack(PLAN.inputs("evaluate_tasks")),
    output:
        result=PLAN.pattern("evaluate_tasks", "result"),
    log:
        f"{RESULTS}/logs/evaluate_tasks/{CELL}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate_tasks/{CELL}/{{key}}.tsv"
    priority: 10  # evaluated checkpoints free their space
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=lambda w, attempt: 4000 * attempt,
    params:
        spec=PLAN.spec("evaluate_tasks"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/evaluate_tasks.py --spec {params.spec:q} --model {input.model:q} --checkpoint {input.checkpoint:q}'
        " --manifest {input.manifest:q} --result {output.result:q} > {log:q} 2>&1"
