"""Generated damages of files in a results folder, each a function of the file's bytes, and the jobs
of a run as their commands."""

from __future__ import annotations

import json
import random
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from checkouts import Checkout

Damage = Callable[[bytes, random.Random], bytes]
COMMAND = re.compile(r'run_job\.py" (.*?) \\\n\s+> ', re.DOTALL)


def flip(content: bytes, start: int, end: int, bit: int, drawn: random.Random) -> bytes:
    place = drawn.randrange(start, end)
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def header_bit(content: bytes, drawn: random.Random) -> bytes:
    """One bit of the JSON that opens a safetensors file."""
    return flip(content, 8, 8 + int.from_bytes(content[:8], "little"), drawn.randrange(7), drawn)


def data_bit(content: bytes, drawn: random.Random) -> bytes:
    """The lowest bit of a byte among the tensors of a safetensors file."""
    return flip(content, 8 + int.from_bytes(content[:8], "little"), len(content), 0, drawn)


def exponent_bit(content: bytes, drawn: random.Random) -> bytes:
    """The highest bit of the exponent of a float32 among the tensors."""
    start = 8 + int.from_bytes(content[:8], "little")
    place = start + 4 * drawn.randrange((len(content) - start) // 4) + 3
    return content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


def any_bit(content: bytes, drawn: random.Random) -> bytes:
    return flip(content, 0, len(content), drawn.randrange(8), drawn)


def truncated(content: bytes, drawn: random.Random) -> bytes:
    return content[: drawn.randrange(1, len(content))]


def emptied(content: bytes, drawn: random.Random) -> bytes:
    return b""


def appended(content: bytes, drawn: random.Random) -> bytes:
    return content + b"\n"


def number(content: bytes, drawn: random.Random) -> bytes:
    """One digit of a JSON or CSV file is another: still whole, still plausible."""
    digits = [*re.finditer(rb"(?<=\.\d)\d", content)] or [*re.finditer(rb"\d", content)]
    place = drawn.choice(digits).start()
    return content[:place] + str((int(content[place : place + 1]) + 1) % 10).encode() + content[place + 1 :]


def not_a_number(content: bytes, drawn: random.Random) -> bytes:
    return re.sub(rb"\d+\.\d+(e-?\d+)?", b"NaN", content, count=1)


def without_a_key(content: bytes, drawn: random.Random) -> bytes:
    found = json.loads(content)
    del found[drawn.choice(sorted(found))]
    return json.dumps(found).encode()


def failed(content: bytes, drawn: random.Random) -> bytes:
    """A result that says it is the numerical failure of its cell."""
    return json.dumps({**json.loads(content), "status": "failed", "reason": "NaN"}).encode()


def another_epsilon(content: bytes, drawn: random.Random) -> bytes:
    return json.dumps({**json.loads(content), "rms_norm_eps": 0.01}).encode()


def without_a_row(content: bytes, drawn: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    del lines[drawn.randrange(1, len(lines))]
    return b"".join(lines)


@dataclass(frozen=True)
class Job:
    """A command of the workflow: its rule, and the words that ``run_job.py`` is given."""

    rule: str
    words: tuple[str, ...]

    def reads(self, path: str) -> bool:
        """Check whether ``path`` is one of its words, or lies in a folder that is."""
        return any(
            path == word or path.startswith(f"{word}/")
            for word in self.words
            if "/" in word and not word.startswith("{")
        )


def jobs_of(checkout: Checkout, config: str) -> list[Job]:
    """Every job of a config, with the words that Snakemake would give it."""
    output = checkout.run(config, "--dry-run", "--forceall", "--printshellcmds")
    found = [shlex.split(command.replace("\\\n", " ")) for command in COMMAND.findall(output)]
    return [Job(rule, tuple(words)) for rule, *words in found]


def other_of_its_kind(file: Path, results: Path) -> Path:
    """Another file of ``results`` with the same name or, where that carries a key, suffix and
    folder; any of its suffix where there is none."""
    alike = sorted(
        path for path in results.rglob(f"*{file.suffix}") if path.is_file() and path.read_bytes() != file.read_bytes()
    )
    nearest = sorted(alike, key=lambda path: -sum(one == two for one, two in zip(path.parts, file.parts)))
    return nearest[0]
