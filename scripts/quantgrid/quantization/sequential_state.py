"""State of a sequential quantization behind a decoder layer, from which an interrupted one goes on.

Two files next to the checkpoint: ``sequential.spool`` holds the packed tensors, appended layer by
layer; ``sequential.safetensors`` the hidden states behind the last layer, and in its header the
fingerprint of everything that decides the result, the results of the finished layers, and digests
of both files. A state that is incomplete, altered or of another fingerprint is never used: the
quantization starts over and says so.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3
from torch import Tensor

from ..ground.errors import ConfigError
from ..ground.storage import read_metadata, read_tensors, write_tensors
from ..ground.tensor_files import TensorSpool, digest_of
from ..schemes.quant_scheme import QuantScheme
from .cached import Quantized

STATE, SPOOL = "sequential.safetensors", "sequential.spool"
SAVE_SECONDS = 30.0  # between two states, and at least SHARE times as long as saving one took
SHARE = 20
_CHUNK = 1 << 20


class SequentialState:
    """Files of a state in ``folder``. ``fingerprint``: JSON of everything that decides the result;
    ``packed`` holds the tensors of the checkpoint."""

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any]):
        self.path, self.fingerprint = Path(folder, STATE), json.dumps(fingerprint, sort_keys=True)
        self.packed = TensorSpool(folder, SPOOL)
        self._digest, self._digested = blake3(), 0
        self._saved, self._took = time.monotonic(), 0.0

    def resume(self, result: Quantized, hidden: Sequence[Tensor]) -> int:
        """Restore ``result`` and the ``hidden`` states (in place); return the number of finished
        layers, 0 where the quantization has to start from the first one."""
        about, tensors = self._read()
        if about is None:
            self.packed.cut(0, {})
            self._digest, self._digested = blake3(), 0
            return 0
        for number, states in enumerate(hidden):
            states.copy_(tensors[f"hidden.{number}"])
        found = json.loads(about["result"])  # text, which keeps the order of its keys
        content = result.content
        content.config, content.linears, content.online = (found[name] for name in ("config", "linears", "online"))
        content.activations = {name: QuantScheme.from_dict(entry) for name, entry in found["activations"].items()}
        result.choices, result.errors, result.details = (found[name] for name in ("choices", "errors", "details"))
        return about["layers"]

    def _read(self) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """Header and tensors of a sound state, whose spool is cut to its tensors; (None, {}) without one."""
        if not self.path.is_file():
            return None, {}
        try:
            about, tensors = read_metadata(self.path), read_tensors(self.path)
            sound = about.pop("digest", None) == digest_of(about, tensors)
            if not sound or self._digest_of_spool(about["size"]) != about["spool"]:
                raise ConfigError("it is altered or incomplete")
            if about["fingerprint"] != self.fingerprint:
                raise ConfigError("it is of another specification, code or input")
        except (ConfigError, ValueError) as error:
            print(f"{self.path} is not used, the quantization starts over: {error}", file=sys.stderr)
            return None, {}
        self.packed.cut(about["size"], about["places"])
        return about, tensors

    def save(self, layers: int, result: Quantized, hidden: Sequence[Tensor]) -> None:
        """Save the state behind ``layers`` layers, unless the last one is recent."""
        begin = time.monotonic()
        if begin - self._saved < (SAVE_SECONDS and max(SAVE_SECONDS, SHARE * self._took)):
            return
        content = result.content
        found = {
            "config": content.config,
            "linears": content.linears,
            "online": content.online,
            "activations": {name: scheme.to_dict() for name, scheme in content.activations.items()},
            "choices": result.choices,
            "errors": result.errors,
            "details": result.details,
        }
        size = self.packed.file.seek(0, os.SEEK_END)
        about = {
            "fingerprint": self.fingerprint,
            "layers": layers,
            "result": json.dumps(found),
            "places": self.packed.listed(),
            "size": size,
            "spool": self._digest_of_spool(size),
        }
        tensors = {f"hidden.{number}": states.cpu() for number, states in enumerate(hidden)}
        write_tensors(self.path, tensors, {**about, "digest": digest_of(about, tensors)})
        self._saved = time.monotonic()
        self._took = self._saved - begin

    def _digest_of_spool(self, size: int) -> str:
        """BLAKE3 of the first ``size`` bytes of the spool; those digested before are not read again."""
        while self._digested < size:
            part = os.pread(self.packed.file.fileno(), min(_CHUNK, size - self._digested), self._digested)
            if not part:
                raise ConfigError("its packed tensors are incomplete")
            self._digest.update(part)
            self._digested += len(part)
        return self._digest.hexdigest()
