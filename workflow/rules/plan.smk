# The plan of a run: the config checked, every step described, before any rule is asked for.
# Jobs run as `python scripts/<rule>.py`, with the interpreter that runs Snakemake unless a conda environment brings its own.

from snakemake.exceptions import WorkflowError

sys.path.insert(0, os.path.join(workflow.basedir, "scripts"))
os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), os.getenv("PATH", "")]),
    # Where the scripts are, so that the workflow also runs from elsewhere (as a module).
    QUANTGRID_SCRIPTS=os.path.relpath(os.path.join(workflow.basedir, "scripts")),
    # Freed memory stays with the process: fresh pages for every large tensor cost up to a third of a quantization.
    MALLOC_MMAP_MAX_="0",
    MALLOC_TRIM_THRESHOLD_=str(1 << 40),
)

from quantgrid.config import check
from quantgrid.errors import ConfigError
from quantgrid.pipeline import CELL_PATH, Plan
from quantgrid.shown_transforms import FIGURES

try:
    PLAN = Plan(check(config))
    EVALUATIONS = PLAN.all_evaluations()
except ConfigError as error:
    raise WorkflowError(str(error)) from None

RESULTS = PLAN.results
PARTIAL_REPORT = PLAN.reporting_spec("build_report")
STUDIES = list(PLAN.studies)
COMPARED = [study for study in STUDIES if "compare" in PLAN.config["studies"][study]]
LOSSES = list(PLAN.trainings().values())
DISTRIBUTIONS = PLAN.distributions()
CELL = CELL_PATH
THREADS = PLAN.config["threads"]
KEEP = PLAN.config["keep_checkpoints"]
CHECKPOINTS = PLAN.all_checkpoints() if KEEP else []


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
