"""Start the fork server of `run_workflow.py --warm` (`quantgrid.jobs.fork_server`)."""

import sys

from quantgrid.jobs.fork_server import serve

if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
