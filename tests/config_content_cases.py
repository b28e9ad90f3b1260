"""Mistakes in the content of a config (paths, contradictions, sources, the report): the edit that
makes one, and the parts of its message, the first of which begins it."""

from __future__ import annotations

from config_cases import SHAPE, TINY, Edit, changed, entry, study

CONTENT_MISTAKES: dict[str, tuple[Edit, list[str]]] = {
    # names that make no path, or that stand for something else
    "slash in a model's name": (
        entry("models", "a/b", {"source": "local", "path": str(TINY)}),
        ["models: 'a/b' is not accepted as a name; expected a text of letters"],
    ),
    "name that is a number": (
        entry("formats", 4, {"preset": "int4"}),
        ["formats: 4 is not accepted as a name", "in quotes"],
    ),
    "dots for a name": (entry("studies", "..", {}), ["studies: '..' is not accepted as a name"]),
    "name of another method": (
        entry("mitigations", "rtn", {"method": "gptq"}),
        ["mitigations.rtn: 'rtn' is the name of a built-in method; rename this entry"],
    ),
    "none that transforms": (
        entry("transforms", "none", {"method": "scaling"}),
        ["transforms.none: 'none' is the name of a built-in method"],
    ),
    "name of another preset": (
        entry("formats", "int4", {"preset": "int8"}),
        ["formats.int4: 'int4' is the name of a built-in preset"],
    ),
    "a preset of other bits": (
        entry("formats", "int4", {"preset": "int4", "activation": None}),
        ["formats.int4: the built-in preset of this name has other bits; rename this entry"],
    ),
    "name of a seeded entry": (
        entry("transforms", "rotation-s1", {"method": "scaling"}),
        ["transforms.rotation.seeds: the name 'rotation-s1' already has an entry"],
    ),
    # what contradicts itself
    "seed without chance": (
        changed("mitigations", "lr8", seed=3),
        ["mitigations.lr8: method 'low_rank' is deterministic", "neither 'seed' nor 'seeds'"],
    ),
    "seeds without chance": (
        changed("transforms", "smooth", seeds=[3]),
        ["transforms.smooth: method 'scaling' is deterministic"],
    ),
    "seed and seeds": (
        changed("transforms", "rotation", seed=3),
        ["transforms.rotation: 'seed' and 'seeds' contradict each other"],
    ),
    "group size that does not divide": (
        study(granularities=["group-128"], models=["hub"]),
        [
            "studies.s: granularity 'group-128' does not divide the 576 inputs of site 'attention_input' of model "
            "'hub'",
            "16, 32, 48, 64, 96, 192",
        ],
    ),
    "block format at another granularity": (
        study(formats=["nvfp4"], granularities=["group-32"]),
        [
            "studies.s: format 'nvfp4' has blocks of 16 by definition, so granularity 'group-32' contradicts it; use "
            "'group-16' or 'native'"
        ],
    ),
    "block format with other blocks": (
        entry("formats", "x", {"preset": "mxfp4", "weight": {"group_size": 16}}),
        ["formats.x.weight: preset 'mxfp4' has blocks of 32 by definition", "int4 or fp4"],
    ),
    "two group sizes of a format": (
        entry("formats", "x", {"preset": "int4", "weight": {"granularity": "group-16", "group_size": 32}}),
        ["formats.x.weight: granularity 'group-16' contradicts group_size 32"],
    ),
    "asymmetric float": (
        entry("formats", "x", {"preset": "fp4", "weight": {"symmetric": False}}),
        ["formats.x.weight: element 'e2m1' is a signed float or a codebook"],
    ),
    "activations that are not rounded": (
        entry("formats", "x", {"preset": "w4a16", "activation": {"element": "int8"}}),
        ["formats.x.activation: preset 'w4a16' leaves activations in full precision"],
    ),
    "format that rounds nothing": (
        entry("formats", "x", {"preset": "int4", "weight": None, "activation": None}),
        ["formats.x: rounds neither", "'bf16'"],
    ),
    "bf16 as an entry": (
        entry("formats", "bf16", {"preset": "bf16"}),
        ["formats.bf16: rounds neither weights nor activations"],
    ),
    "quantized without a mitigation": (
        study(mitigations=["none"]),
        ["studies.s: mitigation 'none' with format 'int4'; a quantized format takes one of "],
    ),
    "rotation without its matrix": (
        lambda c: (c["models"]["hub"]["shape"].update(head_dim=92), study(models=["hub"], transforms=["rotation"])(c)),
        ["studies.s: transform 'rotation-s0' needs a Hadamard matrix of order 92 (head_dim of model 'hub')"],
    ),
    "empty study": (
        study(exclude=[{"model": "tiny"}]),
        ["studies.s: the study has no cells; give each of models, transforms"],
    ),
    "study without an axis": (
        lambda c: c["studies"]["s"].pop("formats"),
        ["studies.s: the study has no cells", "formats at least one value"],
    ),
    "no study": (lambda c: c.update(studies={}), ["studies: {} should be non-empty"]),
    "nothing evaluated": (
        lambda c: c.pop("evaluate"),
        ["studies.s: nothing is evaluated; name a corpus in evaluate.perplexity or a task in evaluate.tasks"],
    ),
    "nothing evaluated in one study": (study(evaluate={"perplexity": []}), ["studies.s: nothing is evaluated"]),
    "metric that is not measured": (
        study(table={"metrics": ["accuracy"]}),
        ["studies.s.table: metric 'accuracy' is not measured in this study; name a task in evaluate.tasks"],
    ),
    "dataset of another metric": (
        study(evaluate={"tasks": ["cloze"]}, table={"metrics": ["perplexity"], "datasets": ["cloze"]}),
        ["studies.s.table.datasets: metric 'perplexity' is measured on none of cloze. Accepted: docs"],
    ),
    "figure of two datasets": (
        lambda c: c["evaluate"].update(perplexity=["docs", "other"]),
        ["studies.s.figure.dataset: metric 'kl_divergence' is measured on several; name one of docs, other"],
    ),
    "axis twice in a table": (
        study(table={"rows": ["format"], "columns": ["format"]}),
        ["studies.s.table: axis 'format' is named twice", "rows or columns"],
    ),
    "axis twice in a figure": (
        study(figure={"x": "format", "hue": "format"}),
        ["studies.s.figure: axis 'format' is named twice"],
    ),
    # what the report shows
    "distribution of an unknown transform": (
        lambda c: c.update(report={"distributions": ["smoth"]}),
        ["report.distributions: unknown transform 'smoth' - did you mean 'smooth'?", "none", "rotation"],
    ),
    "distribution of a transform without a cell": (
        lambda c: c.update(report={"distributions": ["smooth", "rotation"]}),
        ["report.distributions: no study has the transform 'rotation-s0'; add it to one, or leave it out here"],
    ),
    "distributions that are no list": (
        lambda c: c.update(report={"distributions": "smooth"}),
        ["report.distributions: 'smooth' is of the wrong type; expected array"],
    ),
    # what a source needs
    "wheel without its file": (
        entry("models", "w", {"source": "wheel", "package": "a==1"}),
        ["models.w: the keys 'file', 'sha256', 'shape' are missing"],
    ),
    "wheel without a version": (
        entry("models", "w", {"source": "wheel", "package": "a", "file": "f.gguf", "sha256": "0" * 64, "shape": SHAPE}),
        ["models.w.package: 'a' is not accepted; expected name==version"],
    ),
    "checksum that is none": (
        entry(
            "models", "w", {"source": "wheel", "package": "a==1", "file": "f.gguf", "sha256": "0" * 63, "shape": SHAPE}
        ),
        ["models.w.sha256:", "expected 64 hexadecimal digits"],
    ),
    "hub model without a revision": (
        lambda c: c["models"]["hub"].pop("revision"),
        ["models.hub: the key 'revision' is missing"],
    ),
    "hub model with half a shape": (
        lambda c: c["models"]["hub"]["shape"].pop("layers"),
        ["models.hub.shape: the keys layers are missing"],
    ),
    "hub model of experts": (
        lambda c: c["models"]["hub"]["shape"].update(architecture="MixtralForCausalLM"),
        ["models.hub.shape: the keys experts, active_experts, expert_size are missing"],
    ),
    "local model without a path": (
        lambda c: c["models"]["tiny"].pop("path"),
        ["models.tiny: the key 'path' is missing"],
    ),
    "builtin corpus without a part": (
        lambda c: c["corpora"]["docs"].pop("part"),
        ["corpora.docs: the key 'part' is missing"],
    ),
    "hub corpus without a split": (
        entry("corpora", "x", {"source": "hub", "id": "a/b", "window": 64}),
        ["corpora.x: the key 'split' is missing"],
    ),
    "task without its name": (entry("tasks", "x", {"source": "lm_eval"}), ["tasks.x: the key 'task' is missing"]),
    "corpus file that is not there": (
        entry("corpora", "x", {"source": "local", "path": "/none.txt", "window": 8}),
        ["corpora.x.path: /none.txt: no such file"],
    ),
    "task file that is not there": (
        entry("tasks", "x", {"source": "local", "path": "~/none.jsonl"}),
        ["tasks.x.path: ~/none.jsonl: no such file"],
    ),
    "model folder that is not there": (
        changed("models", "tiny", path="/none"),
        ["models.tiny.path: /none: no such folder; a model folder holds config.json"],
    ),
    "model of another shape": (
        changed("models", "tiny", shape={"layers": 4}),
        ["models.tiny.shape: the model differs from its declared shape: layers is 3, declared 4"],
    ),
}
