"""Serving commands of docs/how-to/deploy.md: those of tests and cards, one for every program that loads an export."""

from __future__ import annotations

import re

import yaml

from checkouts import ROOT
from export_cases import TRANSFORMERS_SERVE, UNTIL_INPUT_ENDS
from quantgrid.config import check, read
from quantgrid.config.exports import exports
from quantgrid.config.grid import expand_studies
from quantgrid.exports.gguf_check import LOADER

TEXT = (ROOT / "docs" / "how-to" / "deploy.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_commands_are_those_that_the_tests_run():
    assert any(block.endswith(LOADER + UNTIL_INPUT_ENDS) for block in blocks("python"))
    words = TRANSFORMERS_SERVE.format(folder="smollm2-w4", port=8000)
    assert any(f"transformers {words}\n" in block for block in blocks("sh"))


def test_every_program_of_the_table_of_targets_has_a_command_and_the_others_are_marked():
    run, others = TEXT.split("not run here:", 1)
    others = others.split("```", 2)[1]
    for program, command in {"vLLM": "vllm", "SGLang": "sglang", "Ollama": "ollama"}.items():
        assert program in run and re.search(rf"\b{command}\b", others) and f"{command} serve" not in run
    assert "vllm serve smollm2-w4\n" in others, "as on the card"


def test_flags_of_the_config_are_accepted():
    """The entry with flags in the docs, on a model of this size."""
    [entry] = [entry for block in blocks("yaml") for entry in yaml.safe_load(block)["exports"] if "flags" in entry]
    transform, mitigation, granularity, format = entry["cell"].split("/")
    transforms = read(ROOT / "config" / "transforms.yaml")["transforms"]
    config = check(
        {
            "transforms": {transform: transforms[transform]},
            "models": {entry["model"]: {"source": "builtin", "name": "reference-1m"}},
            "corpora": {
                "text": {"source": "builtin", "part": "calibration", "window": 32, "windows": 24},
                "docs": {"source": "builtin", "part": "evaluation", "window": 32, "windows": 4},
            },
            "calibrations": {"default": {"corpus": "text"}},
            "evaluate": {"perplexity": ["docs"]},
            "studies": {
                "s": {
                    "models": [entry["model"]],
                    "transforms": [transform],
                    "mitigations": [mitigation],
                    "granularities": [granularity],
                    "formats": [format],
                }
            },
            "exports": [entry],
        }
    )
    [export] = exports(config, expand_studies(config))
    assert export.flags == ("online_rotation",)
