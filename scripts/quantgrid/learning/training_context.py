"""Training context: model folder, token windows, device, state file. Plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingContext:
    """Inputs of a training other than its options.

    ``model_folder``: a canonical folder. ``windows_file``: a file of token windows, or None. ``device`` and
    ``solver_dtype`` as in a config. ``state_file``: file for resuming after an interruption, or None.
    ``progress`` wraps the iteration over steps. ``save_seconds``: interval between saves of the state.
    ``statistics_file``: calibration statistics, or None. ``sensitivities_file``: sensitivities of the model, or
    None.
    """

    model_folder: Path
    windows_file: Path | None = None
    device: str = "cpu"
    state_file: Path | None = None
    progress: Callable[[Iterable], Iterable] = iter
    save_seconds: float = 30.0
    statistics_file: Path | None = None
    solver_dtype: str = "auto"
    sensitivities_file: Path | None = None
