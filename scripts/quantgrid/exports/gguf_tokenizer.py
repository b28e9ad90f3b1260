"""Tokenizer of a model folder as a GGUF file holds it.

Two kinds are known: byte-level BPE (``gpt2``), whose pre-tokenizer llama.cpp has under a name
(``tokenizer.ggml.pre``), and BPE by SentencePiece with a fallback to bytes (``llama``), which merges
by scores. llama.cpp applies no normalization form, so NFC is accepted where its own converter
accepts it (Qwen). Everything else is refused: another pre-tokenizer would give other tokens without
an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..corpora.tokenization import load_tokenizer
from ..ground.errors import ConfigError
from ..ground.storage import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES, _BYTES_BY_WORD = ("ByteLevel", False), ("ByteLevel", True)
# steps of a pre-tokenizer, whether whole words skip the merges, normalization form -> its name
PRE_TOKENIZERS: dict[tuple[tuple[tuple[str, Any], ...], bool, str | None], str] = {
    ((_BYTES_BY_WORD,), False, None): "gpt-2",
    ((("Digits", True), _BYTES_BY_WORD), False, None): "smollm",
    ((("Split", _CONTRACTIONS + r"\p{N}{1,3}" + _REST), _BYTES), True, None): "llama-bpe",
    ((("Split", _CONTRACTIONS + r"\p{N}" + _REST), _BYTES), False, "NFC"): "qwen2",
    ((("Split", _TEKKEN), _BYTES), True, None): "tekken",
}
_SPACE = "\u2581"  # of SentencePiece


@dataclass(frozen=True)
class GGUFTokenizer:
    """Keys ``tokenizer.ggml.*``: texts and types of all tokens by id, ``merges`` (``gpt2``) or
    ``scores`` (``llama``), ids of special tokens (``bos``, ``eos``, ``unk``, ``pad``), and what is
    added to a text."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None


def read_tokenizer(folder: str | Path, vocabulary: int) -> GGUFTokenizer:
    """Tokenizer in ``folder`` (tokenizer.json), with unused tokens up to ``vocabulary`` rows of the
    embedding.

    Raises :class:`ConfigError`, naming the part, for one that llama.cpp would apply differently.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; GGUF needs the tokenizer in this form")
    content = read_json(path, "it is the tokenizer of the model")
    model, added = content["model"], content.get("added_tokens") or []
    _check_model(model, added, path)
    tokenizer = load_tokenizer(folder)
    texts = {**{index: text for text, index in model["vocab"].items()}, **{a["id"]: a["content"] for a in added}}
    if (largest := max(texts)) >= vocabulary:
        raise ConfigError(f"{path}: token {largest}, and the embedding has {vocabulary} rows")
    is_sentencepiece = bool(model.get("byte_fallback"))
    kind: dict[str, Any] = (
        {"model": "llama", "pre": "default", "scores": _scores(model, texts, vocabulary)}
        if is_sentencepiece
        else {"model": "gpt2", "pre": pre_tokenizer(content, path), "merges": list(_merges(model))}
    )
    if is_sentencepiece:
        kind["add_space_prefix"] = _adds_space(content, path)
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    special = {name: index for name, index in special.items() if index is not None}
    begin, end = _surroundings(whole, bare, special, path)
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return GGUFTokenizer(
        tokens=[texts.get(index, f"[PAD{index}]") for index in range(vocabulary)],
        types=list(_types(model, added, texts, vocabulary)),
        special=special,
        add_bos=begin,
        add_eos=end,
        chat_template=template,
        **kind,
    )


def pre_tokenizer(content: Mapping[str, Any], where: str | Path) -> str:
    """Name of llama.cpp for the pre-tokenizer of a parsed tokenizer.json (byte-level BPE)."""
    steps = tuple(_steps(content.get("pre_tokenizer")))
    form = (content.get("normalizer") or {}).get("type")
    found = (steps, bool(content["model"].get("ignore_merges")), form)
    if found not in PRE_TOKENIZERS:
        shown = " then ".join(name if argument in (True, False) else f"{name} {argument}" for name, argument in steps)
        raise ConfigError(
            f"{where}: llama.cpp's name of its pre-tokenizer is not known here ({shown or 'none'}; normalizer "
            f"{form or 'none'}; ignore_merges {found[1]}); known: {', '.join(PRE_TOKENIZERS.values())}"
        )
    return PRE_TOKENIZERS[found]


def _steps(node: Mapping[str, Any] | None) -> Iterator[tuple[str, Any]]:
    """Steps of a pre-tokenizer, each with the argument that decides its result."""
    kind = node["type"] if node else None
    if node is None or kind is None:
        return
    if kind == "Sequence":
        for part in node["pretokenizers"]:
            yield from _steps(part)
    elif kind == "ByteLevel" and not node.get("add_prefix_space"):
        yield kind, bool(node.get("use_regex", True))
    elif kind == "Digits":
        yield kind, bool(node.get("individual_digits"))
    elif kind == "Split" and node.get("behavior") == "Isolated" and not node.get("invert"):
        yield kind, node["pattern"].get("Regex")
    else:
        yield kind, json.dumps({key: value for key, value in node.items() if key != "type"})


def _check_model(model: Mapping[str, Any], added: list[Mapping[str, Any]], path: Path) -> None:
    if model.get("type") != "BPE":
        raise ConfigError(f"{path}: a tokenizer of type {model.get('type')}; BPE is accepted")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ConfigError(f"{path}: {key} is {model[key]!r}, which llama.cpp does not have")
    for token in added:
        for key in ("single_word", "lstrip", "rstrip"):
            if token.get(key):
                raise ConfigError(f"{path}: the added token {token['content']!r} has {key}, which llama.cpp ignores")


def _merges(model: Mapping[str, Any]) -> Iterator[str]:
    """Merges as two parts with a space between; a space within a part becomes the letter that
    stands for its byte."""
    for merge in model["merges"]:
        yield merge if isinstance(merge, str) else " ".join(part.replace(" ", "\u0120") for part in merge)


def _scores(model: Mapping[str, Any], texts: Mapping[int, str], vocabulary: int) -> list[float]:
    """Scores by which SentencePiece merges: minus the rank of the first merge that makes a token;
    tokens that no merge makes come last."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    last = len(model["merges"])
    return [-float(ranks.get(texts.get(index, ""), last)) for index in range(vocabulary)]


def _adds_space(content: Mapping[str, Any], path: Path) -> bool:
    """Check whether a text gets a leading space; refuses what SentencePiece does not do."""
    pre, normalizer = content.get("pre_tokenizer"), content.get("normalizer")
    if pre is not None and pre["type"] == "Metaspace" and not normalizer and pre["replacement"] == _SPACE:
        return pre.get("prepend_scheme") != "never"
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    known = [{"type": "Prepend", "prepend": _SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    if pre is None and steps in (known, known[1:]):
        return steps == known
    raise ConfigError(
        f"{path}: neither the spaces of SentencePiece nor byte-level BPE; llama.cpp has no such tokenizer"
    )


def _types(
    model: Mapping[str, Any], added: list[Mapping[str, Any]], texts: Mapping[int, str], vocabulary: int
) -> Iterator[int]:
    """Types of all tokens by id."""
    kinds = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in added}
    if model.get("byte_fallback"):
        kinds |= {index: BYTE for text, index in model["vocab"].items() if _is_byte(text)}
        kinds |= {model["vocab"][text]: UNKNOWN for text in [model.get("unk_token")] if text in model["vocab"]}
    for index in range(vocabulary):
        yield kinds.get(index, NORMAL) if index in texts else UNUSED


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _surroundings(whole: list[int], bare: list[int], special: Mapping[str, int], path: Path) -> tuple[bool, bool]:
    """Whether BOS is added before and EOS behind a text; refuses other additions."""
    for begin in (False, True):
        for end in (False, True):
            first, last = [special.get("bos")] * begin, [special.get("eos")] * end
            if whole == [*first, *bare, *last]:
                return begin, end
    raise ConfigError(f"{path}: it turns {bare} into {whole}; llama.cpp adds BOS before a text or EOS behind it only")
