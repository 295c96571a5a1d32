"""Which functions of MindFormers are replaced or called, and the parameters they must have.

One table for all versions: the functions of 1.8.0 and 1.9.0 have the same parameters.  The versions differ in where the
path of the checkpoint is (config.py).  Imports nothing of MindFormers by itself.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from transform_ckpt.errors import InputError, Problems

VERSIONS = ("1.8", "1.9")
"""First two numbers of the versions of MindFormers whose functions were compared with the table."""


@dataclass(frozen=True, slots=True)
class Place:
    """A function of MindFormers; `parameters` are the names of its parameters, in order."""

    module: str
    name: str
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def _place(module: str, name: str, parameters: str) -> Place:
    return Place(f"mindformers.{module}", name, tuple(parameters.split()))


STEP = _place(
    "trainer.utils", "transform_and_load_checkpoint", "config model network dataset optimizer do_eval do_predict"
)
CLEAR = _place(
    "utils.file_utils", "clear_auto_trans_output", "load_checkpoint src_strategy_path_or_dir load_ckpt_format"
)
STRATEGY_PATH = _place("utils.file_utils", "set_strategy_save_path", "config")
REPLACED = (STEP, CLEAR, STRATEGY_PATH)

PRETRAINED = "mindformers.models.modeling_utils"
"""Its from_pretrained keeps MindFormers' transform, so it also keeps the deletion before it."""

CHECK_CONFIG = _place("trainer.utils", "check_checkpoint_config_valid", "config")
LOAD_SLORA = _place("trainer.utils", "load_slora_ckpt", "checkpoint_dict config network")
COMPILE = _place("checkpoint.utils", "compile_model", "model dataset mode sink_mode epoch sink_size do_eval do_predict")
RANK = _place("tools.utils", "get_real_rank", "")
WORLD = _place("tools.utils", "get_real_group_size", "")
MAIN_RANK = _place("tools.utils", "is_main_rank", "ignore_check_modelarts")
OUTPUT = _place("tools.utils", "get_output_root_path", "")
RENAME_ADAPTERS = _place("tools.utils", "replace_tk_to_mindpet", "ckpt_dict")
IS_HUGGING_FACE = _place("utils.safetensors.utils", "is_hf_safetensors_dir", "safetensors_dir model_cls_or_instance")
NAMING_CELL = _place("utils.load_checkpoint_utils", "_get_origin_network", "network")
STATE_DICT = _place("parallel_core.inference.utils", "generate_state_dict", "network")
CALLED = (
    CHECK_CONFIG,
    LOAD_SLORA,
    COMPILE,
    RANK,
    WORLD,
    MAIN_RANK,
    OUTPUT,
    RENAME_ADAPTERS,
    IS_HUGGING_FACE,
    NAMING_CELL,
    STATE_DICT,
)


def function(place: Place) -> Callable[..., object]:
    """The function as it is now."""
    found: Callable[..., object] = getattr(importlib.import_module(place.module), place.name)
    return found


def check(package: ModuleType) -> None:
    """InputError unless `package` is a MindFormers that all of the table fits, naming everything that does not."""
    version = str(getattr(package, "__version__", "without __version__"))
    numbers = re.match(r"\d+\.\d+", version)
    if numbers is None or numbers[0] not in VERSIONS:
        raise InputError(
            f"MindFormers {version}: expected {' or '.join(f'{known}.x' for known in VERSIONS)}: install one of these, "
            "or convert the checkpoint before the job (transform-ckpt convert) and set auto_trans_ckpt: False"
        )
    problems = Problems()
    for place in (*REPLACED, *CALLED):
        fault = _fault(place)
        if fault:
            problems.add(f"MindFormers {version}: {place}: {fault}")
    if problems.messages:
        problems.add(
            "this MindFormers is not the one that transform_ckpt knows: install an unchanged release of "
            f"{' or '.join(f'{known}.x' for known in VERSIONS)}"
        )
    problems.raise_if_any(InputError)


def _fault(place: Place) -> str:
    try:
        found = function(place)
    except (ImportError, AttributeError) as error:
        return f"expected a function, found none ({error})"
    parameters = tuple(inspect.signature(found).parameters)
    if parameters != place.parameters:
        return f"expected the parameters ({', '.join(place.parameters)}), found ({', '.join(parameters)})"
    return ""
