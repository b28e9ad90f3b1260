"""Cut a corpus into windows of tokens, once per model."""

from quantgrid import corpora
from quantgrid.job import arguments, record, run


def main() -> None:
    job = arguments("model", "windows")
    windows, info = corpora.tokenize(job.spec["corpus"], job.model, job.spec["seed"], f"corpora.{job.spec['axes']['corpus']}")
    corpora.save(job.windows, windows, {**record(job.spec), **info, "corpus": job.spec["axes"]["corpus"]})


if __name__ == "__main__":
    run(main)
