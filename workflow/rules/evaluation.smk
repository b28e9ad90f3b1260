# Per (model, corpus, shard): the output of the unmodified model. Per model: its baseline check.
# Per cell: perplexity and divergence in shards of windows, residual-stream error, and zero-shot tasks.


rule evaluate_reference:
    """Final hidden states of the unmodified model on windows of a corpus, the reference for every cell of the model."""
    input:
        unpack(PLAN.inputs("evaluate_reference")),
    output:
        reference=f"{RESULTS}/references/{{model}}/{{corpus}}/{{shard}}/{{key}}.safetensors",
        digest=f"{RESULTS}/digests/evaluate_reference/{{model}}/{{corpus}}/{{shard}}/{{key}}.json",
    log:
        **PLAN.logs("evaluate_reference"),
    priority: 10  # frees the disk space of evaluated checkpoints
    conda:
        ENVIRONMENT
    threads: PLAN.threads("evaluate_reference")
    resources:
        **limits("evaluate_reference"),
    params:
        spec=PLAN.spec("evaluate_reference"),
        batch_size=PLAN.parameter("evaluate_reference", "batch_size"),
    shell:
        command("evaluate_reference", "model windows")


rule check_baseline:
    """Baseline check: calibration and evaluation share no text; perplexity of full precision as published."""
    input:
        unpack(lambda w: CHECKS.inputs(w.model)),
    output:
        result=f"{RESULTS}/checks/{{model}}.json",
        digest=f"{RESULTS}/digests/check_baseline/{{model}}.json",
    log:
        **PLAN.logs("check_baseline"),
    priority: 20  # failures stop the run early
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=lambda w: CHECKS.spec(w.model),
        published=lambda w: list(CHECKS.published(w.model).items()),
    shell:
        command("check_baseline", "calibrations evaluations measured")


rule gate_model:
    """Model gate: the model as quantgrid runs it against transformers' own, on text and random tokens."""
    input:
        unpack(PLAN.inputs("gate_model")),
    output:
        result=f"{RESULTS}/gates/{{model}}/{{key}}.json",
        digest=f"{RESULTS}/digests/gate_model/{{model}}/{{key}}.json",
    log:
        **PLAN.logs("gate_model"),
    priority: 20  # failures stop the run early
    conda:
        ENVIRONMENT
    threads: PLAN.threads("gate_model")
    resources:
        **limits("gate_model"),
    params:
        spec=PLAN.spec("gate_model"),
        layers=PLAN.parameter("gate_model", "layers"),
    shell:
        command("gate_model", "model windows")


rule evaluate_perplexity:
    """Losses of one cell on windows of a corpus, and its KL divergence to full precision, token by token."""
    input:
        unpack(PLAN.inputs("evaluate_perplexity")),
    output:
        result=f"{RESULTS}/evaluations/{CELL}/perplexity/{{corpus}}/{{shard}}/{{key}}.json",
        digest=f"{RESULTS}/digests/evaluate_perplexity/{CELL}/{{corpus}}/{{shard}}/{{key}}.json",
    log:
        **PLAN.logs("evaluate_perplexity"),
    priority: 10  # frees the disk space of evaluated checkpoints
    conda:
        ENVIRONMENT
    threads: PLAN.threads("evaluate_perplexity")
    resources:
        **limits("evaluate_perplexity"),
    params:
        spec=PLAN.spec("evaluate_perplexity"),
        batch_size=PLAN.parameter("evaluate_perplexity", "batch_size"),
    shell:
        command("evaluate_perplexity", "model checkpoint manifest windows reference")


rule merge_shards:
    """Perplexity of one cell on one corpus, and its KL divergence to full precision: the shards in their order."""
    input:
        unpack(PLAN.inputs("merge_shards")),
    output:
        result=f"{RESULTS}/evaluations/{CELL}/perplexity/{{corpus}}/{{key}}.json",
        digest=f"{RESULTS}/digests/merge_shards/{CELL}/{{corpus}}/{{key}}.json",
    log:
        **PLAN.logs("merge_shards"),
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=PLAN.spec("merge_shards"),
    shell:
        command("merge_shards", "shards")


rule measure_residual_error:
    """Relative error of the residual stream after every layer: added by the layer, and propagated."""
    input:
        unpack(PLAN.inputs("measure_residual_error")),
    output:
        result=f"{RESULTS}/evaluations/{CELL}/residual_error/{{corpus}}/{{key}}.json",
        digest=f"{RESULTS}/digests/measure_residual_error/{CELL}/{{corpus}}/{{key}}.json",
    log:
        **PLAN.logs("measure_residual_error"),
    priority: 10  # frees the disk space of evaluated checkpoints
    conda:
        ENVIRONMENT
    threads: PLAN.threads("measure_residual_error")
    resources:
        **limits("measure_residual_error"),
    params:
        spec=PLAN.spec("measure_residual_error"),
        windows=PLAN.parameter("measure_residual_error", "windows"),
    shell:
        command("measure_residual_error", "model transform checkpoint manifest windows")


rule evaluate_tasks:
    """Zero-shot accuracy of one cell on all tasks of its studies, by lm-eval or on local texts."""
    input:
        unpack(PLAN.inputs("evaluate_tasks")),
    output:
        result=f"{RESULTS}/evaluations/{CELL}/tasks/{{key}}.json",
        digest=f"{RESULTS}/digests/evaluate_tasks/{CELL}/{{key}}.json",
    log:
        **PLAN.logs("evaluate_tasks"),
    priority: 10  # frees the disk space of evaluated checkpoints
    conda:
        ENVIRONMENT
    threads: PLAN.threads("evaluate_tasks")
    resources:
        **limits("evaluate_tasks"),
    params:
        spec=PLAN.spec("evaluate_tasks"),
        tasks=PLAN.parameter("evaluate_tasks", "tasks"),
    shell:
        command("evaluate_tasks", "model checkpoint manifest")
