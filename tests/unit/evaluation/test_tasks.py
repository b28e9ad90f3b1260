"""Zero-shot tasks through lm-eval on the tiny model, offline: all layouts, the generated tasks, and
lm-eval's scores against our own."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from quantgrid.corpora import token_windows
from quantgrid.evaluation import tasks
from quantgrid.evaluation.protocols import differences
from quantgrid.ground.errors import ConfigError, NumericalFailure
from quantgrid.ground.places import ROOT
from quantgrid.machine.chunks import BATCH_TOKENS

TINY = ROOT / "tests" / "data" / "tiny-llama"
LINES = {
    "choices": [
        {"query": "The statement", "choices": ["is executed.", "zebra quartz", "the the of"], "gold": 0},
        {"query": "An object", "choices": ["of a of", "is created when the class is called"], "gold": 1},
    ],
    "greedy": [
        {"context": "The __init__() method is called with the", "continuation": "same"},
        {"context": "If the", "continuation": "xylophone"},
    ],
    "contexts": [
        {"context_options": ["The object", "Qq zz"], "continuation": "is not used.", "gold": 0},
        {"context_options": ["The class", "The instance"], "continuation": "is called.", "gold": 1},
    ],
}
BUILTIN = {
    "cloze": {"source": "builtin", "kind": "cloze", "items": 24},
    "continuation": {"source": "builtin", "kind": "continuation", "items": 24},
}


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No hub, and a cache that is empty and stays so."""
    patch = pytest.MonkeyPatch()
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
    }.items():
        patch.setenv(name, value)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def tiny():
    from transformers import AutoTokenizer, LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, lines in LINES.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return {**{name: {"source": "local", "path": str(folder / f"{name}.jsonl")} for name in LINES}, **BUILTIN}


@pytest.fixture(scope="module")
def results(tiny, entries):
    return tasks.evaluate(*tiny, entries, batch_size=4)


def log_likelihood(model, context: str, continuation: str) -> tuple[float, bool]:
    """(sum of log-probabilities of the continuation's tokens, whether each is the likeliest),
    straight from the logits."""
    before = token_windows.encode(context, TINY)
    both = token_windows.encode(context + continuation, TINY)
    with torch.no_grad():
        logits = model(torch.tensor([both])).logits[0].log_softmax(-1)[len(before) - 1 : -1]
    target = torch.tensor(both[len(before) :])
    return logits.gather(1, target[:, None]).sum().item(), bool((logits.argmax(-1) == target).all())


def expected(model, name: str, line: dict) -> int:
    if name == "greedy":
        return int(log_likelihood(model, line["context"], line["continuation"])[1])
    pairs = (
        [(line["query"], " " + choice) for choice in line["choices"]]
        if name == "choices"
        else [(option, " " + line["continuation"]) for option in line["context_options"]]
    )
    scores = [log_likelihood(model, *pair)[0] for pair in pairs]
    return int(scores.index(max(scores)) == line["gold"])


def test_outcomes_are_those_of_the_logits(tiny, entries, results):
    for name, entry in entries.items():
        lines = tasks.read_documents(entry) if entry["source"] == "local" else tasks.make_documents(entry)
        layout = name if name in LINES else {"cloze": "greedy", "continuation": "choices"}[name]
        assert results[name]["outcomes"] == [expected(tiny[0], layout, line) for line in lines], name


def test_results_are_whole_and_plain(results):
    for result in results.values():
        assert (
            result["value"] == sum(result["outcomes"]) / result["count"]
            and result["metric"] == "acc"
            and result["shots"] == 0
        )
        assert result["lm_eval"].startswith("0.") and len(result["documents_sha256"]) == 64
    json.dumps(results, allow_nan=False)
    assert 0 < results["continuation"]["stderr"] < 0.2 and results["greedy"]["count"] == 2


def test_the_model_sees_the_text_of_the_file(tiny, tmp_path, monkeypatch):
    from quantgrid.evaluation.harness import Harness

    seen = []
    scored = Harness._loglikelihood_tokens
    monkeypatch.setattr(
        Harness,
        "_loglikelihood_tokens",
        lambda self, asked, **options: seen.extend(asked) or scored(self, asked, **options),
    )
    (tmp_path / "t.jsonl").write_text(json.dumps({"context": "def f():\n", "continuation": "    return 1\n"}))
    tasks.evaluate(*tiny, {"t": {"source": "local", "path": str(tmp_path / "t.jsonl")}})
    texts, before, answer = seen[0]
    assert texts == ("def f():\n", "    return 1\n") and before + answer == token_windows.encode(
        "def f():\n    return 1\n", TINY
    )


def test_tasks_fail_one_by_one(tiny, entries, results, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"context": "a", "continuation": "long " * 600}))
    asked = {
        "gone": {"source": "local", "path": str(tmp_path / "gone.jsonl")},
        "choices": entries["choices"],
        "long": {"source": "local", "path": str(tmp_path / "long.jsonl")},
        "cloze": entries["cloze"],
    }
    found = tasks.evaluate(*tiny, asked, batch_size=4)
    assert found["gone"] == {
        "status": "failed",
        "reason": f"tasks.gone.path: {tmp_path / 'gone.jsonl'}: no such file",
        "source": "local",
    }
    assert found["long"]["reason"].startswith("tasks.long: 'a' + ") and found["long"]["reason"].endswith(
        "tokens to score, more than the 512 positions of the model"
    )
    assert all(found[name]["outcomes"] == results[name]["outcomes"] for name in ("choices", "cloze"))
    with pytest.raises(ConfigError, match=r"gone\.jsonl: no such file; tasks\.long: "):
        tasks.evaluate(*tiny, {name: asked[name] for name in ("gone", "long")})


def test_a_token_beyond_the_embedding_fails_its_task(tiny, tmp_path):
    model, tokenizer = tiny
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens("<extra>")
    (tmp_path / "t.jsonl").write_text(json.dumps({"context": "a", "continuation": "<extra>"}))
    with pytest.raises(
        ConfigError,
        match="the token '<extra>' with id 512, but the embedding has 512 rows and the tokenizer 513 tokens",
    ):
        tasks.evaluate(model, tokenizer, {"t": {"source": "local", "path": str(tmp_path / "t.jsonl")}})


def test_requests_that_lose_their_beginning_are_counted(tiny, tmp_path, results):
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps({"context": "a b" * count, "continuation": " c"}) for count in (3, 600))
    )
    assert tasks.evaluate(*tiny, {"t": {"source": "local", "path": str(tmp_path / "t.jsonl")}})["t"]["truncated"] == 1
    assert results["cloze"]["truncated"] == 0


def test_batches_that_fill_a_number_of_tokens_are_named_and_score_alike(tiny, entries, results):
    """`batch_size: auto` chooses by the device alone, so that equal configs give equal protocols."""
    found = tasks.evaluate(*tiny, entries, batch_size="auto")
    for name, result in found.items():
        assert result["outcomes"] == results[name]["outcomes"]
        assert result["batch_tokens"] == BATCH_TOKENS["cpu"] == result["protocol"]["batch_tokens"]
        assert result["protocol"]["batch_size"] == "auto" and "batch_tokens" not in results[name]["protocol"]
        protocols = (json.dumps(each["protocol"]) for each in (result, results[name]))
        assert differences(*protocols)[0] == "batch_size 'auto' / 4"


def test_limit_takes_the_first_documents(tiny, entries, results):
    limited = tasks.evaluate(*tiny, {"continuation": entries["continuation"]}, limit=5, batch_size=2)["continuation"]
    assert limited["count"] == 5 and limited["outcomes"] == results["continuation"]["outcomes"][:5]


def test_generated_documents_follow_the_seed_and_come_from_the_evaluation_part():
    for entry in BUILTIN.values():
        documents = tasks.make_documents(entry, 3)
        assert documents == tasks.make_documents({**entry, "items": 50}, 3)[:24] and documents != tasks.make_documents(
            entry, 4
        )
    text = " ".join(" ".join(token_windows.read({"source": "builtin", "part": "evaluation"})).split())
    assert all(document["query"] + " " + document["choices"][document["gold"]] in text for document in documents)
    assert all(len(set(document["choices"])) == 4 for document in documents)
    golds = [document["gold"] for document in tasks.make_documents({"kind": "continuation", "items": 170})]
    assert all(golds.count(gold) > 25 for gold in range(4))


def test_too_many_items_say_how_many_there_are():
    with pytest.raises(ConfigError, match=r"tasks\.t\.items: 100000; accepted for kind 'cloze' are 1 to \d+ items"):
        tasks.make_documents({"kind": "cloze", "items": 100000}, 0, "tasks.t")
    with pytest.raises(ConfigError, match="did you mean 'cloze'"):
        tasks.make_documents({"kind": "close"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "holds no documents"),
        ("{", r"x\.jsonl:1: not a JSON line"),
        ('{"question": "a"}', r"x\.jsonl:1: none of the layouts .*choices, gold, query"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', r"'gold' \(2\) is not an index from 0"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "has an empty text"),
        (
            '{"context": "a", "continuation": "b"}\n{"query": "a", "choices": ["b"], "gold": 0}',
            r"x\.jsonl:2: keys .* but the first line has context",
        ),
    ],
)
def test_bad_task_files_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        tasks.build_tasks({"t": {"source": "local", "path": str(tmp_path / "x.jsonl")}})


def test_delimiter_and_metric(tiny, entries):
    document = tasks.read_documents({**entries["choices"], "delimiter": "\nAnswer: "})[0]
    assert document["query"] == "The statement\nAnswer:" and document["choices"][0] == "is executed."
    result = tasks.evaluate(*tiny, {"t": {**entries["choices"], "metric": "acc_norm"}})["t"]
    assert result["metric"] == "acc_norm" and result["count"] == 2
    with pytest.raises(ConfigError, match=r"tasks\.t\.metric: unknown metric 'f1'.*Accepted: acc, acc_norm"):
        tasks.evaluate(*tiny, {"t": {**entries["choices"], "metric": "f1"}})


def test_a_log_likelihood_that_is_not_finite_is_a_failure(entries):
    from transformers import AutoTokenizer, LlamaForCausalLM

    broken = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    with pytest.raises(NumericalFailure, match="task choices, document 0"):
        tasks.evaluate(broken, AutoTokenizer.from_pretrained(TINY), {"choices": entries["choices"]})
