"""Run the workflow (`make run`): clean up after a driver that was killed, then exec `snakemake`.

    python scripts/run_workflow.py --configfile config/config.yaml --cores 2
        [--profile NAME] [--warm | --cold] [--table STUDY | --figure STUDY] [snakemake options]

A run holds the lock of its results folder (`quantgrid.jobs.locks`); a second run stops and names
the first. Options with which Snakemake runs no job, such as --report and --summary, need no lock. A
killed driver leaves running jobs, local or in a Slurm queue, and a stale lock of Snakemake:
`quantgrid.jobs.drivers` ends the jobs and removes the lock.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import psutil

from quantgrid.config.study_mistakes import require_study
from quantgrid.config.validation import load, read
from quantgrid.ground.errors import ConfigError, unknown_name
from quantgrid.jobs import fork_server
from quantgrid.jobs.drivers import DRIVER, FOLDER, HELD, LOCKS, check_machine, drivers_of, end_orphans, note_driver
from quantgrid.jobs.locks import hold
from quantgrid.jobs.shared_cache import CACHED_RULES
from quantgrid.machine.malloc import KEEP_FREED

ROOT = Path(__file__).resolve().parents[1]
# Snakemake options that run jobs on other machines or in other environments.
ELSEWHERE = {
    "--sdm",
    "--software-deployment-method",
    "--deployment-method",
    "--deployment",
    "--use-conda",
    "--use-apptainer",
    "--use-singularity",
    "--use-envmodules",
    "--executor",
    "-e",
    "--workflow-profile",
    "--profile",
}
DRY = {"-n", "--dry-run", "--dryrun"}
IDLE = {"--touch", "-t", "--unlock"}  # Snakemake options that change the folder but run no job
# Snakemake options that only print information and leave the results folder unchanged.
TELLING = {
    "--report",
    "--summary",
    "-S",
    "--detailed-summary",
    "-D",
    "--list-rules",
    "--list",
    "-l",
    "--list-target-rules",
    "--lt",
    "--list-changes",
    "--lc",
    "--list-input-changes",
    "--li",
    "--list-params-changes",
    "--lp",
    "--list-untracked",
    "--lu",
    "--list-conda-envs",
    "--lint",
    "--dag",
    "--rulegraph",
    "--filegraph",
    "--d3dag",
    "--print-compilation",
    "--version",
    "-v",
}
PROFILES, LOGGER = ROOT / "workflow" / "profiles", ROOT / "workflow" / "logger"


def profile_options(name: str, passed_on: list[str]) -> list[str]:
    """Return the options of the workflow profile; for the default profile also the limit of memory
    for all jobs on this machine."""
    if not (PROFILES / name / "config.yaml").is_file():
        raise SystemExit(
            f"quantgrid: {unknown_name('profile', name, [path.parent.name for path in PROFILES.glob('*/config.yaml')])}"
        )
    cache = (
        ["--cache", *CACHED_RULES] if os.environ.get("SNAKEMAKE_OUTPUT_CACHE") else []
    )  # first, because it consumes all words up to the next option
    options = [*cache, "--workflow-profile", str(PROFILES / name)]
    if name == "default" and "--resources" not in passed_on:
        options += ["--resources", f"mem_mb={int(psutil.virtual_memory().total * 0.7 / 2**20)}"]
    return options


def asked(options: set[str], passed_on: list[str]) -> bool:
    """Check whether one of ``options`` is among the words for Snakemake, with or without a value
    after ``=``."""
    return any(word.partition("=")[0] in options for word in passed_on)


def stored_elsewhere(profile: str, passed_on: list[str]) -> bool:
    """Check whether results are in object storage; then there is no local folder to lock."""
    return asked({"--default-storage-provider"}, passed_on) or "default-storage-provider" in read(
        PROFILES / profile / "config.yaml"
    )


def logger_options(passed_on: list[str]) -> list[str]:
    """Return the options of quantgrid's logger and put it on PYTHONPATH; empty if another logger or
    a report is requested."""
    if asked({"--logger", "--report"}, passed_on):
        return []
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(LOGGER), str(ROOT / "scripts"), os.environ.get("PYTHONPATH")])
    )
    return ["--logger", "quantgrid"]


def why_cold(profile: str, passed_on: list[str]) -> str:
    """Name what keeps the jobs of this run from being forks of one process; empty if they can be."""
    if others := ELSEWHERE & {word.partition("=")[0] for word in passed_on}:
        return min(others)
    if ELSEWHERE & {f"--{key}" for key in read(PROFILES / profile / "config.yaml")}:
        return f"profile {profile}"
    return fork_server.why_not()


def check_warm(profile: str, passed_on: list[str]) -> None:
    """Raise :class:`ConfigError` if the jobs of this run cannot start warm."""
    if reason := why_cold(profile, passed_on):
        raise ConfigError(
            f"--warm requires jobs on this machine and in this environment; it does not work with {reason}"
        )


def warm_up(profile: str, passed_on: list[str], marks: dict[str, str]) -> None:
    """Start the server that jobs are forked from, or say why they start cold."""
    if reason := why_cold(profile, passed_on):
        print(f"quantgrid: jobs start cold, with their own imports: no warm start with {reason}", file=sys.stderr)
    else:
        fork_server.start({**KEEP_FREED, **marks})


def clear_up(folder: str, snakemake: list[str]) -> None:
    """End the jobs of a killed driver in ``folder`` and remove its lock; :class:`ConfigError` if a
    driver is still running, here or on another machine."""
    check_machine(folder)
    if end_orphans(folder):
        if any(LOCKS.glob("*")) and (code := subprocess.run([*snakemake, "--unlock", "--quiet"]).returncode):
            # Snakemake has printed the reason, usually an error in the config
            raise SystemExit(code)
        note_driver(folder)
    elif any(LOCKS.glob("*")):
        processes = ", ".join(map(str, drivers_of(folder)))
        raise ConfigError(
            f"this folder is locked by an active run (process {processes}); wait for it, or stop it with Ctrl-C or "
            "kill -INT"
        )


def prepare(
    known: argparse.Namespace, passed_on: list[str], results: str, marks: dict[str, str], snakemake: list[str]
) -> None:
    """Lock the results folder, name it in ``marks``, clean up, and warm up unless ``--cold``.

    Raises :class:`ConfigError` if another run is active. `--unlock` takes no lock but cleans up as
    well; an active run keeps its lock.
    """
    unlocks = asked({"--unlock"}, passed_on)
    if not unlocks and not stored_elsewhere(known.profile, passed_on):
        hold(results)
        marks[HELD] = os.path.abspath(results)
    clear_up(marks[FOLDER], snakemake)
    if not (known.cold or asked(IDLE, passed_on)):
        warm_up(known.profile, passed_on, marks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--configfile", default="config/config.yaml")
    parser.add_argument("--profile", default="default", metavar="NAME", help="a folder of workflow/profiles")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--warm", action="store_true", help="fork jobs from a process with all imports done: the default where it works"
    )
    start.add_argument("--cold", action="store_true", help="start every job in a fresh interpreter")
    parser.add_argument("--table", metavar="STUDY")
    parser.add_argument("--figure", metavar="STUDY")
    known, passed_on = parser.parse_known_args()
    options = [] if "--workflow-profile" in passed_on else profile_options(known.profile, passed_on)
    try:
        if known.warm:
            check_warm(known.profile, passed_on)
        # before Snakemake starts, so that its output does not surround the message
        config = load(known.configfile)
        for study in (name for name in (known.table, known.figure) if name is not None):
            require_study(study, config["studies"], known.configfile)
    except ConfigError as error:
        raise SystemExit(f"quantgrid: {error}") from None
    results = config["results_dir"]
    targets = [f"{results}/tables/{known.table}.md"] * bool(known.table) + [
        f"{results}/figures/{known.figure}.png"
    ] * bool(known.figure)
    marks = {FOLDER: os.getcwd(), DRIVER: str(os.getpid()), HELD: ""}
    snakemake = [sys.executable, "-m", "snakemake", *targets, "--configfile", known.configfile]
    # last of the options added here: it takes one word, other options would consume a target after
    # them
    snakefile = [
        "--snakefile",
        str(ROOT / "Snakefile"),
    ]
    if not asked(DRY, passed_on):
        options += logger_options(passed_on)
    if not asked(DRY | TELLING, passed_on):
        try:
            prepare(known, passed_on, results, marks, [*snakemake, *snakefile])
        except ConfigError as error:
            raise SystemExit(f"quantgrid: {error}") from None
    os.environ |= marks
    os.execv(sys.executable, [*snakemake, *options, *snakefile, *passed_on])


if __name__ == "__main__":
    main()
