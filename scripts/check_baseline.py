"""Check the baseline of a model before quantization: calibration and evaluation share no text, and
full precision matches the published perplexity."""

from quantgrid.corpora import token_windows
from quantgrid.evaluation.baseline_check import check_published
from quantgrid.ground.errors import ConfigError
from quantgrid.ground.storage import read_json, write_json
from quantgrid.jobs.job import arguments, run


def main() -> None:
    job = arguments(
        "calibrations", "evaluations", "measured", "result", several=("calibrations", "evaluations", "measured")
    )
    shared, mistakes = {}, []
    calibrations = {
        corpus: token_windows.load(path)[0]
        for corpus, path in zip(job.spec["calibrations"], job.calibrations, strict=True)
    }
    evaluations = {
        corpus: token_windows.load(path, stop=count)[0]
        for corpus, path, count in zip(job.spec["evaluations"], job.evaluations, job.spec["windows"], strict=True)
    }
    for calibration, first in calibrations.items():
        for evaluation, second in evaluations.items():
            try:
                shared[f"{calibration}, {evaluation}"] = token_windows.check_disjoint(
                    first, second, (calibration, evaluation)
                )
            except ConfigError as error:
                mistakes.append(str(error))
    found = {}
    for (corpus, published), path in zip(job.spec["published"], job.measured, strict=True):
        try:
            found[corpus] = check_published(job.spec["model"], corpus, published, read_json(path))
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    write_json(job.result, {"model": job.spec["model"], "shared_windows": shared, "published": found})


if __name__ == "__main__":
    run(main)
