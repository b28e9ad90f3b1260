# Per (cell, target) in `exports` of the config: a folder that other programs load, checked by one of
# them before it appears.


rule export_model:
    """Cell in a format that other programs load, with a card and a check by an independent loader."""
    input:
        unpack(PLAN.inputs("export_model")),
    output:
        folder=directory(f"{RESULTS}/exports/{CELL}/{{to}}/{{key}}"),
        digest=f"{RESULTS}/digests/export_model/{CELL}/{{to}}/{{key}}.json",
    log:
        **PLAN.logs("export_model"),
    priority: 10  # frees the disk space of exported checkpoints
    conda:
        ENVIRONMENT
    threads: PLAN.threads("export_model")
    resources:
        **limits("export_model"),
    params:
        spec=PLAN.spec("export_model"),
        to="{to}",
        flags=PLAN.parameter("export_model", "flags"),
    shell:
        command("export_model", "model checkpoint manifest windows measured baseline")
