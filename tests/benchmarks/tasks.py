"""Speed of zero-shot scoring: ``python tests/benchmarks/tasks.py`` (``make bench BENCH=tasks``).

Items of four choices in two forms, cut from the builtin corpus: long contexts with endings of a
sentence, as HellaSwag has them, and short questions with answers of a few words, as ARC has them. Both
sides score the same tokens on the same model: quantgrid with every context once, lm-eval's own scorer
at the batch size of BATCHES that is its fastest. The model is the first of the config, in float32.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from prepared import make  # noqa: E402
from records import record, show, timed_row  # noqa: E402
from turns import medians  # noqa: E402

from quantgrid.config import validation as configs  # noqa: E402
from quantgrid.plan.pipeline import Plan  # noqa: E402

BENCHMARK, PEER = "tasks", "lm-eval"
BATCHES = (1, 4, 16, 64)
# form -> (words of a context, words of a choice, highest ratio of times that is the goal)
FORMS = {"as in HellaSwag": (40, 14, 0.5), "as in ARC": (16, 3, 0.4)}
CHOICES = 4


def model_folder(options: argparse.Namespace, scratch: Path) -> Path:
    """Canonical folder of the model, made by the workflow where it is not there yet."""
    content = {**configs.read(options.config), "results_dir": str(options.results)}
    plan = Plan(configs.check(content))
    folder = plan.fetch_model(options.model or next(iter(content["models"]))).outputs["folder"]
    make(content, scratch, [folder], options.threads)
    return ROOT / folder


def requests(form: str, items: int, tokenizer: Any) -> list[tuple[tuple[str, str], list[int], list[int]]]:
    """Requests ((context, choice), tokens, tokens) of ``items`` items of one form."""
    from quantgrid.evaluation.tasks import passages

    context, choice, _ = FORMS[form]
    words = [word for _, passage in passages() for word in passage]
    drawn, found = random.Random(0), []
    for _ in range(items):
        texts = []
        for size in (context, *[choice] * CHOICES):
            start = drawn.randrange(len(words) - size)
            texts.append(" ".join(words[start : start + size]))
        question, *answers = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in [texts[0], *texts[1:]])
        found += [((texts[0], text), list(question), list(answer)) for text, answer in zip(texts[1:], answers)]
    return found


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Rows of both forms."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from quantgrid.corpora.tokenization import load_tokenizer
    from quantgrid.evaluation.harness import Harness
    from quantgrid.evaluation.shared_contexts import items_of
    from quantgrid.quantization.checkpoints import load_full_precision

    torch.set_num_threads(options.threads)
    model, tokenizer, rows = load_full_precision(folder), load_tokenizer(folder), []
    own = Harness(pretrained=model, tokenizer=tokenizer, batch_size=options.batch)
    peers = {
        f"{PEER}, {size} at a time": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size) for size in BATCHES
    }
    for form, (_, _, goal) in FORMS.items():
        asked = requests(form, options.items, tokenizer)
        calls = {
            name: partial(scorer._loglikelihood_tokens, asked, disable_tqdm=True)
            for name, scorer in {form: own, **peers}.items()
        }
        wanted, found = calls[f"{PEER}, 1 at a time"](), calls[form]()
        worst = max(abs(one - other) for (one, _), (other, _) in zip(found, wanted))
        taken = medians(calls, options.repeats)
        fastest = min(peers, key=taken.__getitem__)
        shared = sum(item.length for item in items_of([request[1:] for request in asked], own.max_length))
        alone = sum(len(before) + len(scored) - 1 for _, before, scored in asked)
        print(f"{form}: forward tokens {shared} against {alone} ({shared / alone:.2f}); scores differ by {worst:.1e}")
        items = {name: f"{1e3 * options.items / taken[name]:.3g} items/s" for name in taken}
        rows.append(
            timed_row(
                BENCHMARK,
                form,
                options.threads,
                fastest,
                taken,
                goal,
                rate=items[form],
                reference_rate=items[fastest],
                repeats=options.repeats,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of benchmarks.csv and .md")
    parser.add_argument("--config", default="config/config.yaml", help="where the model is defined")
    parser.add_argument("--model", help="name of a model there; by default the first")
    parser.add_argument("--items", type=int, default=32, help="items of each form")
    parser.add_argument("--batch", type=int, default=8, help="contexts at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="as many as a job of the workflow has")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantgrid-bench-") as scratch:
        folder = model_folder(options, Path(scratch))
    rows = measure(options, folder)
    for row in rows:
        show(row)
    record(BENCHMARK, rows, ROOT / options.results)


if __name__ == "__main__":
    main()
