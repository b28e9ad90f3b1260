"""Inputs and outputs in S3, which moto plays on this machine: the bytes of a local run, through the
profile as it stands."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from checkouts import Checkout, one_cell

pytestmark = [
    pytest.mark.workflow,
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("moto"), reason="moto is not installed"),
]
RESULTS, BUCKET = "results-smoke", "tests"
PREFIX = ("--default-storage-prefix", f"s3://{BUCKET}/quantgrid")
WITHIN = f"quantgrid/{RESULTS}/"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """A bucket that nothing is in, and what the profiles want said in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    # a line for each request
    monkeypatch.setattr(logging.getLogger("werkzeug"), "level", logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY": "key", "SECRET_KEY": "secret"}.items():
        monkeypatch.setenv(f"SNAKEMAKE_STORAGE_S3_{name}", value)
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    store = boto3.resource("s3", endpoint_url=f"http://{host}:{port}", **keys)
    yield store.create_bucket(Bucket=BUCKET)
    server.stop()


@pytest.mark.skipif(
    not find_spec("snakemake_executor_plugin_kubernetes"),
    reason="snakemake-executor-plugin-kubernetes is not installed",
)
def test_a_dry_run_on_kubernetes_keeps_the_steps_of_a_cell_together_and_files_in_the_bucket(tmp_path: Path, bucket):
    checkout = one_cell(Checkout.make(tmp_path / "quantgrid"))
    output = checkout.run("smoke", "--profile", "kubernetes", *PREFIX, "--dry-run")
    assert f"output: s3://{BUCKET}/{WITHIN}models/reference-1m-planted/" in output
    grouped = {
        line.split()[1].rstrip(":") for line in output.splitlines() if line.startswith("    rule ")
    }  # jobs of a group are indented
    assert grouped == {"quantize_model", "evaluate_perplexity", "measure_residual_error"}
    assert not list(bucket.objects.all()), "a dry run leaves nothing"


@pytest.mark.timeout(1800)
def test_a_run_with_all_files_in_the_bucket_gives_the_bytes_of_a_local_run(
    tmp_path: Path, bucket, one_cell_results: dict[str, bytes]
):
    remote = one_cell(Checkout.make(tmp_path / "quantgrid"))
    remote.run("smoke", "--profile", "s3", *PREFIX)
    found = {entry.key.removeprefix(WITHIN): entry for entry in bucket.objects.filter(Prefix=WITHIN)}
    assert {name: found[name].get()["Body"].read() for name in one_cell_results} == one_cell_results
    assert any(name.startswith("logs/quantize_model/") for name in found) and any(
        name.startswith("models/") for name in found
    )
    assert not any(name.startswith("quantized/") and name.endswith(".safetensors") for name in found), (
        "evaluated checkpoints are deleted there too"
    )
    assert not (remote.folder / RESULTS).exists(), "nothing lies where a run without a bucket leaves it"
    assert "Nothing to be done" in remote.run("smoke", "--profile", "s3", *PREFIX, "--dry-run")
