"""Tests.  A package only so that `tests.support` can be imported; directories below need no `__init__.py`."""
