"""One section of a configuration, read key by key: every wrong or missing value is recorded, none is fatal by itself.

Pure; may import only strategy.generate_{checks,families,types} and transform_ckpt.errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strategy.generate_checks import parse_offset
from strategy.generate_families import CANONICAL, SPELLINGS
from strategy.generate_types import Offset
from transform_ckpt.errors import Problems

_DTYPES = {
    "float32": "F32", "fp32": "F32", "float16": "F16", "fp16": "F16", "bfloat16": "BF16", "bf16": "BF16",
}  # fmt: skip


_MOST = 1 << 40


class Values:
    """Values of a section by key, with defaults; `where` and `spelled` make messages that a user finds again."""

    def __init__(self, where: str, given: Mapping[str, Any], defaults: Mapping[str, Any], problems: Problems) -> None:
        self.where = where
        self.given = given
        self.defaults = defaults
        self.problems = problems
        self.missing: list[str] = []
        self.spelled: dict[str, str] = {}

    @classmethod
    def by_meaning(
        cls, where: str, sections: list[Mapping[str, Any]], defaults: Mapping[str, Any], problems: Problems
    ) -> Values:
        """Sections with any of the spellings of generate_families; later sections win, as a YAML over config.json."""
        values = cls(where, {}, defaults, problems)
        merged: dict[str, Any] = {}
        for section in sections:
            found: dict[str, Any] = {}
            for written, value in section.items():
                key = CANONICAL.get(written)
                if key is None:
                    continue
                if key in found and found[key] != value:
                    problems.add(
                        f"{where}: {values.spelled[key]} = {found[key]!r} and {written} = {value!r} disagree; they are "
                        "two names of one thing"
                    )
                found[key] = value
                values.spelled[key] = written
            merged.update(found)
        values.given = merged
        return values

    def name(self, key: str) -> str:
        """The key as the user wrote it, or as it is best written."""
        return self.spelled.get(key) or SPELLINGS.get(key, (key,))[0]

    def get(self, key: str) -> Any:
        """The value or its default; an explicit null is no value."""
        value = self.given.get(key)
        return self.defaults.get(key) if value is None else value

    def need(self, keys: tuple[str, ...]) -> None:
        """Record the keys that are not given at all."""
        self.missing += [self.name(key) for key in keys if self.given.get(key) is None]

    def positive(self, key: str, default: int | None = None, *, most: int = _MOST) -> int:
        """A whole number of at least 1."""
        return self.number(key, default, least=1, most=most)

    def number(self, key: str, default: int | None = None, *, least: int = 0, most: int = _MOST) -> int:
        """A whole number from `least` to `most`; what is missing or wrong reads as the smallest that is no 0."""
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            if self.name(key) not in self.missing:
                self.missing.append(self.name(key))
        elif isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.problem(key, f"a whole number of at least {least}" + f", at most {most}" * (most < _MOST), value)
        else:
            return value
        return max(least, 1)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """True or False."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(key, "True or False", value)
            return default
        return value

    def dtype(self, key: str, default: str) -> str:
        """A code of transform_ckpt.dtypes."""
        value = self.get(key) or default
        code = _DTYPES.get(str(value).removeprefix("mstype.").removeprefix("ms."))
        if code is None:
            self.problem(key, "one of " + ", ".join(_DTYPES), value)
        return code or "F32"

    def offset(self, key: str) -> Offset:
        """Layer offsets of the pipeline."""
        try:
            return parse_offset(self.get(key) or 0)
        except ValueError as error:
            self.problem(key, str(error).removeprefix("expected "), self.get(key))
            return 0

    def problem(self, key: str, expected: str, found: Any) -> None:
        """Record a value that is not what it must be."""
        self.problems.add(f"{self.where}.{self.name(key)}: expected {expected}, found {found!r}")
