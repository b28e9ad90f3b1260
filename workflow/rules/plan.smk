# The plan of a run: checks the config and defines every step before any rule is evaluated.
# Jobs run as `python scripts/run_job.py <rule>` with the interpreter of Snakemake, or with that of
# a conda environment.
#
# Every rule writes its logs, conda, threads and resources out; the values come from the
# plan and the helpers below. Inheritance by `use rule` would save the line `conda` alone:
# docs/decisions/0004-shell-rules-with-specifications.md has the reasons.

from snakemake.exceptions import WorkflowError


include: "internals.smk"


if is_driver() and not is_module():
    gc.disable()  # what planning makes stays until the end; onstart enables it again


SCRIPTS = os.path.join(checkout(), "scripts")
sys.path.insert(0, SCRIPTS)

from quantgrid.machine.gpus import card_memory
from quantgrid.machine.malloc import KEEP_FREED
from quantgrid.config import check, read
from quantgrid.jobs.drivers import DRIVER, HELD
from quantgrid.ground.errors import ConfigError
from quantgrid.plan.estimates import CPU, GPU, Estimate
from quantgrid.plan.baseline_checks import BaselineChecks
from quantgrid.jobs.locks import hold
from quantgrid.jobs.progress import predict
from quantgrid.jobs import slurm_names
from quantgrid.plan.pipeline import Plan
from quantgrid.plan.preflight import crowded, in_memory, made_again, needs, on_card, require_room
from quantgrid.plan.rule_lookups import signed
from quantgrid.config.shown_transforms import FIGURES
from quantgrid.config.cells import AXES, Cell
from quantgrid.plan.steps import CELL_PATH as CELL, outputs_of

os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), os.getenv("PATH", "")]),
    QUANTGRID_SCRIPTS=os.path.relpath(SCRIPTS),
    **KEEP_FREED,
)

try:
    if is_driver():
        if os.environ.get(DRIVER) == str(os.getpid()) and os.environ.get(HELD):
            hold(os.environ[HELD])  # before onstart, which Snakemake skips if there is nothing to do
        for written in config_files():  # in Snakemake's order: the last of equal keys wins
            read(os.path.relpath(written))
    PLAN = Plan(check(config))
    EVALUATIONS = PLAN.all_evaluations()
    EXPORTS = PLAN.all_exports()
    ESTIMATE = Estimate(PLAN)
except ConfigError as error:
    sys.exit(f"quantgrid: {error}")  # a WorkflowError would add a line of this file

RESULTS = PLAN.results
CHECKS = BaselineChecks(PLAN)
CLAIMS = os.path.relpath(os.path.join(SCRIPTS, "..", "config", "claims.yaml"))  # quantgrid's file, also as a module
PARTIAL_REPORT = PLAN.reporting_spec("build_report")
STUDIES = list(PLAN.studies)
COMPARED = [study for study in STUDIES if "compare" in PLAN.config["studies"][study]]
AWAITED = [gate.outputs["result"] for study in STUDIES for gate in PLAN.study_gates(study)]  # by quantized cells
AWAITED = list(
    dict.fromkeys([*AWAITED, *(path for study in STUDIES for path in CHECKS.of_study(CHECKS.pattern, study))])
)
LOSSES = list(PLAN.trainings().values())
DISTRIBUTIONS = PLAN.distributions()
RESIDUAL_ERRORS = PLAN.measures_residual_error()
ALLOCATIONS = PLAN.allocations()
# Content records of the files shown in the report.
REPORTED = [PLAN.digest(rule) for rule in ("collect_results", "evaluate_claims", "plot_pareto", "plot_number_lines")]
REPORTED += [PLAN.digest("plot_losses")] * bool(LOSSES) + [PLAN.digest("plot_residual_error")] * bool(RESIDUAL_ERRORS)
REPORTED += [PLAN.digest("plot_allocations")] * bool(ALLOCATIONS)
REPORTED += [PLAN.digest("plot_distributions").format(model=model) for model in DISTRIBUTIONS]
REPORTED += [
    PLAN.digest(rule).format(study=study)
    for rule in ("collect_study", "tabulate_study", "plot_study")
    for study in STUDIES
]
REPORTED += [PLAN.digest("compare_study").format(study=study) for study in COMPARED]
# Between-workflow caching: `run_workflow.py` passes these rules to Snakemake if the variable is set.
CACHE = bool(os.environ.get("SNAKEMAKE_OUTPUT_CACHE"))
# read with --sdm conda only
ENVIRONMENT = "../../envs/cpu.yaml" if PLAN.config["compute"]["device"] == "cpu" else "../../envs/gpu.yaml"
KEEP = PLAN.config["keep_checkpoints"]
CHECKPOINTS = PLAN.all_checkpoints() if KEEP else []


def limits(rule):
    """Resource limits of a job, functions of wildcards and the attempt: memory (``mem_mb``) and timeout
    in minutes (``runtime``, for a GPU if a profile requests one)."""
    machine = GPU if asks_for_gpu(rule) else CPU

    @signed
    def runtime(wildcards, attempt):
        return attempt * ESTIMATE.minutes(PLAN.steps[rule][frozenset(wildcards.items())], machine)

    return {"mem_mb": PLAN.memory_mb(rule), "runtime": runtime}


def command(rule, reads="", verify="", **others):
    """Build the shell command of a rule, one option per line.

    ``--name path`` for each input in ``reads`` and each output; then the record of the costs; the specification
    is last.

    ``verify``: inputs to verify that the script does not read. ``others``: options with their values.
    """
    options = {name: f"{{input.{name}:q}}" for name in reads.split()} | others
    options |= {"verify": " ".join(f"{{input.{name}:q}}" for name in verify.split())} if verify else {}
    options |= {name: f"{{output.{name}:q}}" for name in outputs_of(rule)}
    options |= {"costs": "{log.costs:q}", "spec": "{params.spec:q}"}
    lines = [
        f'python "$QUANTGRID_SCRIPTS/run_job.py" {rule}',
        *(f"--{name} {value}" for name, value in options.items()),
        "> {log.text:q} 2>&1",
    ]
    return " \\\n    ".join(lines)


def gates_of(wildcards):
    """List the gates that a cell has to pass."""
    return PLAN.gates(Cell(**{axis: getattr(wildcards, axis) for axis in AXES.values()}))


def inputs_of_cell(rule):
    """Return the input function of a rule that quantizes a cell. Its job reads inputs of the plan and waits for the
    baseline check and the gates.

    The latter are ancient: the job does not read them, and a check that is made again quantizes nothing again.
    """
    inputs, check, check_digest = PLAN.inputs(rule), CHECKS.of_cell(CHECKS.pattern), CHECKS.of_cell(CHECKS.digest)

    @signed
    def named(wildcards):
        gates = gates_of(wildcards)
        awaited = {
            "baseline_check": check(wildcards),
            "baseline_check_digest": check_digest(wildcards),
            "gates": [gate.outputs["result"] for gate in gates],
            "gate_digests": [gate.digest for gate in gates],
        }
        return {**inputs(wildcards), **{name: [ancient(path) for path in paths] for name, paths in awaited.items()}}

    return named


def packed(path):
    """Declare the output of a packed checkpoint: temporary, unless the config keeps checkpoints."""
    return path if KEEP else temp(path)


def forecast(jobs, local):
    """Predict the seconds of all ``jobs``, from which the log of the run estimates the time left."""
    on_gpu = local and not in_memory(PLAN, local)
    machines = {rule: GPU if on_gpu or asks_for_gpu(rule) else CPU for rule, _, _ in jobs}
    named = [(rule, dict(wildcards.items())) for rule, wildcards, _ in jobs]
    predict((rule, wildcards, ESTIMATE.seconds_of(rule, wildcards, machines[rule])) for rule, wildcards in named)


def preflight(jobs, local):
    """Print the resources of the largest ``jobs``, and stop if one cannot fit; ``local``: on this machine."""
    single = [(rule, wildcards) for rule, wildcards, _ in jobs]
    card = on_card(PLAN)
    found = needs(PLAN, single, card)
    said = "\n  ".join(["largest jobs, as predicted (scripts/quantgrid/machine/memory.py):", *map(str, found)])
    if local:
        said = "\n".join([said, *crowded(PLAN, {rule for rule, _ in single}, workflow.cores)])
    said = "\n".join([said, *made_again(outputs for _, _, outputs in jobs)])
    sys.stderr.write(f"{said}\n")  # unbuffered: Snakemake prints its messages from another thread
    try:
        require_room(found, RESULTS, in_memory(PLAN, local), card_memory() if local and card else None)
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


def take_lock():
    """Lock the results folder, once per driver; object storage has no lock."""
    try:
        if is_driver() and not uses_object_storage():
            hold(RESULTS)
    except ConfigError as error:
        sys.exit(f"quantgrid: {error}")


if is_module() and not is_dry_run():
    take_lock()  # Snakemake does not run onstart of a module
if is_driver():
    name_slurm_jobs(slurm_names.title, slurm_names.for_all_jobs)


wildcard_constraints:
    key="[0-9a-f]{10}",
    study="|".join(map(re.escape, STUDIES)),
    model="[^/]+",
    transform="[^/]+",
    mitigation="[^/]+",
    granularity="[^/]+",
    format="[^/]+",
    corpus="[^/]+",
    shard="[0-9]+-([0-9]+|all)",
    look="[0-9]+",
    calibration="[^/]+",
    target="[^/]+",
    to="[^/]+",
