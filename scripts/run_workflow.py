"""Run the workflow: what `make run` calls. Clears up after a driver that died, then becomes `snakemake`.

    python scripts/run_workflow.py --configfile config/config.yaml --cores 2 [--profile NAME | --warm] [--table STUDY | --figure STUDY]
        [snakemake options]

A run holds the lock of its results folder (`quantgrid.locks`): a second one ends with the name of the first. A driver that is killed leaves jobs
that go on writing, here or in a Slurm queue, and a lock of Snakemake that nobody holds: `quantgrid.drivers` ends the jobs and lifts the lock.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import psutil

from quantgrid import warm
from quantgrid.allocator import KEEP_FREED
from quantgrid.config import load, read
from quantgrid.drivers import DRIVER, FOLDER, LOCKS, check_machine, drivers_of, end_orphans, note_driver
from quantgrid.errors import ConfigError, unknown_name
from quantgrid.locks import hold
from quantgrid.shared_cache import CACHED_RULES

ROOT = Path(__file__).resolve().parents[1]
# Options of Snakemake by which jobs run on other machines or in other environments.
ELSEWHERE = {"--sdm", "--software-deployment-method", "--deployment-method", "--deployment", "--use-conda", "--use-apptainer", "--use-singularity",
             "--use-envmodules", "--executor", "-e", "--workflow-profile", "--profile"}
PROFILES, LOGGER = ROOT / "workflow" / "profiles", ROOT / "workflow" / "logger"


def profile_options(name: str, passed_on: list[str]) -> list[str]:
    """The workflow profile, and of the default one the memory that jobs on this machine may ask for together."""
    if not (PROFILES / name / "config.yaml").is_file():
        raise SystemExit(f"quantgrid: {unknown_name('profile', name, [path.parent.name for path in PROFILES.glob('*/config.yaml')])}")
    cache = ["--cache", *CACHED_RULES] if os.environ.get("SNAKEMAKE_OUTPUT_CACHE") else []  # first: it takes all words up to the next option
    options = [*cache, "--workflow-profile", str(PROFILES / name)]
    if name == "default" and "--resources" not in passed_on:
        options += ["--resources", f"mem_mb={int(psutil.virtual_memory().total * 0.7 / 2**20)}"]
    return options


def stored_elsewhere(profile: str, passed_on: list[str]) -> bool:
    """Whether files lie in object storage, where the folder of results is no folder that could be locked."""
    named = any(word.partition("=")[0] == "--default-storage-provider" for word in passed_on)
    return named or "default-storage-provider" in read(PROFILES / profile / "config.yaml")


def logger_options(passed_on: list[str]) -> list[str]:
    """quantgrid's own logger, where Python finds it, unless another one or a report is asked for."""
    if {"--logger", "--report"} & set(passed_on):
        return []
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(LOGGER), str(ROOT / "scripts"), os.environ.get("PYTHONPATH")]))
    return ["--logger", "quantgrid"]


def check_warm(profile: str, passed_on: list[str]) -> None:
    """Raise :class:`ConfigError` where jobs run elsewhere or with another Python, so that they cannot be forked from a process here."""
    others = ELSEWHERE & {word.partition("=")[0] for word in passed_on}
    if profile != "default" or others:
        raise ConfigError(f"--warm is for jobs on this machine and in this environment, not with {others.pop() if others else f'profile {profile}'}")


def clear_up(folder: str, snakemake: list[str]) -> None:
    """End what a killed driver left in ``folder`` and lift its lock; :class:`ConfigError` where a driver lives, here or on another machine."""
    check_machine(folder)
    if end_orphans(folder):
        if any(LOCKS.glob("*")) and (code := subprocess.run([*snakemake, "--unlock", "--quiet"]).returncode):
            raise SystemExit(code)  # Snakemake has said why: the config, mostly
        note_driver(folder)
    elif any(LOCKS.glob("*")):
        processes = ", ".join(map(str, drivers_of(folder)))
        raise ConfigError(f"this folder is locked by a run that is going on (process {processes}); wait for it, or end it with Ctrl-C or kill -INT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--configfile", default="config/config.yaml")
    parser.add_argument("--profile", default="default", metavar="NAME", help="a folder of workflow/profiles")
    parser.add_argument("--warm", action="store_true", help="jobs fork from a process that has imported what they need")
    parser.add_argument("--table", metavar="STUDY")
    parser.add_argument("--figure", metavar="STUDY")
    known, passed_on = parser.parse_known_args()
    options = [] if "--workflow-profile" in passed_on else profile_options(known.profile, passed_on)
    try:
        if known.warm:
            check_warm(known.profile, passed_on)
        config = load(known.configfile)  # before Snakemake starts, whose own lines would stand around the message
    except ConfigError as error:
        raise SystemExit(f"quantgrid: {error}") from None
    results, studies = config["results_dir"], config["studies"]
    for study in filter(None, (known.table, known.figure)):
        if study not in studies:
            raise SystemExit(f"quantgrid: {known.configfile}: {unknown_name('study', study, studies)}")
    targets = [f"{results}/tables/{known.table}.md"] * bool(known.table) + [f"{results}/figures/{known.figure}.png"] * bool(known.figure)
    folder = os.getcwd()
    marks = {FOLDER: folder, DRIVER: str(os.getpid())}
    snakemake = [sys.executable, "-m", "snakemake", *targets, "--configfile", known.configfile]
    snakefile = ["--snakefile", str(ROOT / "Snakefile")]  # last of what is added here: it takes one word, others would take a target that follows
    if not {"-n", "--dry-run", "--dryrun"} & set(passed_on):
        options += logger_options(passed_on)
        try:
            if not stored_elsewhere(known.profile, passed_on):
                hold(results)
            clear_up(folder, [*snakemake, *snakefile])
            if known.warm:
                warm.start({**KEEP_FREED, **marks})
        except ConfigError as error:
            raise SystemExit(f"quantgrid: {error}") from None
    os.environ |= marks
    os.execv(sys.executable, [*snakemake, *options, *snakefile, *passed_on])


if __name__ == "__main__":
    main()
