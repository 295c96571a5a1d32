"""Values of one floating type as another: rounded to the nearest even, as every framework does.

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


def cast(data: memoryview, source: str, target: str) -> memoryview:
    """The same numbers in another dtype, as bytes."""
    import numpy as np

    with np.errstate(over="ignore"):
        found = np.frombuffer(data, dtype=numpy_type(source)).astype(numpy_type(target))
    return memoryview(found.view(np.uint8))  # type: ignore[arg-type]  # an array is a buffer


def first_difference(one: memoryview, two: memoryview, code: str) -> int | None:
    """Index of the first element that is not the same bits; NaNs are equal whatever their payload."""
    if one == two:
        return None
    import numpy as np

    kind = numpy_type(code)
    a, b = np.frombuffer(one, dtype=kind), np.frombuffer(two, dtype=kind)
    bits = np.dtype(f"u{kind.itemsize}")
    unlike = (a.view(bits) != b.view(bits)) & ~(np.isnan(a) & np.isnan(b))
    return int(unlike.argmax()) if unlike.any() else None
