# Once per model: its canonical form, its corpora as windows of tokens, its calibration statistics. The first two need the network, which compute
# nodes often lack, and stay with the driver.


rule fetch_model:
    output:
        folder=directory(PLAN.pattern("fetch_model", "folder")),
        digest=PLAN.digest("fetch_model"),
    log:
        f"{RESULTS}/logs/fetch_model/{{model}}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/fetch_model/{{model}}/{{key}}.tsv"
    cache: CACHE
    localrule: True
    conda:
        ENVIRONMENT
    resources:
        mem_mb=PLAN.memory_mb("fetch_model"),
        runtime=runtime("fetch_model"),
    params:
        spec=PLAN.spec("fetch_model"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py fetch_model --spec {params.spec:q} --folder {output.folder:q} > {log:q} 2>&1'


rule tokenize_corpus:
    input:
        unpack(PLAN.inputs("tokenize_corpus")),
    output:
        windows=PLAN.pattern("tokenize_corpus", "windows"),
        digest=PLAN.digest("tokenize_corpus"),
    log:
        f"{RESULTS}/logs/tokenize_corpus/{{model}}/{{corpus}}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/tokenize_corpus/{{model}}/{{corpus}}/{{key}}.tsv"
    cache: CACHE
    localrule: True
    conda:
        ENVIRONMENT
    resources:
        mem_mb=PLAN.memory_mb("tokenize_corpus"),
        runtime=runtime("tokenize_corpus"),
    params:
        spec=PLAN.spec("tokenize_corpus"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py tokenize_corpus --spec {params.spec:q} --model {input.model:q} --windows {output.windows:q} > {log:q} 2>&1'


rule calibrate_model:
    input:
        unpack(PLAN.inputs("calibrate_model")),
    output:
        statistics=PLAN.pattern("calibrate_model", "statistics"),
        digest=PLAN.digest("calibrate_model"),
    log:
        f"{RESULTS}/logs/calibrate_model/{{model}}/{{calibration}}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/calibrate_model/{{model}}/{{calibration}}/{{key}}.tsv"
    cache: CACHE
    conda:
        ENVIRONMENT
    threads: PLAN.threads("calibrate_model")
    resources:
        mem_mb=PLAN.memory_mb("calibrate_model"),
        runtime=runtime("calibrate_model"),
    params:
        spec=PLAN.spec("calibrate_model"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/run_job.py calibrate_model --spec {params.spec:q} --model {input.model:q} --windows {input.windows:q}'
        " --statistics {output.statistics:q} > {log:q} 2>&1"
