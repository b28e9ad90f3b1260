# The plan of a run: the config checked, every step described, before any rule is asked for.
# Jobs run as `python scripts/<rule>.py`, with the interpreter that runs Snakemake unless a conda environment brings its own.

from snakemake.exceptions import WorkflowError


include: "checkout.smk"


SCRIPTS = os.path.join(checkout(workflow.current_basedir), "scripts")
sys.path.insert(0, SCRIPTS)

from quantgrid.allocator import KEEP_FREED
from quantgrid.config import check, read
from quantgrid.errors import ConfigError
from quantgrid.estimates import CPU, GPU, Estimate
from quantgrid.gates import Gates
from quantgrid.locks import hold
from quantgrid.pipeline import Plan
from quantgrid.preflight import crowded, in_memory, made_again, needs, require_room
from quantgrid.shown_transforms import FIGURES
from quantgrid.steps import CELL_PATH

os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), os.getenv("PATH", "")]),
    QUANTGRID_SCRIPTS=os.path.relpath(SCRIPTS),
    **KEEP_FREED,
)

try:
    if workflow.is_main_process:
        for written in workflow.configfiles:  # as Snakemake reads them, the last of several equal keys wins
            read(os.path.relpath(written))
    PLAN = Plan(check(config))
    EVALUATIONS = PLAN.all_evaluations()
    ESTIMATE = Estimate(PLAN)
except ConfigError as error:
    sys.exit(f"quantgrid: {error}")  # a WorkflowError would come with a line of this file

RESULTS = PLAN.results
GATES = Gates(PLAN)
CLAIMS = os.path.relpath(os.path.join(SCRIPTS, "..", "config", "claims.yaml"))  # quantgrid's own, also as a module
PARTIAL_REPORT = PLAN.reporting_spec("build_report")
STUDIES = list(PLAN.studies)
COMPARED = [study for study in STUDIES if "compare" in PLAN.config["studies"][study]]
LOSSES = list(PLAN.trainings().values())
DISTRIBUTIONS = PLAN.distributions()
DEPTHS = PLAN.depths()
# Records of the content of what the report shows.
REPORTED = [PLAN.digest(rule) for rule in ("collect_results", "evaluate_claims", "plot_pareto", "plot_number_lines")]
REPORTED += [PLAN.digest("plot_losses")] * bool(LOSSES) + [PLAN.digest("plot_depth")] * bool(DEPTHS)
REPORTED += [PLAN.digest("plot_distributions").format(model=model) for model in DISTRIBUTIONS]
REPORTED += [PLAN.digest(rule).format(study=study) for rule in ("collect_study", "tabulate_study", "plot_study") for study in STUDIES]
REPORTED += [PLAN.digest("compare_study").format(study=study) for study in COMPARED]
CELL = CELL_PATH
# Between-workflow caching: `run_workflow.py` names the rules to Snakemake where this variable is set.
CACHE = bool(os.environ.get("SNAKEMAKE_OUTPUT_CACHE"))
ENVIRONMENT = "../../envs/cpu.yaml" if PLAN.config["compute"]["device"] == "cpu" else "../../envs/gpu.yaml"  # read with --sdm conda only
KEEP = PLAN.config["keep_checkpoints"]
CHECKPOINTS = PLAN.all_checkpoints() if KEEP else []


def runtime(rule):
    """Function of a rule's wildcards and the attempt that gives the minutes after which the job counts as stuck: on a GPU where a profile asks for one."""
    machine = GPU if "gpu" in workflow.resource_settings.overwrite_resources.get(rule, {}) else CPU
    return lambda wildcards, attempt: attempt * ESTIMATE.minutes(PLAN.steps[rule][frozenset(wildcards.items())], machine)


def preflight(jobs, local):
    """Say what the largest of ``jobs`` take, and stop where one alone has no room; ``local``: whether they run on this machine."""
    jobs = [job for job in jobs if not job.is_group()]
    single = [(job.rule.name, job.wildcards) for job in jobs]
    found = needs(PLAN, single)
    said = "\n  ".join(["largest jobs, as predicted (scripts/quantgrid/resources.py):", *map(str, found)])
    if local:
        said = "\n".join([said, *crowded(PLAN, {rule for rule, _ in single}, workflow.cores)])
    said = "\n".join([said, *made_again(dict(job.output.items()) for job in jobs)])
    sys.stderr.write(f"{said}\n")  # at once: Snakemake's own messages come from another thread
    try:
        require_room(found, RESULTS, in_memory(PLAN, local))
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


def take_lock():
    """Hold the lock of the results folder, once per driver; there is none in object storage."""
    try:
        if workflow.is_main_process and not workflow.storage_settings.default_storage_provider:
            hold(RESULTS)
    except ConfigError as error:
        sys.exit(f"quantgrid: {error}")


if not workflow.modifier.is_main_snakefile() and not workflow.output_settings.dryrun:
    take_lock()  # Snakemake runs no onstart of a module


wildcard_constraints:
    key="[0-9a-f]{10}",
    study="|".join(map(re.escape, STUDIES)),
    model="[^/]+",
    transform="[^/]+",
    mitigation="[^/]+",
    granularity="[^/]+",
    format="[^/]+",
    corpus="[^/]+",
    calibration="[^/]+",
    target="[^/]+",
