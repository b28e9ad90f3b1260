"""A simulated device ``sim``: real values in the memory of the CPU, an error wherever tensors of two devices meet.

torch reserves a device for Python backends (PrivateUse1). A tensor on ``sim`` holds a CPU tensor;
every operator runs on what its arguments hold, and its results are on ``sim`` again. Autograd runs on it
if it is registered before the first backward pass of the process (``simulated_training.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "sim"
# operators that take tensors of two devices on every device
COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
# operators whose indices may be on the CPU on every device
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# what a tensor is asked about its form: operators may change it in place
QUESTIONS = {
    getattr(torch.ops.aten, name).default
    for name in ("dim", "is_contiguous", "numel", "size", "stride", "storage_offset", "sym_numel", "sym_size")
} | {torch.ops.aten.sym_stride.default, torch.ops.aten.sym_storage_offset.default}
ATTENTION = "aten::_fused_sdp_choice"  # 0: scores, softmax and product as single operators
_LIBRARIES: list[torch.library.Library] = []  # operators are there as long as their library


class SimTensor(Tensor):
    """Tensor on ``sim``; ``held`` is the CPU tensor with its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> SimTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
            dispatch_sizes_strides_policy="sizes",
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        return _run(operator, *arguments, **(options or {}))

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"a tensor on {NAME} has no memory that numpy could read; move it to the CPU first")

    def __repr__(self, **_: Any) -> str:
        return f"SimTensor({self.held!r})"


def _run(operator: Any, *arguments: Any, **options: Any) -> Any:
    """Run ``operator`` on the CPU; results are on ``sim`` unless the call names another device."""
    if operator in QUESTIONS:
        return operator(arguments[0].held)
    name = operator._schema.name
    if name == ATTENTION:
        return 0
    met: list[Tensor] = []
    indices: list[Tensor] = []  # are not compared
    may = name in INDEXED and isinstance(arguments[0], SimTensor)
    given, named = (
        [_on_cpu(indices if may and place == 1 else met, value) for place, value in enumerate(arguments)],
        {key: _on_cpu(met, part) for key, part in options.items()},
    )
    here = sum(isinstance(tensor, SimTensor) for tensor in met)
    if 0 < here < len(met) and name not in COPIES:
        raise RuntimeError(f"{operator.name()}: tensors on {NAME} and on cpu")
    found = operator(*given, **named)
    if operator._schema.is_mutable and (written := list(_written(operator._schema, arguments, options))):
        return written[0] if len(operator._schema.returns) == 1 else tuple(written[: len(operator._schema.returns)])
    wanted = options.get("device")
    if wanted is not None and torch.device(wanted).type != NAME:
        return found
    return _on_sim(found)


def _on_cpu(met: list[Tensor], value: Any) -> Any:
    """``value`` of an argument on the CPU; its tensors are added to ``met``, except for numbers of the CPU."""
    if isinstance(value, SimTensor):
        met.append(value)
        return value.held
    if isinstance(value, Tensor):
        met.extend([value] * (value.dim() > 0))
        return value
    if isinstance(value, (list, tuple)):
        return [_on_cpu(met, part) for part in value]
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _on_sim(value: Any) -> Any:
    if isinstance(value, Tensor):
        return SimTensor(value)
    return type(value)(map(_on_sim, value)) if type(value) in (list, tuple) else value


def _written(schema: Any, arguments: tuple, options: dict[str, Any]) -> Iterator[Any]:
    """Arguments that the operator writes to: those of in-place and ``out`` variants."""
    for number, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield arguments[number] if number < len(arguments) else options.get(argument.name)


class _Module(_DummyBackendModule):
    """Functions that torch calls on a backend, including the dtypes of autocast."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@cache
def register() -> torch.device:
    """Register the device in this process and return it."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_run, "PrivateUse1")
    _LIBRARIES.append(library)
    return torch.device(NAME, 0)


def moved(value: Any, device: torch.device | str) -> Any:
    """Nested containers of tensors with every tensor on ``device``."""
    return tree_map(lambda part: part.to(device) if isinstance(part, Tensor) else part, value)


def on_both(call: Callable[[torch.device], Any]) -> tuple[Any, Any]:
    """Results of ``call`` for the CPU and for ``sim``, the second moved to the CPU."""
    return call(torch.device("cpu")), moved(call(register()), "cpu")
