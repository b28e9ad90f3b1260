"""Start the fork server of `run_workflow.py --warm` (`quantgrid.jobs.fork_server`)."""

import sys

from quantgrid.jobs.fork_server import library_modules, serve

if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]), library_modules())
