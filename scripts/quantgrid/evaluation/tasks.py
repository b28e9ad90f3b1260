"""Zero-shot tasks through lm-eval, with per-sample outcomes.

https://github.com/EleutherAI/lm-evaluation-harness

``lm_eval``  {task: piqa}: any task that lm-eval knows by name; its data set comes from the hub.
``local``    {path}: a file of documents of one layout (:mod:`.task_documents`), scored as lm-eval
             scores the corresponding task:
             {query, choices, gold}                 highest log-likelihood (ARC, COPA, ...)
             {context, continuation}                greedy decoding yields it (LAMBADA)
             {context_options, continuation, gold}  the context with the likeliest continuation
                                                    (WinoGrande, partial evaluation)
``builtin``  {kind: cloze | continuation, items}: generated from the evaluation part of the builtin
             corpus; needs no file and no network.

Other keys: metric (acc), shots (0; lm_eval only), filter (lm_eval only), delimiter, whitespace,
duplicate_choices (local). Whitespace at the end of a context is scored with the answer, as in every
lm-eval task: tokens often span it. Only jobs of this module import lm-eval: it takes seconds, and
15 s more to find a task by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import metadata
from itertools import groupby
from typing import Any

from ..corpora import token_windows
from ..ground.errors import ConfigError, NumericalFailure, unknown_name
from ..machine.chunks import AUTO, batch_tokens
from .protocols import SCORED_IN, of_task
from .task_documents import LAYOUTS, METRICS, delimiter_of, layout_of, read_documents

SOURCES = ("lm_eval", "local", "builtin")
KINDS = ("cloze", "continuation")
CONTEXT_WORDS, CONTINUATION_WORDS, CHOICES = 36, 12, 4


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Mapping[str, Any]],
    limit: int | None = None,
    batch_size: int | str = 8,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Evaluate ``tasks``: name -> result.

    A result is {metric, value, stderr, count, outcomes (per document, in order), version, shots,
    lm_eval, protocol, ...}. ``model`` and ``tokenizer`` are transformers objects, the model on its
    device; ``limit`` selects the first N documents of each task. ``batch_size`` counts the contexts
    of a batch; ``auto`` puts as many into one as fit in the ``batch_tokens`` of the result. A failed
    task is {status: failed, reason}; the others are still measured. If all fail, raises
    :class:`ConfigError` for unavailable tasks, :class:`NumericalFailure` for a log-likelihood that is
    not finite.
    """
    from .harness import Harness

    chosen = {"batch_tokens": batch_tokens(model.device.type)} if batch_size == AUTO else {}
    batch = {"tokens": chosen["batch_tokens"]} if chosen else {"batch_size": batch_size}
    with _quiet("lm_eval.models.huggingface"):  # it warns of every model that is not a path
        harness = Harness(pretrained=model, tokenizer=tokenizer, softmax_dtype=SCORED_IN, **batch)
    dtype = str(model.dtype).removeprefix("torch.")
    found: dict[str, dict[str, Any]] = {}
    failures: list[Exception] = []
    for name, entry in tasks.items():
        try:
            result = {**_measured(name, entry, harness, limit, seed), **chosen}
            found[name] = {**result, "protocol": of_task(result, batch_size, limit, dtype)}
        except (ConfigError, NumericalFailure) as failure:
            failures.append(failure)
            found[name] = {"status": "failed", "reason": str(failure), "source": entry["source"]}
    if tasks and len(failures) == len(tasks):
        broken = any(isinstance(failure, NumericalFailure) for failure in failures)
        raise (NumericalFailure if broken else ConfigError)("; ".join(map(str, failures)))
    return found


def _measured(name: str, entry: Mapping[str, Any], harness: Any, limit: int | None, seed: int) -> dict[str, Any]:
    """Evaluate one task; exceptions from task code of lm-eval become a :class:`ConfigError`."""
    from lm_eval.evaluator import evaluate as run

    built = build_tasks({name: entry}, seed)[name]
    harness.truncated = 0
    try:
        samples = run(
            harness, {"tasks": built, "groups": {}, "group_map": {}}, limit=limit, bootstrap_iters=0, log_samples=True
        )["samples"]
    except ConfigError as error:
        raise ConfigError(f"tasks.{name}: {error}") from None
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"tasks.{name}: lm-eval cannot score it: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    how = {key: entry[key] for key in ("delimiter", "whitespace") if key in entry}
    return {**_score(name, entry, samples, list(built.values())), **how, "truncated": harness.truncated}


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Suppress warnings of the logger ``name``."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def build_tasks(tasks: Mapping[str, Mapping[str, Any]], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Name -> {lm-eval task name: Task object}; several for a group such as mmlu."""
    built: dict[str, dict[str, Any]] = {}
    for name, entry in tasks.items():
        source = entry.get("source")
        if source not in SOURCES:
            raise ConfigError(f"tasks.{name}.source: {unknown_name('source', source, SOURCES)}")
        if source == "lm_eval":
            built[name] = _named_task(name, entry)
        else:
            documents = (
                read_documents(entry, f"tasks.{name}")
                if source == "local"
                else make_documents(entry, seed, f"tasks.{name}")
            )
            built[name] = {name: _task_of(name, documents, entry)}
        for task in built[name].values():
            task.set_config("num_fewshot", entry.get("shots", 0))
            task.set_fewshot_seed(seed)
    return built


def _named_task(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if entry.get("task") not in manager.all_tasks:
        close = get_close_matches(str(entry.get("task")), manager.all_tasks, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(
            f"tasks.{name}.task: lm-eval {metadata.version('lm_eval')} has no task '{entry.get('task')}'{hint} "
            "(`lm-eval ls tasks` lists all)"
        )
    try:
        return manager.load([entry["task"]])["tasks"]
    except Exception as error:  # datasets, the hub and task code raise different exceptions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"tasks.{name}: the data of lm-eval's '{entry['task']}' cannot be read: {reason} (it comes from the "
            "Hugging Face hub; offline, use source: local or builtin)"
        ) from None


def _task_of(name: str, documents: list[dict[str, Any]], entry: Mapping[str, Any]) -> Any:
    """lm-eval task on in-memory documents of one layout, without any cache."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    layout = layout_of(documents[0])
    delimiter = delimiter_of(entry, layout)[1] if layout == "choices" else ""
    hashed = documents if delimiter == LAYOUTS[layout].delimiter else [delimiter, documents]
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    config = {
        **LAYOUTS[layout].settings,
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
        "test_split": "test",
        "target_delimiter": delimiter,
        "num_fewshot": 0,
        "metadata": {"version": 1, "documents_sha256": digest},
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in METRICS[layout]
        ],
    }
    with _quiet("lm_eval.api.task"):  # it explains its command line for every custom data set
        return ConfigurableTask(config=config)


def passages() -> list[tuple[str, list[str]]]:
    """(topic, words) of disjoint prose passages of 48 words in the evaluation part of the builtin
    corpus."""
    size, found = CONTEXT_WORDS + CONTINUATION_WORDS, []
    for topic, text in enumerate(token_windows.read({"source": "builtin", "part": "evaluation"})):
        for prose, paragraphs in groupby(re.split(r"\n\s*\n", text), _is_prose):
            words = " ".join(paragraphs).split() if prose else []
            found += [(str(topic), words[at : at + size]) for at in range(0, len(words) - size + 1, size)]
    return found


def _is_prose(paragraph: str) -> bool:
    """Check whether a paragraph is prose: at least eight words, nearly all letters and spaces."""
    plain = sum(character.isalpha() or character in " \n.,;'" for character in paragraph)
    return (
        len(paragraph.split()) >= 8 and plain >= 0.93 * len(paragraph) and not paragraph.startswith(("   >>>", ">>>"))
    )


def make_documents(entry: Mapping[str, Any], seed: int = 0, where: str = "task") -> list[dict[str, Any]]:
    """Documents of a generated task: ``items`` passages drawn by ``seed``; fewer are a prefix of
    more.

    ``cloze``: a word that occurred earlier in the passage, given all text before it.
    ``continuation``: the 12 words that follow 36, among those of three passages from other topics.
    """
    kind, items = entry.get("kind"), entry.get("items", 100)
    if kind not in KINDS:
        raise ConfigError(f"{where}.kind: {unknown_name('kind', kind, KINDS)}")
    drawn, all_passages = random.Random(seed), passages()
    order = drawn.sample(all_passages, len(all_passages))
    made = (
        [_cloze(words) for _, words in order]
        if kind == "cloze"
        else [_continuation(topic, words, order, drawn) for topic, words in order]
    )
    documents = [document for document in made if document]
    if not (type(items) is int and 0 < items <= len(documents)):
        raise ConfigError(f"{where}.items: {items!r}; accepted for kind '{kind}' are 1 to {len(documents)} items")
    return documents[:items]


def _cloze(words: list[str]) -> dict[str, Any] | None:
    for at in range(len(words) - 1, CONTEXT_WORDS // 2, -1):
        word = words[at].rstrip(".,;")
        if len(word) >= 4 and word.isalpha() and word in {earlier.rstrip(".,;") for earlier in words[:at]}:
            return {"context": " ".join(words[:at]), "continuation": " " + word}
    return None


def _continuation(
    topic: str, words: list[str], others: list[tuple[str, list[str]]], drawn: random.Random
) -> dict[str, Any]:
    wrong = drawn.sample([other[CONTEXT_WORDS:] for name, other in others if name != topic], CHOICES - 1)
    gold = drawn.randrange(CHOICES)
    choices = [" ".join(choice) for choice in wrong[:gold] + [words[CONTEXT_WORDS:]] + wrong[gold:]]
    return {"query": " ".join(words[:CONTEXT_WORDS]), "choices": choices, "gold": gold}


def _score(
    name: str, entry: Mapping[str, Any], samples: Mapping[str, list[dict[str, Any]]], tasks: list[Any]
) -> dict[str, Any]:
    """Result of one task: the mean over all documents with its standard error.

    The tasks of a group count by their sizes.
    """
    outcomes: list[float] = []
    metric = entry.get("metric", "acc")
    for key in sorted(samples):
        kept = [sample for sample in samples[key] if sample["filter"] == entry.get("filter", samples[key][0]["filter"])]
        if not kept or metric not in kept[0] or metric not in kept[0]["metrics"]:
            raise ConfigError(f"tasks.{name}.metric: {unknown_name('metric', metric, samples[key][0]['metrics'])}")
        for sample in sorted(kept, key=lambda sample: sample["doc_id"]):
            scores = [response[0] for response in sample["filtered_resps"] if isinstance(response, (tuple, list))]
            if not all(math.isfinite(score) for score in scores):
                raise NumericalFailure(f"task {name}, document {sample['doc_id']}: a log-likelihood is not finite")
            outcomes.append(sample[metric])
    outcomes = [int(value) if value in (0, 1) else float(value) for value in outcomes]
    count, value = len(outcomes), sum(outcomes) / len(outcomes)
    variance = sum((outcome - value) ** 2 for outcome in outcomes) / (count - 1) if count > 1 else 0.0
    details = tasks[0].config.metadata or {}
    return {
        "metric": metric,
        "value": value,
        "stderr": math.sqrt(variance / count),
        "count": count,
        "outcomes": outcomes,
        "version": str(tasks[0].VERSION),
        "shots": entry.get("shots", 0),
        "source": entry["source"],
        "task": entry.get("task", name),
        "documents_sha256": details.get("documents_sha256"),
        "lm_eval": metadata.version("lm_eval"),
    }
