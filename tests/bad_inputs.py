"""Configs and model folders that nothing can be computed from, generated for the campaign of
`test_bad_inputs.py`.

    python tests/bad_inputs.py FOLDER    checks all of them in one process of bounded memory; a line
                                         of JSON each

Each differs from a config without a mistake in one place.
"""

from __future__ import annotations

import copy
import json
import math
import resource
import shutil
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "data" / "tiny-llama"
MEMORY = 3 << 30  # bytes of address space, of which libraries that are only mapped take most
SHAPE = {
    "architecture": "LlamaForCausalLM",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "layers": 30,
    "heads": 9,
    "kv_heads": 3,
    "head_dim": 64,
    "vocabulary": 49152,
}
WHEEL = {"source": "wheel", "package": "a==1", "file": "a/b.gguf", "sha256": "0" * 64, "shape": SHAPE}
HUB = {"source": "hub", "id": "a/b", "revision": "main", "shape": SHAPE}
BAD_NAMES = {
    "line break": "x\n",
    "dash": "-x",
    "dot": ".x",
    "folder above": "..",
    "slash": "a/b",
    "space": "a b",
    "empty": "",
    "long": "x" * 65,
    "braces": "{x}",
    "NUL": "a\0b",
    "accent": "é",
    "number": 7,
    "null": None,
    "true": True,
}
NOT_COUNTS = {
    "text": "1e-5",
    "quoted": "7",
    "NaN": math.nan,
    "infinity": math.inf,
    "10**400": 10**400,
    "10**30": 10**30,
    "negative": -1,
    "fraction": 1.5,
    "true": True,
    "list": [],
    "mapping": {},
    "hexadecimal": int("f" * 5000, 16),
}
COUNTS = (
    "seed",
    "threads",
    "threads.default",
    "threads.quantize_model",
    "evaluation.batch_size",
    "evaluation.task_limit",
    "evaluation.residual_error_windows",
    "calibrations.default.samples",
    "calibrations.default.skip_first",
    "corpora.docs.window",
    "corpora.docs.windows",
    "tasks.cloze.items",
    "tasks.cloze.shots",
    "transforms.rotation.seed",
    "mitigations.lr8.rank",
    "transforms.awq.points",
    "mitigations.solved.block_size",
    "models.hub.shape.layers",
    "models.hub.shape.hidden_size",
    "models.hub.shape.vocabulary",
)
NOT_NUMBERS = {
    "text": "1e-5",
    "NaN": math.nan,
    "infinity": -math.inf,
    "10**400": 10**400,
    "null": None,
    "list": [0.5],
    "words": "half",
}
NUMBERS = (
    "transforms.smooth.alpha",
    "mitigations.solved.damping",
    "transforms.learned.learning_rate",
    "formats.int4-mse.weight.clip_ratio",
    "formats.int4-mse.weight.percentile",
    "formats.int4-mse.weight.mse_norm",
    "formats.int4-mse.weight.group_size",
    "models.hub.published.docs",
)
# of these tables, no mistakes there
FINE = {("threads", "mapping"), ("formats.int4-mse.weight.group_size", "null")}
RESULTS = {
    "wildcard": "results/{cell}",
    "line break": "results\n",
    "escape": "a\x1b[0m",
    "NUL": "a\0b",
    "dash": "-results",
    "300": "x" * 300,
    "300 in parts": "/".join(["part"] * 60),
    "number": 7,
    "list": ["a"],
    "null": None,
    "empty": "",
    "blank": "  ",
    "bucket": "s3://bucket/x",
    "URL": "https://example.org/x",
    "unknown user": "~nobody-of-this-name/x",
    "own folder": str(ROOT),
    "file": str(ROOT / "Makefile"),
    "below a file": str(ROOT / "Makefile" / "x"),
    "half a character": "a\ud800",
    "true": True,
}
WORDS = {
    "models.w.package": [
        "a",
        "-a==1",
        "a==",
        "a==1==2",
        "a>=1",
        "a==1\n",
        "--index-url==1",
        "a==-1",
        "a @ b",
        5,
        "a==1 -r x",
    ],
    "models.w.file": ["a.bin", "a.gguf\n", "", 5],
    "models.w.sha256": ["0" * 63, "0" * 65, "g" * 64, "0" * 64 + "\n", 5],
    "models.w.shape": [{}, {**SHAPE, "architecture": 5}, {**SHAPE, "architecture": "Gpt"}, {**SHAPE, "more": 1}, 7],
    "models.hub.id": ["-a", "a b", "a\n", "", 5],
    "models.hub.revision": ["-main", "a b", "main\n", 5],
    "models.tiny.path": ["", "a\0b", "~nobody-of-this-name/x", "x" * 300, "/no/such/folder", 5, "a\nb"],
    "corpora.local.path": ["", "a\0b", "~nobody-of-this-name/x", "x" * 300, "/no/such/file", str(ROOT)],
    "studies.s.granularities": [
        ["group-0"],
        ["group-" + "9" * 5000],
        ["group-1²"],
        ["group-٣"],
        ["group--1"],
        ["tensor", "tensor"],
        [7],
        "channel",
    ],
    "studies.s.transforms": [["rotation-s²"], ["rotation-s2"], ["rotation-s00"], [None], [], {}, "none", ["x" * 5000]],
    "studies.s.formats": [["int44"], ["int4\n"], [["int4"]]],
    "studies.s": [None, [], 5, {}],
    "studies.s.exclude": [[{}], [{"format": "int44"}], [{"seed": 1}], {}],
    "studies.s.also": [[{"formats": ["int44"]}], ["x"], 5],
    "transforms.rotation.seeds": [[], [1, 1], [-1], [10**30], ["1"], list(range(1001)), 5],
    "mitigations": [
        5,
        [],
        {"x": 5},
        {"x": {}},
        {"x": {"method": "gptqq"}},
        {"x": {"method": 5}},
        {"gptq": {"method": "rtn"}},
    ],
    "formats": [
        {"x": {"preset": "int9"}},
        {"x": {"preset": "int4", "linears": ["z"]}},
        {"x": {"preset": "int4", "weight": {"element": []}}},
    ],
    "report.title": [5, "x" * 20000, "\0"],
    "compute": [{"device": "tpu"}, {"dtype": 16}, 5],
    "keep_checkpoints": [1, "yes"],
}
BOMB = "".join(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10))
TEXTS = {
    "duplicate at the top": "seed: 1\nseed: 2\n",
    "duplicate below": "mitigations:\n  gptq: {method: gptq, damping: 0.01}\n  gptq: {method: gptq}\n",
    "duplicate in a flow": "models: {a: {source: hub, source: local}}\n",
    "duplicate in quotes": "seed: 1\n'seed': 2\n",
    "duplicate in a list": "studies:\n  s:\n    also:\n      - {formats: [int4], formats: [int8]}\n",
    "billion laughs": f"a0: &a0 [x, x]\n{BOMB}",
    "alias of itself": "models: &m {a: *m}\n",
    "list of itself": "models: &m [*m]\n",
    "unknown alias": "models: *m\n",
    "deep flow": "a: " + "[" * 20000,
    "deep mapping": "{a: " * 5000,
    "deep blocks": "".join(f"{' ' * level}a:\n" for level in range(300)),
    "deep, closed": "a: " + "[" * 99 + "]" * 99,
    "large": "a: '" + "x" * (5 << 20) + "'\n",
    "many values": "a: [" + "1, " * 60000 + "1]\n",
    "long number": f"seed: {'9' * 5000}\n",
    "long fraction": f"seed: 0.{'9' * 5000}\n",
    "octal": "seed: 010\n",
    "base 60": "seed: 1:30\n",
    "date": "seed: 2026-99-99\n",
    "set": "models: !!set {a}\n",
    "python": "a: !!python/object/apply:os.system ['true']\n",
    "tuple": "a: !!python/tuple [1]\n",
    "tab": "a:\n\t- b\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "not closed": "models: [",
    "colon": "a: b: c\n",
    "key that is a list": "? [a]\n: b\n",
    "control character": "a: \x01\n",
    "empty": "",
    "list": "- a\n",
    "number": "5\n",
    "binary": "a: !!binary aGVsbG8=\n",
    "null key": "~: 1\n",
    "unfinished quote": "a: 'b\n",
    "number as key": "5: 1\n",
    "on": "on: 1\n",
    "merge of a list": "<<: [1]\n",
    "date as a value": "seed: 2026-01-01\n",
}
BYTES = {
    "not UTF-8": b"a: \xff\n",
    "UTF-16": "seed: 1\n".encode("utf-16"),
    "NUL bytes": b"\0" * 100,
    "zip": b"PK\x03\x04" + bytes(range(256)),
}


def valid() -> dict[str, Any]:
    """A config without a mistake that has every key of the tables above."""
    study = {
        "models": ["tiny"],
        "transforms": ["none", "smooth"],
        "mitigations": ["rtn", "lr8"],
        "granularities": ["channel"],
        "formats": ["int4"],
    }
    return {
        "seed": 1,
        "threads": {"default": 1, "quantize_model": 1},
        "results_dir": "results",
        "compute": {"device": "cpu"},
        "keep_checkpoints": False,
        "models": {
            "tiny": {"source": "local", "path": str(TINY)},
            "hub": {**copy.deepcopy(HUB), "published": {"docs": 20.0}},
            "w": copy.deepcopy(WHEEL),
        },
        "corpora": {
            "docs": {"source": "builtin", "part": "evaluation", "window": 64, "windows": 4},
            "text": {"source": "builtin", "part": "calibration", "window": 64},
            "local": {"source": "local", "path": str(ROOT / "tests" / "data" / "smoke-evaluation.txt"), "window": 64},
        },
        "calibrations": {"default": {"corpus": "text", "samples": 64, "skip_first": 0}},
        "transforms": {
            "smooth": {"method": "scaling", "alpha": 0.5},
            "rotation": {"method": "random_hadamard", "seed": 1},
            "awq": {"method": "awq"},
            "learned": {"method": "optimized_rotation"},
        },
        "mitigations": {"lr8": {"method": "low_rank", "rank": 8}, "solved": {"method": "gptq"}},
        "formats": {"int4-mse": {"preset": "int4", "weight": {"range": "mse"}}},
        "tasks": {"cloze": {"source": "builtin", "kind": "cloze", "items": 8, "shots": 0}},
        "evaluation": {"batch_size": 8, "task_limit": 4, "residual_error_windows": 2},
        "evaluate": {"perplexity": ["docs"]},
        "report": {"title": "x"},
        "studies": {"s": study},
    }


def with_value(place: str, value: Any) -> dict[str, Any]:
    """The valid config with ``value`` at a place such as ``corpora.docs.window``."""
    config = valid()
    *folders, last = place.split(".")
    inner = config
    for name in folders:
        if not isinstance(inner.get(name), dict):
            inner[name] = {}
        inner = inner[name]
    inner[last] = value
    if place.endswith(".seeds"):
        del inner["seed"]
    return config


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, config) of every config that is refused for one value."""
    for places, values in ((COUNTS, NOT_COUNTS), (NUMBERS, NOT_NUMBERS)):
        for place in places:
            yield from (
                (f"{place}: {name}", with_value(place, value))
                for name, value in values.items()
                if (place, name) not in FINE
            )
    yield from ((f"results_dir: {name}", with_value("results_dir", value)) for name, value in RESULTS.items())
    yield from (
        (f"{place}: {number}", with_value(place, value))
        for place, values in WORDS.items()
        for number, value in enumerate(values)
    )
    for kind in ("models", "corpora", "calibrations", "transforms", "mitigations", "formats", "tasks", "studies"):
        for name, bad in BAD_NAMES.items():
            config = valid()
            config[kind][bad] = copy.deepcopy(next(iter(config[kind].values())))
            yield f"name of {kind}: {name}", config
        config = valid()
        config[kind][next(iter(config[kind])).upper()] = copy.deepcopy(next(iter(config[kind].values())))
        yield f"name of {kind}: other case", config
    for key in valid():
        yield from (
            (f"{key}: {value!r}", {**valid(), key: value})
            for value in (5.5, "text", ["a"])
            if not (key == "results_dir" and value == "text")
        )


def edited(file: str, **changes: Any) -> Callable[[Path], None]:
    """Spoils a folder by other values in one of its JSON files; ``None`` takes a key out."""

    def spoil(folder: Path) -> None:
        content = {**json.loads((folder / file).read_text()), **changes}
        (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return spoil


def written(file: str, content: str | bytes) -> Callable[[Path], None]:
    """Spoils a folder by other content of one of its files."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(raw) and None


def safetensors(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def folders() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """(name, what is done to it) of every model folder that is refused."""
    sizes = {
        "hidden_size": (0, -1, "96", 10**30, 1.5, True, [], None),
        "num_hidden_layers": (0, -1, 10**9, "3", 10**400),
        "vocab_size": (0, "x", None),
        "num_attention_heads": (0, -1, "6", None),
        "num_key_value_heads": (-1, "x", 10**30),
        "head_dim": (-1, "x"),
        "intermediate_size": (0, {}, None),
    }
    for key, values in sizes.items():
        yield from ((f"{key}: {value!r:.20}", edited("config.json", **{key: value})) for value in values)
    yield from (
        (f"architectures: {value!r}", edited("config.json", architectures=value))
        for value in (5, [5], [[]], {"a": 1}, ["Gpt"], ["MixtralForCausalLM"])
    )
    yield "model_type", edited("config.json", architectures=None, model_type=5)
    yield "quantized already", edited("config.json", quantization_config=5)
    for file in ("config.json", "model.safetensors.index.json", "tokenizer_config.json"):
        for name, text in {
            "list": "[]",
            "number": "5",
            "text": '"x"',
            "null": "null",
            "cut": '{"a": ',
            "empty": "",
            "deep": "[" * 100000,
            "closed": "[" * 500 + "]" * 500,
            "not UTF-8": b"\xff\xfe",
            "long number": f'{{"a": {"9" * 5000}}}',
        }.items():
            yield f"{file}: {name}", written(file, text)
    yield from (
        (f"weight map: {value!r}", written("model.safetensors.index.json", json.dumps({"weight_map": value})))
        for value in (5, [], {}, {"a": 5}, {"a": "../x.safetensors"}, {"a": "gone.safetensors"})
    )
    tensor = b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    headers = {
        "empty": b"",
        "few bytes": b"abc",
        "length": safetensors(tensor, 1 << 60),
        "length of the file": safetensors(tensor, 1 << 30),
        "list": safetensors(b"[]"),
        "no tensors": safetensors(b"{}"),
        "numbers": safetensors(b'{"x": 5}'),
        "no offsets": safetensors(b'{"x": {}}'),
        "deep": safetensors(b"[" * 100000),
        "not UTF-8": safetensors(b"\xff" * 8),
        "negative": safetensors(tensor.replace(b"[0, 4]", b"[0, -4]")),
        "words": safetensors(tensor.replace(b"[0, 4]", b'["a"]')),
        "cut": safetensors(tensor),
        "one tensor": safetensors(tensor, None, bytes(4)),
        "Git LFS": b"version https://git-lfs.github.com/spec/v1\n",
    }
    for name, content in headers.items():
        yield f"model.safetensors: {name}", written("model.safetensors", content)
    yield "no tokenizer", lambda folder: (folder / "tokenizer.json").unlink()
    yield "no weights", lambda folder: (folder / "model.safetensors").unlink()
    yield "no config", lambda folder: (folder / "config.json").unlink()
    yield "pickles", lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin") and None
    yield (
        "link to nowhere",
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").symlink_to("gone"))[0],
    )
    yield "folder for a file", lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir())[0]


def checked(name: str, check: Callable[[], Any]) -> dict[str, Any]:
    """Outcome of one bad input: message, or traceback where it was no refusal; seconds; peak memory
    so far in MB."""
    from quantgrid.ground.errors import ConfigError

    begin = time.process_time()
    try:
        check()
        outcome, message = "accepted", ""
    except ConfigError as error:
        outcome, message = "refused", str(error)
    except BaseException as error:
        outcome, message = type(error).__name__, traceback.format_exc(limit=-3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "name": name,
        "outcome": outcome,
        "message": message,
        "seconds": round(time.process_time() - begin, 3),
        "peak": round(peak),
    }


def files(place: Path) -> Iterator[tuple[str, Path]]:
    """(name, path) of every file that is no config, written below ``place``."""
    for number, (name, text) in enumerate({**TEXTS, **BYTES}.items()):
        path = place / f"{number}.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        yield name, path
    yield "no such file", place / "none.yaml"
    yield "folder", place


def main(place: Path) -> None:
    from quantgrid.config import validation as readers

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(json.dumps(checked("valid", lambda: readers.check(valid()))))
    for name, path in files(place):
        print(json.dumps(checked(f"file: {name}", lambda path=path: readers.load(path))))
    for name, config in configs():
        print(json.dumps(checked(name, lambda config=config: readers.check(config))))
    for number, (name, spoil) in enumerate(folders()):
        folder = place / f"model-{number}"
        shutil.copytree(TINY, folder)
        spoil(folder)
        config = {**valid(), "models": {"tiny": {"source": "local", "path": str(folder)}}}
        print(json.dumps(checked(f"model: {name}", lambda config=config: readers.check(config))))
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "scripts"))
    main(Path(sys.argv[1]))
