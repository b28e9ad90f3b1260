"""Draw the figures of a config's studies from a `results.csv` alone (`make redraw`): no model, no
evaluation, no torch.

    python scripts/redraw_figures.py --configfile config/config.yaml
        --results results/results.csv --folder redrawn [--study NAME]
"""

import argparse
from pathlib import Path

import pandas as pd

from quantgrid.config import validation
from quantgrid.config.study_mistakes import require_study
from quantgrid.ground.errors import ConfigError
from quantgrid.jobs.integrity import has_record, verify
from quantgrid.jobs.job import run
from quantgrid.reporting.data.selection import of_study
from quantgrid.reporting.figures import study_figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--configfile", default="config/config.yaml", help="the config that the results were computed from"
    )
    parser.add_argument("--results", required=True, type=Path, help="a results.csv")
    parser.add_argument("--folder", required=True, type=Path, help="where the figures go")
    parser.add_argument("--study", help="one study instead of all")
    asked = parser.parse_args()
    config = validation.load(asked.configfile)
    if asked.study is not None:
        require_study(asked.study, config["studies"], asked.configfile)
    if not asked.results.is_file():
        raise ConfigError(f"{asked.results}: there is no such file; a run leaves results.csv in its results folder")
    if has_record(asked.results):  # an archive may contain this file alone
        verify(asked.results)
    results = pd.read_csv(asked.results, dtype=str, keep_default_na=False)
    asked.folder.mkdir(parents=True, exist_ok=True)
    for study in [asked.study] if asked.study else config["studies"]:
        records, spec = of_study(results, config, study), {"study": study, **config["studies"][study]}
        path = asked.folder / study
        study_figures.save(
            study_figures.plot(records, spec), [path.with_name(f"{study}.{suffix}") for suffix in ("png", "pdf", "svg")]
        )
        study_figures.write_data(records, spec, path.with_name(f"{study}.csv"))
        print(path.with_name(f"{study}.png"), flush=True)


if __name__ == "__main__":
    run(main)
