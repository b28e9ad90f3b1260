"""Exported folders in servers: llama.cpp and `transformers serve` answer over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from export_cases import BF16, Source, cell
from gguf_cases import Q4_0, trained
from quantgrid.exports.export import export
from quantgrid.exports.gguf_check import ENVIRONMENT, LOADER
from quantgrid.ground.places import ROOT

pytestmark = pytest.mark.nightly
LLAMA_CPP, SERVING = (ROOT / name / "bin" / "python" for name in (ENVIRONMENT, ".venv-serving"))
PROMPT = {"prompt": "Return the number of", "max_tokens": 8, "temperature": 0.0}
W4A16 = {"preset": "int4", "weight": BF16, "activation": None}
HTTP = """
import sys, time
print(server.listening_address, flush=True)
sys.stdin.read()
"""


def needs(python: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not python.is_file(), reason=f"make {python.parents[1].name}/.installed")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Source:
    return trained(tmp_path_factory.mktemp("llama"))


@contextmanager
def running(command: list[Any], **options: Any) -> Iterator[subprocess.Popen]:
    """A process that ends with the block."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def post(address: str, content: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def until(ready: Callable[[], Any], process: subprocess.Popen, seconds: float = 180) -> Any:
    """First result of ``ready`` that comes without a refused connection."""
    end = time.monotonic() + seconds
    while True:
        try:
            return ready()
        except OSError:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.5)


@needs(LLAMA_CPP)
def test_the_server_of_llama_cpp_answers_from_an_exported_file(llama: Source, tmp_path: Path):
    folder = cell(llama, tmp_path / "cell", Q4_0, "group-32")
    export(llama.model, folder, None, llama.windows, "gguf", tmp_path / "out", about={"model": "Tiny"})
    code = f"path, context, threads = {str(tmp_path / 'out' / 'Tiny-Q4_0.gguf')!r}, 256, 1\n{LOADER}{HTTP}"
    with running([LLAMA_CPP, "-I", "-c", code], stdout=subprocess.PIPE) as process:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        answer = post(f"{address}/v1/completions", PROMPT)
    assert answer["usage"]["completion_tokens"] == 8 and answer["choices"][0]["text"]


@needs(SERVING)
def test_transformers_serve_answers_from_an_exported_folder(llama: Source, tmp_path: Path):
    """The answer is that of the loaded folder, token by token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    folder = cell(llama, tmp_path / "cell", W4A16, "group-32")
    export(llama.model, folder, None, llama.windows, "compressed-tensors", out, dtype="float32")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (hub := tmp_path / "hub").mkdir()
    packages = {"PYTHONPATH": sysconfig.get_paths()["purelib"], "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    code = "import sys; sys.path.append(sys.path.pop(1)); from transformers.cli.transformers import main; main()"
    command = [SERVING, "-c", code, "serve", str(out), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with running(command, env={**os.environ, **packages}) as process:
        address = f"http://127.0.0.1:{port}/v1/completions"
        answer = until(lambda: post(address, {"model": str(out), **PROMPT}), process)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    given = tokenizer(PROMPT["prompt"], return_tensors="pt")
    made = model.generate(**given, max_new_tokens=PROMPT["max_tokens"], do_sample=False)[0]
    assert answer["choices"][0]["text"] == tokenizer.decode(made[given["input_ids"].shape[1] :])
