"""Log-probabilities and token ids of llama.cpp, for a GGUF file: a script for an environment that has
``xllamacpp`` and nothing of quantgrid.

    python -I llama_cpp_probe.py REQUEST.json ANSWER.safetensors

The request holds ``model`` (path), ``code`` (defines ``server`` from ``path``, ``context`` and
``threads``), ``threads``, ``vocabulary``, ``windows`` (lists of token ids), ``lengths`` (for each window
the numbers of its first tokens after which the next is predicted) and ``texts``. The answer has
``log_probabilities`` (positions, vocabulary) float32, window by window, and in its metadata
``tokens``: the ids of every text, without BOS and EOS. Standard library besides.
"""

from __future__ import annotations

import json
import math
import struct
import sys
import urllib.request
from array import array
from pathlib import Path
from typing import Any

_HEADROOM = 8  # tokens of the context beyond the longest window


def log_probabilities(server: Any, prompt: list[int], vocabulary: int) -> array[float]:
    """Natural logarithms of the probabilities of all tokens after ``prompt``, by id."""
    answer = server.handle_completions(
        {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "temperature": 0.0, "cache_prompt": True}
    )
    found = array("f", [-math.inf]) * vocabulary
    if "choices" not in answer:
        raise RuntimeError(f"llama.cpp: {json.dumps(answer)[:300]}")
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


def token_ids(server: Any, text: str) -> list[int]:
    """Ids of ``text`` by the server's ``/tokenize``, without BOS."""
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize",
        json.dumps({"content": text, "add_special": False, "parse_special": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["tokens"]


def write_answer(path: Path, rows: list[array[float]], vocabulary: int, tokens: list[list[int]]) -> None:
    """Write a safetensors file: 8 bytes with the length of the header, the header, the rows."""
    header: dict[str, Any] = {
        "__metadata__": {"tokens": json.dumps(tokens)},
        "log_probabilities": {
            "dtype": "F32",
            "shape": [len(rows), vocabulary],
            "data_offsets": [0, 4 * len(rows) * vocabulary],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for row in rows:
            row.tofile(file)


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    context = max([*map(len, request["windows"]), 64]) + _HEADROOM
    given: dict[str, Any] = {"path": request["model"], "context": context, "threads": request["threads"]}
    exec(request["code"], given)
    server = given["server"]
    rows = [
        log_probabilities(server, window[:length], request["vocabulary"])
        for window, lengths in zip(request["windows"], request["lengths"])
        for length in lengths
    ]
    write_answer(Path(sys.argv[2]), rows, request["vocabulary"], [token_ids(server, text) for text in request["texts"]])


if __name__ == "__main__":
    main()
