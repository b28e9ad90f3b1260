"""Record the smoke run's perplexities as golden numbers: run after `make smoke`, when a change of
the numbers is meant."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
AXES = ["model", "transform", "mitigation", "granularity", "format"]


def main() -> None:
    records = pd.read_csv(ROOT / "results-smoke" / "results.csv", keep_default_na=False)
    golden = records[records.metric == "perplexity"][[*AXES, "value"]].rename(columns={"value": "perplexity"})
    golden.assign(perplexity=[f"{float(value):.5g}" for value in golden.perplexity]).to_csv(
        ROOT / "tests/data/golden-smoke.csv", index=False
    )


if __name__ == "__main__":
    main()
