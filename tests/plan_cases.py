"""A config with every kind of step, and its plan, for the tests of keys and paths."""

from __future__ import annotations

from typing import Any

from quantgrid.config import check
from quantgrid.pipeline import Plan

TINY = "tests/data/tiny-llama"
SHAPE = {"architecture": "LlamaForCausalLM", "hidden_size": 576, "intermediate_size": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64,
         "vocabulary": 49152}


def content() -> dict[str, Any]:
    """A config of two studies on one model: every kind of step, two corpora, two calibrations, two tasks."""
    common = {"models": ["tiny"], "granularities": ["channel"]}
    return {
        "seed": 3, "compute": {"device": "cpu", "dtype": "float32"},
        "models": {"tiny": {"source": "local", "path": TINY}, "big": {"source": "hub", "id": "a/b", "revision": "main", "shape": dict(SHAPE)}},
        "corpora": {"text": {"source": "builtin", "part": "calibration", "window": 64, "windows": 24},
                    "short": {"source": "builtin", "part": "calibration", "window": 32, "windows": 24},
                    "docs": {"source": "builtin", "part": "evaluation", "window": 64, "windows": 4},
                    "more": {"source": "builtin", "part": "evaluation", "window": 32, "windows": 4}},
        "calibrations": {"default": {"corpus": "text"}, "other": {"corpus": "short"}},
        "transforms": {"smooth": {"method": "scaling", "alpha": 0.5}, "rotation": {"method": "random_hadamard", "seeds": [0, 1]},
                       "turn": {"method": "random_hadamard"}},
        "mitigations": {"lr8": {"method": "low_rank", "rank": 8}, "solved": {"method": "gptq", "damping": 0.01, "calibration": "other"},
                        "tuned": {"method": "finetune_blocks", "steps": 3}},
        "formats": {"int4-mse": {"preset": "int4", "weight": {"range": "mse"}}},
        "tasks": {"cloze": {"source": "builtin", "kind": "cloze", "items": 8}, "true": {"source": "builtin", "kind": "continuation", "items": 8}},
        "evaluate": {"perplexity": ["docs"]},
        "report": {"distributions": ["smooth", "turn"]},
        "studies": {
            "methods": {**common, "transforms": ["none", "smooth", "rotation", "turn"], "mitigations": ["rtn", "lr8", "solved"], "formats": ["int4"],
                        "also": [{"formats": ["bf16"]}], "exclude": [{"transform": "turn", "mitigation": "solved"}]},
            "formats": {**common, "transforms": ["none"], "mitigations": ["rtn"], "formats": ["int4", "int4-mse"], "title": "Formats",
                        "also": [{"mitigations": ["tuned"], "formats": ["int4"]}],
                        "evaluate": {"perplexity": ["docs", "more"], "tasks": ["cloze", "true"], "depth": ["docs"]}, "figure": {"dataset": "docs"}},
        },
    }


def plan(config: dict[str, Any]) -> Plan:
    made = Plan(check(config))
    made.all_evaluations()
    made.distributions()
    return made
