"""Run the workflow: what `make run` calls. Clears up after a driver that died, then becomes `snakemake`.

    python scripts/run_workflow.py --configfile config/config.yaml --cores 2 [--table STUDY | --figure STUDY] [snakemake options]

A driver that is killed leaves jobs that go on writing and a lock that nobody holds. Every process started here carries the folder and
the process id of its driver in its environment; those of a driver that is gone are ended before Snakemake starts, and its lock is lifted.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import psutil

from quantgrid.config import read
from quantgrid.errors import ConfigError, unknown_name

FOLDER, DRIVER = "QUANTGRID_FOLDER", "QUANTGRID_DRIVER"
ROOT = Path(__file__).resolve().parents[1]


def marked_processes(folder: str) -> list[tuple[psutil.Process, int]]:
    """(process, id of its driver) for every other process that a driver in ``folder`` started, itself among them."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get(FOLDER) == folder and process.pid != os.getpid():
                found.append((process, int(environment[DRIVER])))
        except (psutil.Error, OSError, ValueError):
            continue
    return found


def end_orphans(folder: str) -> bool:
    """End the jobs of drivers that are gone; True where no driver is left alive. They are killed: their outputs are incomplete anyway."""
    marked = marked_processes(folder)
    alive = {process.pid for process, driver in marked if process.pid == driver}
    orphans = [process for process, driver in marked if driver not in alive]
    for process in orphans:
        process.kill()
    psutil.wait_procs(orphans, timeout=10)
    if orphans:
        print(f"quantgrid: ended {len(orphans)} processes of a run that was killed", file=sys.stderr)
    return not alive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configfile", default="config/config.yaml")
    parser.add_argument("--table", metavar="STUDY")
    parser.add_argument("--figure", metavar="STUDY")
    known, passed_on = parser.parse_known_args()
    try:
        config = read(known.configfile)
    except ConfigError as error:
        raise SystemExit(f"quantgrid: {error}") from None
    results, studies = config.get("results_dir", "results"), config.get("studies") or {}
    for study in filter(None, (known.table, known.figure)):
        if study not in studies:
            raise SystemExit(f"quantgrid: {known.configfile}: {unknown_name('study', study, studies)}")
    targets = [f"{results}/tables/{known.table}.md"] * bool(known.table) + [f"{results}/figures/{known.figure}.png"] * bool(known.figure)
    folder = os.getcwd()
    snakemake = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), *targets, "--configfile", known.configfile]
    if end_orphans(folder) and any(Path(".snakemake/locks").glob("*")):
        subprocess.run([*snakemake, "--unlock", "--quiet"], check=True)
    os.environ |= {FOLDER: folder, DRIVER: str(os.getpid())}
    profile = [] if "--workflow-profile" in passed_on else ["--workflow-profile", str(ROOT / "workflow/profiles/default")]
    os.execv(sys.executable, [*snakemake, *profile, *passed_on])


if __name__ == "__main__":
    main()
