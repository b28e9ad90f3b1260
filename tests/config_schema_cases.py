"""Mistakes in keys, names, types and ranges of a config: the edit that makes one, and the parts of
its message, the first of which begins it."""

from __future__ import annotations

from config_cases import Edit, changed, entry, study

SCHEMA_MISTAKES: dict[str, tuple[Edit, list[str]]] = {
    # keys, at every level
    "top-level key": (
        lambda c: c.update(study={}),
        ["config: unknown key 'study' - did you mean 'studies'? Accepted: calibrations, compute, corpora"],
    ),
    "key of compute": (
        lambda c: c.update(compute={"dtypes": "float32"}),
        ["compute: unknown key 'dtypes' - did you mean 'dtype'? Accepted: device, dtype, solver_dtype"],
    ),
    "key of a model": (
        changed("models", "tiny", pathh="x"),
        ["models.tiny: unknown key 'pathh' - did you mean 'path'? Accepted: dequantize, file, id"],
    ),
    "key of a model's shape": (
        lambda c: c["models"]["hub"]["shape"].update(headz=9),
        ["models.hub.shape: unknown key 'headz' - did you mean 'heads'?"],
    ),
    "key of a corpus": (
        changed("corpora", "docs", windw=3),
        ["corpora.docs: unknown key 'windw' - did you mean 'window'? Accepted: add_bos"],
    ),
    "key of a calibration": (
        changed("calibrations", "default", sample=9),
        ["calibrations.default: unknown key 'sample' - did you mean 'samples'?"],
    ),
    "calibration that leaves nothing": (
        changed("calibrations", "default", skip_first=64),
        ["calibrations.default.skip_first: 64 skips all tokens of the windows of 'text' (64 tokens each)"],
    ),
    "tokens left out of a training": (
        lambda c: (changed("calibrations", "default", skip_first=1)(c), study(transforms=["none", "flatquant"])(c)),
        [
            "transforms.flatquant.calibration: 'flatquant' is trained on all tokens of its windows, and calibration "
            "'default' leaves the first ones"
        ],
    ),
    "tokens left out of a mitigation's training": (
        lambda c: (changed("calibrations", "default", skip_first=1)(c), study(mitigations=["qat_finetune"])(c)),
        ["mitigations.qat_finetune.calibration: 'qat_finetune' is trained on all tokens"],
    ),
    "key of a format": (
        changed("formats", "int4-mse", weights={}),
        ["formats.int4-mse: unknown key 'weights' - did you mean 'weight'?"],
    ),
    "key of a scheme": (
        entry("formats", "x", {"preset": "int4", "weight": {"rang": "mse"}}),
        ["formats.x.weight: unknown field", "mean 'range'? Accepted: clip"],
    ),
    "key of a task": (changed("tasks", "cloze", item=3), ["tasks.cloze: unknown key 'item' - did you mean 'items'?"]),
    "key of evaluate": (
        lambda c: c["evaluate"].update(perplexities=["docs"]),
        ["evaluate: unknown key 'perplexities' - did you mean 'perplexity'?"],
    ),
    "word of batch_size": (
        lambda c: c.update(evaluation={"batch_size": "most"}),
        ["evaluation.batch_size: 'most' is not accepted; expected a number, or auto"],
    ),
    "key of evaluation": (
        lambda c: c.update(evaluation={"batchsize": 3}),
        ["evaluation: unknown key 'batchsize' - did you mean 'batch_size'?"],
    ),
    "key of a study": (
        study(model=["tiny"]),
        ["studies.s: unknown key 'model' - did you mean 'models'? Accepted: also"],
    ),
    "key of also": (
        study(also=[{"format": ["int8"]}]),
        ["studies.s.also.0: unknown key 'format' - did you mean 'formats'?"],
    ),
    "key of exclude": (
        study(exclude=[{"formats": "int8"}]),
        ["studies.s.exclude.0: unknown key 'formats' - did you mean 'format'?"],
    ),
    "key of a table": (study(table={"row": ["model"]}), ["studies.s.table: unknown key 'row' - did you mean 'rows'?"]),
    "key of a figure": (
        study(figure={"color": "model"}),
        ["studies.s.figure: unknown key 'color'", "Accepted: dataset, facet, hue, kind"],
    ),
    "old name of a rule": (
        lambda c: c.update(threads={"train_model": 2}),
        ["threads: unknown key 'train_model' - it was renamed to 'train_mitigation'. Accepted: calibrate_model"],
    ),
    "old name of an evaluation": (
        study(evaluate={"depth": ["docs"]}),
        ["studies.s.evaluate: unknown key 'depth' - it was renamed to 'residual_error'. Accepted: perplexity"],
    ),
    "old name of a setting": (
        lambda c: c.update(evaluation={"depth_windows": 2}),
        ["evaluation: unknown key 'depth_windows' - it was renamed to 'residual_error_windows'."],
    ),
    "old name of a metric": (
        study(figure={"metric": "stream_error"}),
        [
            "studies.s.figure.metric: 'stream_error' is not accepted - it was renamed to 'residual_error'. Accepted: "
            "perplexity"
        ],
    ),
    "option of a method": (
        changed("transforms", "smooth", alfa=0.3),
        [
            "transforms.smooth: unknown option 'alfa' - did you mean 'alpha'? Accepted: alpha, division, "
            "points, round_activations, search, sites, statistic"
        ],
    ),
    "option of a method without options": (
        entry("transforms", "r", {"method": "fold_norms", "alpha": 0.5}),
        ["transforms.r: unknown option 'alpha'", "(none)"],
    ),
    # names
    "model of a study": (
        study(models=["tyny"]),
        ["studies.s.models: unknown model 'tyny' - did you mean 'tiny'? Accepted: hub, tiny"],
    ),
    "transform of a study": (
        study(transforms=["smoth"]),
        ["studies.s.transforms: unknown transform 'smoth' - did you mean 'smooth'?"],
    ),
    "mitigation of a study": (
        study(mitigations=["lr9"]),
        ["studies.s.mitigations: unknown mitigation 'lr9' - did you mean 'lr8'?"],
    ),
    "transform among the mitigations": (
        study(mitigations=["AWQ"]),
        ["studies.s.mitigations: 'AWQ' is a transform, not a mitigation"],
    ),
    "mitigation among the formats": (
        study(formats=["gptq"]),
        ["studies.s.formats: 'gptq' is a mitigation, not a format"],
    ),
    "capitals on the axis of the name": (
        study(mitigations=["GPTQ"]),
        ["studies.s.mitigations: unknown mitigation 'GPTQ' - did you mean 'gptq'?"],
    ),
    "granularity of a study": (
        study(granularities=["group64"]),
        ["studies.s.granularities: unknown granularity 'group64'. Accepted: tensor, channel, group-N"],
    ),
    "format of a study": (
        study(formats=["int44"]),
        ["studies.s.formats: unknown format 'int44' - did you mean 'int4'? Accepted: bf16"],
    ),
    "name under also": (
        study(also=[{"formats": ["int8"]}, {"formats": ["nvpf4"]}]),
        ["studies.s.also.1.formats: unknown format 'nvpf4' - did you mean 'nvfp4'?"],
    ),
    "name under exclude": (
        study(exclude=[{"format": ["int8", "int44"]}]),
        ["studies.s.exclude.0.format: unknown format 'int44' - did you mean 'int4'?"],
    ),
    "corpus of evaluate": (
        lambda c: c.update(evaluate={"perplexity": ["dcs"]}),
        ["evaluate.perplexity: unknown corpus 'dcs' - did you mean 'docs'? Accepted: docs, other, text"],
    ),
    "corpus of a study": (
        study(evaluate={"perplexity": ["dcs"]}),
        ["studies.s.evaluate.perplexity: unknown corpus 'dcs'"],
    ),
    "task of a study": (
        study(evaluate={"tasks": ["clozes"]}),
        ["studies.s.evaluate.tasks: unknown task 'clozes' - did you mean 'cloze'?"],
    ),
    "corpus of a calibration": (
        changed("calibrations", "default", corpus="txt"),
        ["calibrations.default.corpus: unknown corpus 'txt' - did you mean 'text'?"],
    ),
    "calibration of a method": (
        changed("mitigations", "lr8", calibration="defalt"),
        ["mitigations.lr8.calibration: unknown calibration 'defalt'", "'default'"],
    ),
    "no default calibration": (
        lambda c: c.update(calibrations={"mine": {"corpus": "text"}}),
        ["calibrations: the key 'default' is missing"],
    ),
    "method of a transform": (
        changed("transforms", "smooth", method="scalling"),
        ["transforms.smooth.method: unknown method 'scalling' - did you mean 'scaling'? Accepted: "],
    ),
    "method of a mitigation": (
        changed("mitigations", "lr8", method="gptqq"),
        ["mitigations.lr8.method: unknown method 'gptqq' - did you mean 'gptq'?"],
    ),
    "method of the other axis": (
        entry("mitigations", "lr8", {"method": "awq"}),
        ["mitigations.lr8.method: 'awq' is a method of transforms, not of mitigations"],
    ),
    "name of settings as a method": (
        entry("transforms", "smooth", {"method": "smoothquant"}),
        ["transforms.smooth.method: 'smoothquant' stands for {method: scaling, alpha: 0.5}"],
    ),
    "preset of a format": (
        changed("formats", "int4-mse", preset="int9"),
        ["formats.int4-mse.preset: unknown preset 'int9'", "Accepted: bf16"],
    ),
    "element of a scheme": (
        entry("formats", "x", {"preset": "fp4", "activation": {"element": "e2m2"}}),
        ["formats.x.activation: unknown element 'e2m2'", "e2m1"],
    ),
    "metric of a table": (
        study(table={"metrics": ["perplexty"]}),
        ["studies.s.table.metrics.0: 'perplexty' is not accepted - did you mean 'perplexity'?"],
    ),
    "metric of a figure": (
        study(figure={"metric": "bits"}),
        ["studies.s.figure.metric: 'bits' is not accepted. Accepted: perplexity, negative_log"],
    ),
    "axis of a table": (
        study(table={"rows": ["formats"]}),
        ["studies.s.table.rows.0: 'formats' is not accepted - did you mean 'format'? Accepted: model, transform"],
    ),
    "axis of a figure": (
        study(figure={"x": "group"}),
        ["studies.s.figure.x: 'group' is not accepted. Accepted: model, transform"],
    ),
    "kind of a figure": (
        study(figure={"kind": "dot"}),
        ["studies.s.figure.kind: 'dot' is not accepted - did you mean 'dots'? Accepted: dots, bars, lines, heatmap"],
    ),
    "dataset of a table": (
        study(table={"datasets": ["dosc"]}),
        ["studies.s.table.datasets: unknown dataset 'dosc' - did you mean 'docs'? Accepted: docs"],
    ),
    "dataset of a figure": (
        study(figure={"dataset": "text"}),
        ["studies.s.figure.dataset: unknown dataset 'text'", "Accepted: docs"],
    ),
    "source of a model": (
        entry("models", "w", {"source": "wheels"}),
        ["models.w.source: 'wheels' is not accepted - did you mean 'wheel'? Accepted: wheel, local, builtin, hub"],
    ),
    "device": (
        lambda c: c.update(compute={"device": "gpu"}),
        ["compute.device: 'gpu' is not accepted", "Accepted: auto, cpu, cuda"],
    ),
    # types and ranges
    "text for a number": (lambda c: c.update(seed="7"), ["seed: '7' is of the wrong type; expected integer"]),
    "truth for a number": (lambda c: c.update(threads=True), ["threads: True is of the wrong type; expected integer"]),
    "number below its range": (lambda c: c.update(threads=0), ["threads: 0 is less than the minimum of 1"]),
    "threads of a rule": (
        lambda c: c.update(threads={"calibrate": 2}),
        ["threads: unknown key 'calibrate' - did you mean 'calibrate_model'?"],
    ),
    "too few threads of a rule": (
        lambda c: c.update(threads={"default": 0}),
        ["threads.default: 0 is less than the minimum of 1"],
    ),
    "name for a list": (study(formats="int4"), ["studies.s.formats: 'int4' is of the wrong type; expected array"]),
    "nothing for a mapping": (
        lambda c: c.update(corpora=None),
        ["corpora: None is of the wrong type; expected object"],
    ),
    "nothing for a study": (entry("studies", "t", None), ["studies.t: None is of the wrong type; expected object"]),
    "mapping for a name": (
        study(exclude=[{"format": [{}]}]),
        ["studies.s.exclude.0.format.0: {} is of the wrong type; expected string"],
    ),
    "list for a field": (
        entry("formats", "x", {"preset": "int4", "weight": {"element": ["int4"]}}),
        ["formats.x.weight.element: ['int4'] is of the wrong type"],
    ),
    "option out of range": (
        changed("transforms", "smooth", alpha=1.5),
        ["transforms.smooth.alpha: 1.5 is out of range; expected a number >= 0.0 <= 1.0"],
    ),
    "option below its range": (
        changed("mitigations", "lr8", rank=-1),
        ["mitigations.lr8.rank: -1 is out of range; expected a whole number >= 0"],
    ),
    "option that is no number": (
        changed("transforms", "smooth", alpha=float("nan")),
        ["transforms.smooth.alpha: nan is out of range"],
    ),
    "infinite option": (
        changed("mitigations", "solved", damping=float("inf")),
        ["mitigations.solved.damping: inf is out of range"],
    ),
    "fraction for a whole number": (
        changed("mitigations", "lr8", rank=8.5),
        ["mitigations.lr8.rank: 8.5 is not accepted; expected a whole number >= 0 or a share between 0 and 1"],
    ),
    "text for a truth": (
        changed("mitigations", "solved", activation_order="yes"),
        ["mitigations.solved.activation_order: 'yes' is not accepted; expected true or false"],
    ),
    "choice of an option": (
        changed("mitigations", "lr8", metric="plane"),
        ["mitigations.lr8.metric: 'plane' is not accepted; expected one of plain, lqer, qera_approx, qera_exact"],
    ),
    "share of more than all": (
        changed("mitigations", "lr8", rank=1.5),
        ["mitigations.lr8.rank: 1.5 is not accepted; expected a whole number >= 0 or a share between 0 and 1"],
    ),
    "GPTAQ from cached statistics": (
        entry("mitigations", "x", {"method": "gptaq", "propagation": "cached"}),
        ["mitigations.x.propagation: 'cached' is not accepted; expected one of sequential"],
    ),
    "GPTAQ as a base from cached statistics": (
        entry("mitigations", "x", {"method": "gptq_low_rank", "base": "gptaq"}),
        [
            "mitigations.x.base: 'gptaq' has no meaning with propagation 'cached'; set propagation to 'sequential', "
            "or leave it out"
        ],
    ),
    "rounded activations without a forward pass": (
        entry("mitigations", "x", {"method": "gptq", "quantized_activations": True}),
        [
            "mitigations.x.quantized_activations: True has no meaning with propagation 'cached'; set propagation to "
            "'sequential'"
        ],
    ),
    "running scales in activation order": (
        entry("mitigations", "x", {"method": "gptq", "scales": "running", "activation_order": True}),
        ["mitigations.x.activation_order: True has no meaning with scales 'running'; set scales to 'static'"],
    ),
    "order of a base that has its own": (
        entry("mitigations", "x", {"method": "gptq_low_rank", "base": "mr_gptq", "activation_order": False}),
        ["mitigations.x.activation_order: False has no meaning with base 'mr_gptq'; set base to 'gptq' or 'gptaq'"],
    ),
    "damping of a base without one": (
        entry("mitigations", "x", {"method": "low_rank_first", "damping": 0.1}),
        ["mitigations.x.damping: 0.1 has no meaning with base 'rtn'; set base to 'gptq' or 'mr_gptq' or 'gptaq'"],
    ),
    "propagation of what reads no statistics": (
        entry("mitigations", "x", {"method": "rtn", "propagation": "sequential"}),
        ["mitigations.x: unknown option 'propagation'"],
    ),
    "metric that has no diagonal": (
        entry("mitigations", "x", {"method": "sparse_outliers", "metric": "qera_exact"}),
        ["mitigations.x.metric: 'qera_exact' is not accepted; expected one of plain, lqer, qera_approx"],
    ),
    "site of an option": (
        changed("transforms", "smooth", sites=["attention"]),
        ["transforms.smooth.sites: ['attention'] is not accepted; expected a list of attention_input"],
    ),
    "scheme out of range": (
        entry("formats", "x", {"preset": "int4", "weight": {"clip_ratio": 2}}),
        ["formats.x.weight: clip_ratio is 2: a number above 0 and at most 1"],
    ),
    "name given twice": (
        study(formats=["int4", "int4"]),
        ["studies.s.formats: ['int4', 'int4'] has non-unique elements"],
    ),
}
