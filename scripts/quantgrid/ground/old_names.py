"""Former names: of config keys and values (``errors.unknown_name`` reports the new name), and of
studies in the configs of the repository (``study_mistakes.require_study``)."""

OLD_NAMES = {
    # rules, as keys of `threads`
    "describe_transform": "measure_distributions",
    "train_model": "train_mitigation",
    "measure_depth": "measure_residual_error",
    # mitigations
    "finetune_blocks": "tune_scales",
    "qat": "qat_finetune",
    # keys of `evaluate` and `evaluation`, and a metric
    "depth": "residual_error",
    "depth_windows": "residual_error_windows",
    "stream_error": "residual_error",
}

OLD_STUDIES = {
    "depth": "residual-error-by-layer",
    "finish": "trained-mitigations",
    "gptq-depth": "gptq-residual-error",
}
