"""Declarations of methods: their online operations, and their requirements on models. Standard library only.

The code hash in the paths does not cover this file: its contents reach a job through the job's
specification.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..exports.features import in_some_layers
from ..ground.errors import ConfigError, unknown_name
from ..models.plans import SITES
from .options import Option, as_list

# sites of an operation: the option's, the readers of the stream, the input of o where v cannot take a rotation
SITES_OF_OPTION, STREAM, VALUES = "sites", "stream", "values"
STREAM_SITES = ("attention_input", "mlp_input")


@dataclass(frozen=True)
class Online:
    """An operation that a transform leaves to the run time.

    ``at``: the kind of its site, ``SITES_OF_OPTION`` (those of the option ``sites``, all without that
    option), ``STREAM`` (sites that read the residual stream) or ``VALUES`` (``output_input``, if no rotation of
    heads comes through to it). ``when`` maps options to the values
    under which it exists; of a list, one of its values. ``unless_heads``: the option that moves it from
    ``output_input`` into v if the option ``block_size`` divides the head size. ``chosen``: (option, item of its
    list) with which it is left out where it does not help.
    """

    at: str
    operation: str
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unless_heads: str = ""
    chosen: tuple[str, str] = ("", "")

    def name(self, options: Mapping[str, Any]) -> str:
        """Name of the operation in features of a cell with these resolved ``options``."""
        option, item = self.chosen
        return in_some_layers(self.operation) if item in options.get(option, []) else self.operation

    def exists(self, options: Mapping[str, Any]) -> bool:
        """Check whether the resolved ``options`` ask for it."""
        found = ((options[name], values) for name, values in self.when.items())
        return all(
            any(item in values for item in value) if isinstance(value, list) else value in values
            for value, values in found
        )

    def sites(self, options: Mapping[str, Any], heads: Collection[int]) -> tuple[str, ...]:
        """Kinds of the sites where it is left with these resolved ``options``; ``heads`` are the sizes of heads
        within which v takes a map, none behind a gate."""
        if self.at == STREAM:
            return STREAM_SITES
        if self.at == VALUES:
            return ("output_input",)
        if self.at != SITES_OF_OPTION:
            return (self.at,)
        fits = bool(heads) and all(size % options.get("block_size", 1) == 0 for size in heads)
        moved = fits and self.unless_heads and options[self.unless_heads]
        return tuple(site for site in options.get("sites", SITES) if not (moved and site == "output_input"))


@dataclass(frozen=True)
class Method:
    """A transform or a mitigation: its module, its options and its requirements on the model.

    ``hadamard`` names the sizes of the model that need a Hadamard matrix, ``hadamard_of`` those
    that depend on an option: option -> its value, or one of its values, -> size. ``kronecker``
    names the sizes that must split into a Kronecker product, ``block`` the option whose value must
    divide the inputs of the option ``sites``, or of ``block_sites``. ``instead`` names the
    alternative if a model does not fit.

    ``calibrated``: the method is fitted to calibration statistics. ``fitted_to_scheme``: its
    parameters depend on the scheme they were searched or learned for. Both may be a mapping, option
    -> the values for which this is true. ``stored_tokens``: option -> its value -> the least number of
    tokens of a site that the calibration has to store. ``seeded``: its parameters depend on a seed.
    ``widest_input`` is the largest input dimension of a linear that it accepts. A ``learned``
    transform is trained after it was fitted, on the calibration token windows if it is
    ``trained_on_windows``. A mitigation with ``training`` quantizes the whole model at once while
    it trains its ``scales``, its ``codes`` or its ``weights`` on those windows; training weights is not
    post-training quantization. ``fine_scales``, in the form of ``calibrated``: the method has no
    effect with power-of-two weight scales.
    ``costs`` names the factorizations of each linear that time and memory depend on: ``solve``, of
    its second moment, and ``decompose``, of its weight; those of the method under the option
    ``base`` come on top. ``shares_scales``: it rounds with a global scale that several linears share
    (``global_scale: site``). ``paired``: it needs the inputs of the full-precision model as well.
    ``rotations`` names the rotations of a transform without the option of that name, ``turns``, in the form of
    ``calibrated``, when another one folds a map within heads into the values, ``divides`` the
    sites whose inputs it divides (those of the option ``sites`` if it has one). ``online`` lists the
    operations that stay at run time, ``shifts`` names the option with the sites that it centres;
    ``clips``, in the form of ``calibrated``: it limits activations that are rounded. ``keeps_outliers``:
    a mitigation that keeps weights in 16 bits, or more codes than one per weight. ``reads_statistics``: a
    mitigation whose weights depend on calibration statistics. ``sensitive``, in the form of ``calibrated``: a
    training that weights the channels of layer outputs by the sensitivities of the model.
    """

    module: str
    summary: str
    options: Mapping[str, Option] = field(default_factory=dict)
    hadamard: tuple[str, ...] = ()
    hadamard_of: Mapping[str, Mapping[Any, str]] = field(default_factory=dict)
    kronecker: tuple[str, ...] = ()
    block: str = ""
    block_sites: tuple[str, ...] = ()
    instead: str = "'scaling' or 'none'"
    calibrated: bool | Mapping[str, tuple[Any, ...]] = False
    fitted_to_scheme: bool | Mapping[str, tuple[Any, ...]] = False
    seeded: bool = False
    widest_input: int | None = None
    learned: bool = False
    trained_on_windows: bool = False
    stored_tokens: Mapping[str, Mapping[Any, int]] = field(default_factory=dict)
    training: str = ""
    fine_scales: bool | Mapping[str, tuple[Any, ...]] = False
    costs: tuple[str, ...] = ()
    shares_scales: bool = False
    paired: bool = False
    rotations: tuple[str, ...] = ()
    turns: bool | Mapping[str, tuple[Any, ...]] = False
    divides: tuple[str, ...] = ()
    online: tuple[Online, ...] = ()
    shifts: str = ""
    clips: bool | Mapping[str, tuple[Any, ...]] = False
    keeps_outliers: bool = False
    reads_statistics: bool = True
    sensitive: bool | Mapping[str, tuple[Any, ...]] = False

    def rotates_stream(self, options: Mapping[str, Any]) -> bool:
        """Check whether it rotates the residual stream itself with these resolved ``options``."""
        return "R1" in options.get("rotations", self.rotations) and options.get("residual") != "online"

    def divides_online(self, options: Mapping[str, Any]) -> bool:
        """Check whether it divides at run time where no weights can take the division; behind a rotation at
        run time none can."""
        return "online" in (options.get("division"), options.get("residual"), options.get("values"))

    def turns_values(self, options: Mapping[str, Any]) -> bool:
        """Check whether it folds a map within heads into the values with these resolved ``options``."""
        if "R2" in options.get("rotations", self.rotations):
            return options.get("values") != "online"
        return _holds(self.turns, options) and "output_input" in options.get("sites", SITES)

    def divided_sites(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """List the sites whose inputs it divides with these resolved ``options``."""
        return tuple(options.get("sites", self.divides)) if self.divides else ()

    def is_calibrated(self, options: Mapping[str, Any]) -> bool:
        """Check whether it reads calibration statistics with these resolved ``options``."""
        return _holds(self.calibrated, options)

    def needed_tokens(self, options: Mapping[str, Any]) -> int:
        """Least number of stored tokens of a site with these resolved ``options``."""
        return max((least.get(options[option], 0) for option, least in self.stored_tokens.items()), default=0)

    def is_fitted_to_scheme(self, options: Mapping[str, Any]) -> bool:
        """Check whether its parameters depend on the schemes of the cell with these resolved
        ``options``."""
        return _holds(self.fitted_to_scheme, options)

    def needs_fine_scales(self, options: Mapping[str, Any]) -> bool:
        """Check whether power-of-two scales make it ineffective with these resolved ``options``."""
        return _holds(self.fine_scales, options)

    def clips_activations(self, options: Mapping[str, Any]) -> bool:
        """Check whether it limits rounded activations with these resolved ``options``."""
        return _holds(self.clips, options)

    def weights_channels(self, options: Mapping[str, Any]) -> bool:
        """Check whether it reads the sensitivities of the model with these resolved ``options``."""
        return _holds(self.sensitive, options)

    def hadamard_sizes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """List the sizes of the model that need a Hadamard matrix with these resolved
        ``options``."""
        asked = [
            size
            for option, sizes in self.hadamard_of.items()
            for value, size in sizes.items()
            if value == options[option] or (isinstance(options[option], list) and value in options[option])
        ]
        return (*self.hadamard, *asked)

    def resolve(self, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Fill in every option of an entry; ``method`` and, for a seeded method, ``seed`` are kept
        with the options."""
        given = {
            key: value
            for key, value in entry.items()
            if key not in ("method", "note") and not (key == "seed" and self.seeded)
        }
        for key in given:
            if key not in self.options:
                raise ConfigError(f"{where}: {unknown_name('option', key, self.options or ['(none)'])}")
        resolved: dict[str, Any] = {}
        for name, option in self.options.items():
            value = given[name] if name in given else option.default_with(resolved)
            resolved[name] = option.check(value, f"{where}.{name}")
        for name in given:
            self.options[name].check_needs(resolved[name], resolved, f"{where}.{name}")
        return {"method": entry["method"], "options": resolved}


def _holds(condition: bool | Mapping[str, tuple[Any, ...]], options: Mapping[str, Any]) -> bool:
    if isinstance(condition, bool):
        return condition
    return any(item in values for option, values in condition.items() for item in as_list(options[option]))
