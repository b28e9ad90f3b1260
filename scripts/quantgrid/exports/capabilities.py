"""Rules that targets share: what of a cell a folder of weights cannot hold. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..models.family import Family
from ..schemes.quant_scheme import QuantScheme
from .features import Features
from .verdicts import Verdict

VLLM, TRANSFORMERS = "vLLM", "transformers"
FLOAT_BITS = {"float16": 11, "bfloat16": 8, "float32": 24}  # bits of a significand
DTYPE_OF_SCALE = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
# nats per token, of scales or weights rounded to 16 bits, 4 bits in groups: 8.5e-5 measured on
# reference-4m, 2.3e-3 on SmolLM2
SCALE_KL = 1e-2


# of products of joined linears, which a library may sum in another order: 0 measured on tiny models
ORDER_KL = 1e-4


@dataclass
class Findings:
    """Findings of the rules of a target, in their order; :meth:`verdict` sums them up."""

    target: str
    refusals: list[str] = field(default_factory=list)
    bounds: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    loaders: list[str] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kl: float = 0.0
    check_dtype: str = "float32"
    served_kl: float = 0.0

    def refuse(self, reason: str, nearest: str) -> None:
        """Add what would be lost, and the nearest recipe that can be exported."""
        self.refusals.append(f"{reason}; nearest: {nearest}")

    def bound(self, reason: str, kl: float) -> None:
        """Add what is rounded again, with the divergence (nats per token) that it may cost."""
        if reason not in self.bounds:
            self.bounds.append(reason)
            self.kl = max(self.kl, kl)

    def bound_served(self, reason: str, kl: float) -> None:
        """Add what the loader rounds in the dtype of the folder and not in that of the check."""
        self.bound(reason, 0.0)
        self.served_kl = max(self.served_kl, kl)

    def exclude(self, loader: str, reason: str) -> None:
        """Take ``loader`` from the programs that compute what was measured."""
        self.excluded.setdefault(loader, reason)

    def verdict(self) -> Verdict:
        """The verdict; a program that is excluded is not among the loaders."""
        return Verdict(
            self.target,
            tuple(dict.fromkeys(self.refusals)),
            () if self.refusals else tuple(self.bounds),
            tuple(self.losses),
            () if self.refusals else tuple(loader for loader in self.loaders if loader not in self.excluded),
            dict(self.excluded),
            tuple(dict.fromkeys(self.notes)),
            self.kl,
            self.check_dtype,
            self.served_kl,
        )


def judge_side_terms(found: Findings, features: Features) -> None:
    """Refuse outliers, learned limits of activations and experts; name a rounded KV cache as lost."""
    if features.outliers:
        found.refuse(
            "sparse outliers and residual columns have no place beside packed weights", "the base of the mitigation"
        )
    if features.clips:
        found.refuse(
            "learned limits of activations are dropped by every loader", "the same transform without learned limits"
        )
    if features.shape.experts:
        found.refuse(
            "packed experts have other names and layouts in every loader, and no loader of this target was checked "
            "with them",
            "TO=dense",
        )
    lose_key_values(found, features)


def refuse_several_schemes(found: Findings, features: Features) -> None:
    """Refuse an allocation, for a target with one scheme for all linears."""
    if features.schemes.candidates:
        found.refuse(
            "the linears of the cell have several schemes", "TO=compressed-tensors, or a format with one scheme"
        )


def lose_key_values(found: Findings, features: Features) -> None:
    """Name the rounding of keys and values as lost, if the cell has it."""
    cache = features.schemes.key_value
    if cache is not None:
        rotated = ", without the rotation of keys (R3)" if cache.rotate_keys else ""
        found.losses.append(
            f"the KV cache, rounded to {cache.scheme.element} per token and head in the cell, stays in full "
            f"precision{rotated}: a loader sets the cache itself"
        )


def refuse_activations(found: Findings, features: Features) -> None:
    """Refuse rounded activations, for a target of weights alone."""
    if any(features.schemes.activation.values()):
        found.refuse(
            "the loader does not round activations",
            "the same format with activation: null (weights alone), or TO=compressed-tensors with w8a8_served, "
            "w4a4_served, mxfp4_served, mxfp8_served or nvfp4_served",
        )


def refuse_online(found: Findings, features: Features) -> None:
    """Refuse every online operation."""
    for site, operations in features.online.items():
        if operations:
            found.refuse(
                f"the online operation {', '.join(operations)} at {site} would be dropped",
                "the same recipe with what folds into weights (rotations R1 and R2, or the sites that fold)",
            )


def judge_order(found: Findings, features: Features) -> None:
    """Accept sums in another order, where a loader has one linear or one kernel for several."""
    if features.shape.experts:
        found.bound("loaders sum the outputs of experts in another order", SCALE_KL)
    elif features.shape.family.joined:
        found.kl = max(found.kl, ORDER_KL)


def judge_joined(found: Findings, features: Features) -> None:
    """Refuse global scales that differ in one linear of the architecture, for a target of codes."""
    family = features.shape.family
    scaled = any(weight.global_scale != "none" for weight in features.schemes.weights)
    if scaled and family.joined and not features.shares_global_scale:
        found.refuse(
            f"one linear of {features.shape.architecture} holds several of the cell, with a global scale each",
            "weight: {global_scale: site}, as in nvfp4_served",
        )


def judge_float16(found: Findings, dtype: str) -> None:
    """Bound what float16 cannot hold of the embedding, which a cell has in bfloat16."""
    if dtype == "float16":
        found.bound("embedding and lm_head are rounded to float16", SCALE_KL)


def judge_biases(found: Findings, features: Features) -> None:
    """Refuse biases that the architecture cannot hold; :func:`bias_keys` has those that it can."""
    fixed = [role for role in features.biased if not isinstance(features.shape.family.biases.get(role), str)]
    if fixed:
        found.refuse(
            f"a shift folds into a bias of {', '.join(fixed)}, and {features.shape.architecture} has none there",
            "the same transform without a shift",
        )


def bias_keys(family: Family, biased: tuple[str, ...]) -> dict[str, bool]:
    """Keys of config.json that give the linears ``biased`` a bias, set to true."""
    return {str(family.biases[role]): True for role in biased}


def activation_schemes(features: Features) -> dict[QuantScheme, str]:
    """Scheme -> text that names the activations in it, such as ``activations at down_input``."""
    sites: dict[QuantScheme, list[str]] = {}
    for site, candidates in features.schemes.activation.items():
        for scheme in candidates:
            sites.setdefault(scheme, []).append(site)
    everywhere = len(features.schemes.activation)
    return {
        scheme: "activations" if len(found) == everywhere else f"activations at {', '.join(found)}"
        for scheme, found in sites.items()
    }


def fits(scheme: QuantScheme, dtype: str) -> bool:
    """Check whether every effective scale of ``scheme`` is a number of ``dtype``."""
    if scheme.global_scale != "none" or scheme.scale_rule == "four_thirds":
        return dtype == "float32"
    storage = scheme.storage
    if storage.kind == "exponent":
        return dtype != "float16"
    if scheme.scale_format in DTYPE_OF_SCALE:
        return dtype in ("float32", DTYPE_OF_SCALE[scheme.scale_format])
    return storage.mantissa_bits < FLOAT_BITS[dtype]


def is_partial(linears: tuple[str, ...], together: tuple[str, ...]) -> bool:
    """Check whether some but not all of ``together`` are among ``linears``."""
    return 0 < len({*linears} & {*together}) < len(together)
