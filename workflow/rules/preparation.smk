# Once per model: its canonical form, its corpora as windows of tokens, its calibration statistics.


rule fetch_model:
    output:
        folder=directory(PLAN.pattern("fetch_model", "folder")),
    log:
        f"{RESULTS}/logs/fetch_model/{{model}}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/fetch_model/{{model}}/{{key}}.tsv"
    conda:
        "../../envs/cpu.yaml"
    resources:
        mem_mb=lambda w, attempt: 4000 * attempt,
    params:
        spec=PLAN.spec("fetch_model"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/fetch_model.py --spec {params.spec:q} --folder {output.folder:q} > {log:q} 2>&1'


rule tokenize_corpus:
    input:
        unpack(PLAN.inputs("tokenize_corpus")),
    output:
        windows=PLAN.pattern("tokenize_corpus", "windows"),
    log:
        f"{RESULTS}/logs/tokenize_corpus/{{model}}/{{corpus}}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/tokenize_corpus/{{model}}/{{corpus}}/{{key}}.tsv"
    conda:
        "../../envs/cpu.yaml"
    params:
        spec=PLAN.spec("tokenize_corpus"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/tokenize_corpus.py --spec {params.spec:q} --model {input.model:q} --windows {output.windows:q} > {log:q} 2>&1'


rule calibrate_model:
    input:
        unpack(PLAN.inputs("calibrate_model")),
    output:
        statistics=PLAN.pattern("calibrate_model", "statistics"),
    log:
        f"{RESULTS}/logs/calibrate_model/{{model}}/{{calibration}}/{{key}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/calibrate_model/{{model}}/{{calibration}}/{{key}}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=lambda w, attempt: 4000 * attempt,
    params:
        spec=PLAN.spec("calibrate_model"),
    shell:
        'python "$QUANTGRID_SCRIPTS"/calibrate_model.py --spec {params.spec:q} --model {input.model:q} --windows {input.windows:q}'
        " --statistics {output.statistics:q} > {log:q} 2>&1"
