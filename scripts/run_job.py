"""Run the script of a rule with a header in its log (rule, versions, seed), a footer (seconds, peak
memory) and a record of both (`--costs`). Every rule calls it.

    python scripts/run_job.py quantize_model --spec JSON --model FOLDER ...

It verifies every file that the job reads, and records every file that it wrote
(`quantgrid.jobs.integrity`); `--verify` names further files to verify. A job that may use a GPU
reserves one for itself (`quantgrid.machine.gpus`). In a run with a warm start the job is a fork of
a process with all imports done (`quantgrid.jobs.fork_server`), and this process imports little.
"""

from quantgrid.jobs import fork_client

if __name__ == "__main__":
    if (server := fork_client.connect()) and (status := fork_client.hand_over(server)) is not None:
        raise SystemExit(status)
    from quantgrid.jobs.rule_job import main

    main()
