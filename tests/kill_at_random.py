"""kill -9 of the driver and of jobs at random moments of a run: what `make stress` calls, and a
short version in the tests.

    python tests/kill_at_random.py [--moments 30] [--seed 1] [--cold]

Runs the smoke config once in peace, then with kills until their number is reached, from nothing
again whenever it completes before. After every completed run the results have to be the bytes of
the run in peace.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from checkouts import RESULT_FILES, Checkout, running_jobs


def victim(checkout: Checkout, driver: int, kind: str, chance: random.Random) -> tuple[int, str] | None:
    """(process id, what it is) of the driver or of one of its jobs; None where no job runs."""
    if kind == "driver":
        return driver, "driver"
    jobs = running_jobs(checkout.folder)
    if not jobs:
        return None
    job = chance.choice(jobs)
    try:
        return job, Path(f"/proc/{job}/cmdline").read_text().split("run_job.py\0")[1].split("\0")[0]
    except (OSError, IndexError):  # it has just ended
        return None


def kills(
    checkout: Checkout,
    config: str,
    moments: int,
    seed: int,
    longest: float,
    expected: dict[str, bytes],
    results: str,
    *options: str,
) -> Iterator[str]:
    """Run ``config`` with ``options`` to its end through ``moments`` kills, at most ``longest``
    seconds apart; yields what was killed.

    Raises AssertionError where a completed run left other bytes than ``expected``, or where the
    last run, in peace, did not complete.
    """
    chance, driver, done, hurt = random.Random(seed), None, 0, False
    while done < moments:
        if driver is None or driver.poll() is not None:
            if driver is not None and driver.returncode == 0:
                assert checkout.contents(results, *RESULT_FILES) == expected, f"other results after {done} kills"
                shutil.rmtree(checkout.folder / results)
            assert driver is None or driver.returncode == 0 or hurt, (checkout.folder / f"{config}.log").read_text()[
                -4000:
            ]
            driver, hurt = checkout.start(config, *options), False
        time.sleep(chance.uniform(0.1, longest))
        found = victim(checkout, driver.pid, chance.choice(["driver", "job"]), chance)
        if driver.poll() is not None or found is None:
            continue
        try:
            os.kill(found[0], signal.SIGKILL)
        except ProcessLookupError:
            continue
        done, hurt = done + 1, True
        yield found[1]
        if found[1] == "driver":
            driver.wait()
            driver = None
    if driver is not None:
        driver.wait()
    checkout.run(config, *options)
    assert checkout.contents(results, *RESULT_FILES) == expected, f"other results after {done} kills"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=float, default=20, help="seconds between two kills at most")
    parser.add_argument("--cold", action="store_true", help="every job a fresh interpreter")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        peaceful, checkout = (Checkout.make(Path(folder) / name) for name in ("peaceful", "killed"))
        results = peaceful.config()["results_dir"]
        peaceful.run("smoke")
        expected, killed = peaceful.contents(results, *RESULT_FILES), Counter()
        for what in kills(
            checkout, "smoke", given.moments, given.seed, given.longest, expected, results, *["--cold"] * given.cold
        ):
            killed[what] += 1
            print(f"{killed.total():3d} killed: {what}", flush=True)
    print(
        f"{len(expected)} files are the same bytes after {killed.total()} kills "
        f"({', '.join(f'{what} {n}' for what, n in killed.most_common())})"
    )


if __name__ == "__main__":
    main()
