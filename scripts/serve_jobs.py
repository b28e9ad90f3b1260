"""Run the jobs of a run without their start-up: what `run_workflow.py --warm` starts (`quantgrid.warm`)."""

import sys

from quantgrid.warm import serve

if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
