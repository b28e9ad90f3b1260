# The two steps of arXiv 2507.17417 (Table I). Per (model, transform): the
# pre-quantization transformation, and the resulting distributions if figures show them. Per cell:
# quantization with error mitigation.


rule fit_transform:
    """Pre-quantization transformation (step 1 of arXiv 2507.17417): fitted or learned parameters."""
    input:
        unpack(PLAN.inputs("fit_transform")),
    output:
        transform=f"{RESULTS}/transforms/{{model}}/{{transform}}/{{target}}/{{key}}/transform.safetensors",
        losses=f"{RESULTS}/transforms/{{model}}/{{transform}}/{{target}}/{{key}}/losses.csv",
        digest=f"{RESULTS}/digests/fit_transform/{{model}}/{{transform}}/{{target}}/{{key}}.json",
    log:
        **PLAN.logs("fit_transform"),
    cache: CACHE
    conda:
        ENVIRONMENT
    threads: PLAN.threads("fit_transform")
    resources:
        **limits("fit_transform"),
    params:
        spec=PLAN.spec("fit_transform"),
        transform=PLAN.parameter("fit_transform", "transform"),
    shell:
        command("fit_transform", "model statistics windows")


rule gate_transform:
    """Transform gate: the transformed, unrounded model against the model, on text and random tokens."""
    input:
        unpack(PLAN.inputs("gate_transform")),
    output:
        result=f"{RESULTS}/gates/{{model}}/{{transform}}/{{target}}/{{key}}.json",
        digest=f"{RESULTS}/digests/gate_transform/{{model}}/{{transform}}/{{target}}/{{key}}.json",
    log:
        **PLAN.logs("gate_transform"),
    priority: 20  # failures stop the run early
    conda:
        ENVIRONMENT
    threads: PLAN.threads("gate_transform")
    resources:
        **limits("gate_transform"),
    params:
        spec=PLAN.spec("gate_transform"),
    shell:
        command("gate_transform", "model transform windows")


rule measure_distributions:
    """Magnitudes, kurtosis and ranges of inputs and weights of all linears, transformed, not rounded."""
    input:
        unpack(PLAN.inputs("measure_distributions")),
    output:
        distribution=f"{RESULTS}/distributions/{{model}}/{{transform}}/{{target}}/{{key}}.json",
        digest=f"{RESULTS}/digests/measure_distributions/{{model}}/{{transform}}/{{target}}/{{key}}.json",
    log:
        **PLAN.logs("measure_distributions"),
    conda:
        ENVIRONMENT
    threads: PLAN.threads("measure_distributions")
    resources:
        **limits("measure_distributions"),
    params:
        spec=PLAN.spec("measure_distributions"),
        transform="{transform}",
    shell:
        command("measure_distributions", "model transform statistics")


rule measure_schemes:
    """Output error of every linear under every candidate scheme of an allocation, on held-out statistics."""
    input:
        unpack(PLAN.inputs("measure_schemes")),
    output:
        errors=f"{RESULTS}/schemes/{{model}}/{{transform}}/{{mitigation}}/{{key}}.json",
        digest=f"{RESULTS}/digests/measure_schemes/{{model}}/{{transform}}/{{mitigation}}/{{key}}.json",
    log:
        **PLAN.logs("measure_schemes"),
    conda:
        ENVIRONMENT
    threads: PLAN.threads("measure_schemes")
    resources:
        **limits("measure_schemes"),
    params:
        spec=PLAN.spec("measure_schemes"),
        transform="{transform}",
        mitigation=PLAN.parameter("measure_schemes", "mitigation"),
    shell:
        command("measure_schemes", "model transform statistics held_out")


rule allocate_bits:
    """One scheme for every group of linears: the smallest predicted divergence within a number of stored bits."""
    input:
        unpack(PLAN.inputs("allocate_bits")),
    output:
        allocation=f"{RESULTS}/allocations/{{model}}/{{transform}}/{{mitigation}}/{{format}}/{{key}}.json",
        digest=f"{RESULTS}/digests/allocate_bits/{{model}}/{{transform}}/{{mitigation}}/{{format}}/{{key}}.json",
    log:
        **PLAN.logs("allocate_bits"),
    localrule: True
    conda:
        ENVIRONMENT
    resources:
        **limits("allocate_bits"),
    params:
        spec=PLAN.spec("allocate_bits"),
        allocate=PLAN.parameter("allocate_bits", "allocate"),
    shell:
        command("allocate_bits", "model sensitivities errors")


rule quantize_model:
    """Quantization error mitigation (step 2 of arXiv 2507.17417): transform folded, every linear rounded."""
    input:
        unpack(inputs_of_cell("quantize_model")),
    output:
        checkpoint=packed(f"{RESULTS}/quantized/{CELL}/{{key}}/model.safetensors"),
        manifest=f"{RESULTS}/quantized/{CELL}/{{key}}/quantgrid.json",
        error=f"{RESULTS}/evaluations/{CELL}/error/{{key}}.json",
        digest=f"{RESULTS}/digests/quantize_model/{CELL}/{{key}}.json",
    log:
        **PLAN.logs("quantize_model"),
    conda:
        ENVIRONMENT
    threads: PLAN.threads("quantize_model")
    resources:
        **limits("quantize_model"),
    params:
        spec=PLAN.spec("quantize_model"),
        transform="{transform}",
        mitigation=PLAN.parameter("quantize_model", "mitigation"),
        granularity="{granularity}",
        format="{format}",
    shell:
        command("quantize_model", "model transform statistics windows allocation", verify="baseline_check gates")


rule train_mitigation:
    """Quantization error mitigation by training (step 2 of arXiv 2507.17417): scales or weights; resumable."""
    input:
        unpack(inputs_of_cell("train_mitigation")),
    output:
        checkpoint=packed(f"{RESULTS}/trained/{CELL}/{{key}}/model.safetensors"),
        manifest=f"{RESULTS}/trained/{CELL}/{{key}}/quantgrid.json",
        losses=f"{RESULTS}/trained/{CELL}/{{key}}/losses.csv",
        error=f"{RESULTS}/evaluations/{CELL}/training/{{key}}.json",
        digest=f"{RESULTS}/digests/train_mitigation/{CELL}/{{key}}.json",
    log:
        **PLAN.logs("train_mitigation"),
    conda:
        ENVIRONMENT
    threads: PLAN.threads("train_mitigation")
    resources:
        **limits("train_mitigation"),
    params:
        spec=PLAN.spec("train_mitigation"),
        transform="{transform}",
        mitigation=PLAN.parameter("train_mitigation", "mitigation"),
        granularity="{granularity}",
        format="{format}",
    shell:
        command("train_mitigation", "model transform statistics windows sensitivities", verify="baseline_check gates")
