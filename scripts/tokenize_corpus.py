"""Tokenize a corpus and cut it into windows, once per model."""

from quantgrid.corpora import token_windows
from quantgrid.jobs.job import arguments, record, run


def main() -> None:
    job = arguments("model", "windows")
    windows, info = token_windows.tokenize(
        job.spec["corpus"], job.model, job.spec["seed"], f"corpora.{job.spec['axes']['corpus']}"
    )
    token_windows.save(job.windows, windows, {**record(job.spec), **info, "corpus": job.spec["axes"]["corpus"]})


if __name__ == "__main__":
    run(main)
