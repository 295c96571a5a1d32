"""Put our functions in the place of MindFormers', in every module that has imported them by name; and back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from transform_ckpt.auto.mindformers import places
from transform_ckpt.auto.mindformers.output import kept_output, mended_strategy_path, unlinked_output
from transform_ckpt.auto.mindformers.step import replacement_step
from transform_ckpt.errors import InputError

Function = Callable[..., Any]

_OURS: Mapping[places.Place, Callable[[Function], Function]] = {
    places.STEP: replacement_step,
    places.CLEAR: kept_output,
    places.STRATEGY_PATH: mended_strategy_path,
}
"""Place -> what makes our function of MindFormers'."""

_installed: dict[places.Place, tuple[Function, Function]] = {}
"""Place -> (MindFormers' function, ours); empty when nothing is installed."""


def install() -> None:
    """Replace MindFormers' automatic transform by ours; a second call changes nothing.

    InputError when MindFormers is not installed, or of another version than the ones known.
    """
    if _installed:
        return
    try:
        package = importlib.import_module("mindformers")
    except ImportError as error:
        raise InputError(
            f"MindFormers cannot be imported ({error}): install mindformers {' or '.join(places.VERSIONS)}"
        ) from None
    places.check(package)
    pretrained = importlib.import_module(places.PRETRAINED)
    for place in places.REPLACED:
        theirs = places.function(place)
        ours = _OURS[place](theirs)
        _installed[place] = (theirs, ours)
        _exchange(theirs, ours)
    theirs, ours = _installed[places.CLEAR]
    if getattr(pretrained, places.CLEAR.name, None) is ours:
        setattr(pretrained, places.CLEAR.name, unlinked_output(theirs))


def uninstall() -> None:
    """MindFormers as it was."""
    pretrained = sys.modules.get(places.PRETRAINED)
    for place, (theirs, ours) in _installed.items():
        _exchange(ours, theirs)
        if place == places.CLEAR and hasattr(pretrained, place.name):
            setattr(pretrained, place.name, theirs)
    _installed.clear()


def _exchange(old: Function, new: Function) -> None:
    """In every module that has `old`, under whatever name; modules imported later take it from these."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, name, new)
