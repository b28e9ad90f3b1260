"""Every code of every format against ml_dtypes, and the constants of the OCP specifications."""

import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from quantgrid.ground.errors import ConfigError
from quantgrid.schemes.number_formats import ELEMENT_FORMATS, SCALE_FORMATS

ORACLES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "int2": ml_dtypes.int2,
    "int4": ml_dtypes.int4,
    "int8": np.int8,
}
ALL = {
    **{f"element {name}": entry for name, entry in ELEMENT_FORMATS.items()},
    **{f"scale {name}": entry for name, entry in SCALE_FORMATS.items()},
}


@pytest.mark.parametrize("key", [key for key in ALL if key.split()[1] in ORACLES])
def test_every_code_equals_ml_dtypes(key):
    number_format = ALL[key]
    unsigned = np.uint16 if number_format.bits == 16 else np.uint8
    codes = np.arange(2**number_format.bits).astype(unsigned)
    if number_format.kind == "integer":
        shifted = (codes << (8 - number_format.bits)).view(np.int8) >> (8 - number_format.bits)
        expected = shifted.astype(ORACLES[number_format.name]).astype(np.float64)
    else:
        with np.errstate(invalid="ignore"):
            expected = codes.view(ORACLES[number_format.name]).astype(np.float64)
    values = np.array(number_format.values())
    np.testing.assert_array_equal(values, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(values[numbers]), np.signbit(expected[numbers]))


@pytest.mark.parametrize("key", ALL)
def test_constants_agree_with_the_table(key):
    number_format = ALL[key]
    if number_format.kind == "kmeans":
        with pytest.raises(ConfigError, match="codebooks are stored with"):
            number_format.values()
        return
    if number_format.bits > 16:
        assert number_format.maximum == float(np.finfo(np.float32).max)
        assert number_format.minimum_positive == 2.0**-149
        with pytest.raises(ConfigError, match="fp32"):
            number_format.values()
        return
    values = number_format.values()
    finite = [value for value in values if math.isfinite(value)]
    assert len(values) == 2**number_format.bits
    assert number_format.maximum == max(finite)
    assert number_format.minimum_positive == min(value for value in finite if value > 0)


def test_published_maxima():
    assert {name: entry.maximum for name, entry in ELEMENT_FORMATS.items()} == {
        **{f"int{bits}": 2 ** (bits - 1) - 1 for bits in range(2, 9)},
        "e2m1": 6,
        "e2m3": 7.5,
        "e3m2": 28,
        "e4m3": 448,
        "e5m2": 57344,
        "ue2m2": 7,
        "ue3m1": 24,
        "nf4": 1,
        **{f"kmeans{bits}": 1 for bits in (2, 3, 4)},
    }
    assert SCALE_FORMATS["e8m0"].values()[0] == 2.0**-127
    assert math.isnan(SCALE_FORMATS["e8m0"].values()[255])


def test_nf4_is_ascending_and_holds_zero():
    table = ELEMENT_FORMATS["nf4"].values()
    assert list(table) == sorted(table) and table[7] == 0 and table[0] == -1


def test_formats_import_no_torch():
    program = "import quantgrid.schemes, sys; raise SystemExit(any(name in sys.modules for name in ('torch', 'numpy')))"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0
