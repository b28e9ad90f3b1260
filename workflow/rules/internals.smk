# Uses of Snakemake beyond its documented interface. tests/unit/plan/test_rules.py names
# the version that they were tested with.

import tarfile
import tempfile
import threading
import time
from pathlib import Path

WAKE_SECONDS = 3.0  # between two looks at jobs that are ready and do not start


def checkout():
    """Find the folder of the workflow, also if another Snakefile imports it as a module.

    A module comes from a folder or from a repository at a tag. From ``github(...)`` or ``gitlab(...)``
    Snakemake reads only the rules. To get the scripts, that commit is unpacked below ``.snakemake``.
    """
    rules = workflow.current_basedir
    place = rules.get_path_or_uri(secret_free=True)
    if os.path.isdir(place):
        return os.path.normpath(os.path.join(place, "..", ".."))
    repository = rules.hosted_repo.repo
    commit = repository.commit(rules.ref).hexsha
    folder = Path(".snakemake", "quantgrid", commit)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, tempfile.TemporaryFile() as packed:
            repository.archive(packed, commit)
            packed.seek(0)
            with tarfile.open(fileobj=packed) as archive:
                archive.extractall(Path(temporary, commit), filter="data")
            os.replace(Path(temporary, commit), folder)
    return str(folder.resolve())


def is_driver():
    """Check whether this process plans and starts the run; a job on another machine reads the rules again."""
    return workflow.is_main_process


def is_module():
    """Check whether another workflow imports these rules."""
    return not workflow.modifier.is_main_snakefile()


def is_dry_run():
    return workflow.output_settings.dryrun


def config_files():
    return workflow.configfiles


def uses_object_storage():
    return bool(workflow.storage_settings.default_storage_provider)


def runs_locally():
    """Check whether jobs run on this machine."""
    return workflow.local_exec


def leave_no_timers():
    """Take Snakemake's default limit of job starts (100/1s) away before the first job; another limit stays.

    Under a limit every finished job leaves a timer that wakes the scheduler as long as jobs are ready, also where the
    limit is never reached: after 450 jobs the driver took a quarter of a core or more (read from top). One timer
    replaces them: it wakes the scheduler for another sample of the ready jobs (``scheduler-subsample``). As a module
    the rules have no say in this.
    """
    asked, usual = workflow.scheduling_settings.max_jobs_per_timespan, (100, 1)  # jobs, seconds
    scheduler = workflow.scheduler
    if not asked or (asked.max_jobs, asked.timespan) != usual:
        return

    def wake():
        while True:
            time.sleep(WAKE_SECONDS)
            scheduler._open_jobs.release()

    scheduler.job_rate_limiter = None
    threading.Thread(target=wake, daemon=True).start()


def asks_for_gpu(rule):
    """Check whether a profile or the command line gives the jobs of ``rule`` a GPU."""
    return "gpu" in workflow.resource_settings.overwrite_resources.get(rule, {})


def planned_jobs():
    """List (rule, wildcards, outputs by name) of every job of this run."""
    return [
        (job.rule.name, job.wildcards, dict(job.output.items()))
        for job in workflow.dag.needrun_jobs()
        if not job.is_group()
    ]


def name_slurm_jobs(title, for_all_jobs):
    """Call Slurm jobs after what they do, in the queue and in the folder of their logs.

    ``title``: steps (rule, wildcards) -> name; ``for_all_jobs``: query by name -> query of all jobs of the user.
    """
    plugin = sys.modules.get("snakemake_executor_plugin_slurm")
    if plugin is None or hasattr(plugin, "named_by_quantgrid"):
        return

    def named(job):
        jobs = job.jobs if job.is_group() else [job]
        return title((each.rule.name, dict(each.wildcards.items())) for each in jobs)

    try:
        squeue = for_all_jobs(plugin.query_job_status_squeue, " --me")
        sacct = for_all_jobs(plugin.query_job_status_sacct)
    except (AttributeError, ValueError) as error:
        sys.stderr.write(f"quantgrid: the Slurm plugin names its jobs itself: {error}\n")
        return
    plugin.named_by_quantgrid, submit = True, plugin.get_submit_command
    plugin.query_job_status_squeue, plugin.query_job_status_sacct = squeue, sacct
    plugin.get_job_wildcards = lambda job: named(job).partition(":")[2]
    plugin.get_submit_command = lambda job, about, **others: submit(job, about | {"run_uuid": named(job)}, **others)
