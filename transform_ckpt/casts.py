"""Values of one floating type as another, rounded to the nearest even.

NumPy and ml_dtypes, which are exact and faster than memory is here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from transform_ckpt import dtypes


@lru_cache
def numpy_type(code: str) -> Any:
    """The NumPy dtype of a neutral code; bfloat16 and float8 through ml_dtypes."""
    import numpy as np

    name = dtypes.BY_CODE[code].numpy
    if name.startswith(("bfloat", "float8")):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


def cast(data: memoryview, source: str, target: str, buffer: memoryview | None = None) -> memoryview:
    """The same numbers in another dtype, as bytes; in `buffer` where it is given, which must be long enough."""
    import numpy as np

    given = np.frombuffer(data, dtype=numpy_type(source))
    nbytes = given.size * numpy_type(target).itemsize
    out = memoryview(bytearray(nbytes)) if buffer is None else buffer[:nbytes]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # too large is inf, and NaN stays NaN
        np.copyto(np.frombuffer(out, dtype=numpy_type(target)), given, casting="unsafe")
    return out


def first_difference(one: bytearray, two: memoryview, code: str) -> int | None:
    """Index of the first element that is not the same bits; NaNs are equal whatever their payload.

    `one` is a bytearray, which is compared at the speed of memory; two memoryviews are compared item by item.
    """
    if one == two:
        return None
    import numpy as np

    kind = numpy_type(code)
    a, b = np.frombuffer(one, dtype=kind), np.frombuffer(two, dtype=kind)
    bits = np.dtype(f"u{kind.itemsize}")
    with np.errstate(invalid="ignore"):  # signalling NaNs
        unlike = (a.view(bits) != b.view(bits)) & ~(np.isnan(a) & np.isnan(b))
    return int(unlike.argmax()) if unlike.any() else None
