# Per (model, transform): the transform's parameters and, of a learned one, the losses of its training (an empty table of any other); what it makes
# of inputs and weights, where figures show that. Per cell: the packed checkpoint and the errors of its layers, and the losses where its
# mitigation trains.


rule fit_transform:
    input:
        unpack(PLAN.inputs("fit_transform")),
    output:
        transform=PLAN.pattern("fit_transform", "transform"),
        losses=PLAN.pattern("fit_transform", "losses"),
        digest=PLAN.digest("fit_transform"),
    log:
        f"{RESULTS}/logs/fit_transform/{{model}}/{{transform}}/{{target}}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/fit_transform/{{model}}/{{transform}}/{{target}}/{{key}}.tsv"
    cache: CACHE
    conda:
        ENVIRONMENT
    threads: PLAN.threads("fit_transform")
    resources:
        mem_mb=PLAN.memory_mb("fit_transform"),
        runtime=runtime("fit_transform"),
    params:
        spec=PLAN.spec("fit_transform"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py fit_transform --spec {params.spec:q} --model {input.model:q} --statistics {input.statistics:q}'
        " --windows {input.windows:q} --transform {output.transform:q} --losses {output.losses:q} > {log:q} 2>&1"


rule describe_transform:
    input:
        unpack(PLAN.inputs("describe_transform")),
    output:
        distribution=PLAN.pattern("describe_transform", "distribution"),
        digest=PLAN.digest("describe_transform"),
    log:
        f"{RESULTS}/logs/describe_transform/{{model}}/{{transform}}/{{target}}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/describe_transform/{{model}}/{{transform}}/{{target}}/{{key}}.tsv"
    conda:
        ENVIRONMENT
    threads: PLAN.threads("describe_transform")
    resources:
        mem_mb=PLAN.memory_mb("describe_transform"),
        runtime=runtime("describe_transform"),
    params:
        spec=PLAN.spec("describe_transform"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py describe_transform --spec {params.spec:q} --model {input.model:q} --transform {input.transform:q}'
        " --statistics {input.statistics:q} --distribution {output.distribution:q} > {log:q} 2>&1"


rule quantize_model:
    input:
        unpack(PLAN.inputs("quantize_model")),
        gate=ancient(GATES.of_cell(GATES.pattern)),  # decides whether, not what: a new one reruns nothing
        gate_digest=ancient(GATES.of_cell(GATES.digest)),
    output:
        checkpoint=(str if KEEP else temp)(PLAN.pattern("quantize_model", "checkpoint")),
        manifest=PLAN.pattern("quantize_model", "manifest"),
        error=PLAN.pattern("quantize_model", "error"),
        digest=PLAN.digest("quantize_model"),
    log:
        f"{RESULTS}/logs/quantize_model/{CELL}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/quantize_model/{CELL}/{{key}}.tsv"
    conda:
        ENVIRONMENT
    threads: PLAN.threads("quantize_model")
    resources:
        mem_mb=PLAN.memory_mb("quantize_model"),
        runtime=runtime("quantize_model"),
    params:
        spec=PLAN.spec("quantize_model"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py quantize_model --spec {params.spec:q} --model {input.model:q} --transform {input.transform:q}'
        " --statistics {input.statistics:q} --windows {input.windows:q} --gate {input.gate:q}"
        " --checkpoint {output.checkpoint:q} --manifest {output.manifest:q} --error {output.error:q}"
        " > {log:q} 2>&1"


rule train_model:
    input:
        unpack(PLAN.inputs("train_model")),
        gate=ancient(GATES.of_cell(GATES.pattern)),
        gate_digest=ancient(GATES.of_cell(GATES.digest)),
    output:
        checkpoint=(str if KEEP else temp)(PLAN.pattern("train_model", "checkpoint")),
        manifest=PLAN.pattern("train_model", "manifest"),
        losses=PLAN.pattern("train_model", "losses"),
        error=PLAN.pattern("train_model", "error"),
        digest=PLAN.digest("train_model"),
    log:
        f"{RESULTS}/logs/train_model/{CELL}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/train_model/{CELL}/{{key}}.tsv"
    conda:
        ENVIRONMENT
    threads: PLAN.threads("train_model")
    resources:
        mem_mb=PLAN.memory_mb("train_model"),
        runtime=runtime("train_model"),
    params:
        spec=PLAN.spec("train_model"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py train_model --spec {params.spec:q} --model {input.model:q} --transform {input.transform:q}'
        " --statistics {input.statistics:q} --windows {input.windows:q} --gate {input.gate:q}"
        " --checkpoint {output.checkpoint:q} --manifest {output.manifest:q} --losses {output.losses:q} --error {output.error:q}"
        " > {log:q} 2>&1"
