"""Strategies without hardware: the strategy that MindSpore's compiler would write, from the configuration alone.

`generate` takes a job's configuration (generate_config reads it from a YAML), `for_parameters` the names and shapes of
a checkpoint and a line such as "dp=2,mp=4,pp=2" (its keys: generate_text).  Layouts mean the same slices as the
compiler's; device matrices need not be equal number by number.

Sources of the rules: generate_rules, generate_models, generate_pipeline, generate_optimizer; optimizer states follow
their parameter (MindFormers 1.9.0 core/optim/adamw.py, wrapper/wrapper.py), buffers have none.
May import only strategy.{generate_*,layout} and transform_ckpt.{errors,states,views}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from strategy.generate_models import naming_of, parameters
from strategy.generate_pipeline import layer_stages
from strategy.generate_rules import NAMINGS, NamingRules, Rule, detect_naming, layout_of
from strategy.generate_text import parse_parallel
from strategy.generate_types import ModelParallelConfig, Parallel, Parameter
from strategy.layout import Layout, LayoutError, Stage, Strategy
from transform_ckpt.errors import InputError, Problems, name_some
from transform_ckpt.states import is_state, split_optimizer
from transform_ckpt.views import Shape

WEIGHT_DTYPE_STATES = ("accu_grads.",)
"""States cloned from the parameter (wrapper.py); those of the optimizers are float32 whatever the parameter is."""


@dataclass(frozen=True)
class Generated:
    """A strategy, and the full shape and dtype of every name in it.  `notes` say what the rules do not confirm."""

    strategy: Strategy
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Placed:
    """A parameter with its row of the rules and its stage."""

    parameter: Parameter
    rule: Rule
    stage: int


@dataclass
class _Collected:
    """Stages under construction; problems are collected by kind of parameter, not by layer."""

    where: str
    stages: list[dict[str, Layout]]
    failed: dict[str, list[str]] = field(default_factory=dict)

    def strategy(self, parallel: Parallel) -> Strategy:
        """All stages, or InputError."""
        problems = Problems()
        for message, names in self.failed.items():
            more = f" (and {len(names) - 1} more parameters)" if len(names) > 1 else ""
            problems.add(f"{self.where}: {names[0]}{more}: {message}")
        empty = [number for number, layouts in enumerate(self.stages) if not layouts]
        if empty and not self.failed:
            problems.add(
                f"{self.where}: pipeline stage {empty[0]} of {parallel.pp} has no parameters; use fewer stages"
            )
        problems.raise_if_any(InputError)
        return Strategy(tuple(Stage(parallel.devices, layouts) for layouts in self.stages), self.where)


def generate(config: ModelParallelConfig) -> Generated:
    """The strategy of a job; InputError with everything that does not fit, at once."""
    model, parallel = config.model, config.parallel
    rules = NAMINGS[naming_of(model)]
    tied_over_stages = model.tied and parallel.pp > 1
    placed = _place(parameters(model), rules, parallel, model.layers, config.origin)
    listed = [item for item in placed if item.rule.trainable or not config.only_trainable]
    strategy = _strategy(listed, parallel, config.states, tied_over_stages=tied_over_stages, where=config.origin)
    shapes, dtypes = _describe(listed, config.states)
    return Generated(strategy, shapes, dtypes, config.notes)


def for_parameters(shapes: Mapping[str, Shape], dtypes: Mapping[str, str], text: str) -> Strategy:
    """The strategy for the tensors of a checkpoint under `text` (keys: strategy.generate_text).

    `dtypes` are codes of transform_ckpt.dtypes ("F32", "BF16").  Names tell the naming; optimizer states in `shapes`
    get the layout of their weight; single values (global_step ...) get none.  InputError with all problems at once.
    """
    parallel = parse_parallel(text)
    where = f"parallel configuration {text!r}"
    weights, states = _split(shapes, dtypes)
    rules = _naming_rules([parameter.name for parameter in weights], where)
    problems = Problems()
    known = [(parameter, rules.find(parameter.name)) for parameter in weights]
    unknown = [p.name for p, found in known if found is None and not is_state(p.name, p.dtype, p.shape)]
    if unknown:
        problems.add(f"{where}: no rule for {len(unknown)} parameters: {name_some(unknown)}")
    layers = sorted({found[1] for _, found in known if found is not None and found[1] >= 0})
    if layers != list(range(len(layers))):
        problems.add(f"{where}: layers are numbered {layers[0]}-{layers[-1]}, but only {len(layers)} are there")
    _check_experts(weights, parallel.ep, where, problems)
    problems.raise_if_any(InputError)
    tied = not any(found is not None and found[0].place == "head" for _, found in known)
    listed = [parameter for parameter, found in known if found is not None]
    placed = _place(listed, rules, parallel, len(layers), where)
    return _strategy(placed, parallel, states, tied_over_stages=tied and parallel.pp > 1, where=where)


def _check_experts(weights: Sequence[Parameter], ep: int, where: str, problems: Problems) -> None:
    """Rows of all experts lie below one another, so that their number must divide, not only that of the rows."""
    if ep > 1 and not any(".experts." in parameter.name for parameter in weights):
        problems.add(f"{where}: ep={ep}, but no parameter is an expert's")
    odd = [p for p in weights if p.name.endswith(".mlp.router.weight") and p.shape and p.shape[0] % ep]
    if odd:
        problems.add(f"{where}: {odd[0].name} is of {odd[0].shape[0]} experts, which do not divide into ep={ep}")


def _naming_rules(names: Sequence[str], where: str) -> NamingRules:
    naming = detect_naming(names)
    if not naming:
        raise InputError(
            f"{where}: the parameters have neither MindFormers' legacy Llama names (model.layers.0.attention.wq.weight)"
            f" nor its mcore names (decoder.layers.0.self_attention.linear_qkv.weight): {name_some(names)}; give the "
            "destination's strategy files instead"
        )
    return NAMINGS[naming]


def _split(
    shapes: Mapping[str, Shape], dtypes: Mapping[str, str]
) -> tuple[list[Parameter], dict[str, tuple[str, ...]]]:
    """(weights, prefixes of the optimizer states that each weight has); a state without weight stands for it."""
    weights: dict[str, Parameter] = {}
    states: dict[str, tuple[str, ...]] = {}
    for name, shape in shapes.items():
        prefix, base = split_optimizer(name)
        full = shapes.get(base, shape)
        if shape == full:
            weights.setdefault(base, Parameter(base, full, dtypes.get(base, dtypes[name])))
            states[base] = (*states.get(base, ()), prefix)
    return list(weights.values()), states


def _place(
    listed: Iterable[Parameter], rules: NamingRules, parallel: Parallel, layers: int, where: str
) -> list[_Placed]:
    """Every parameter with its rule and stage; LookupError would be a hole in the tables."""
    stage_of = layer_stages(layers, parallel, where)
    head = 0 if parallel.zero_bubble_v else parallel.pp - 1
    norm = stage_of[-1] if rules.norm_with_last_layer and stage_of else parallel.pp - 1
    fixed = {"first": 0, "norm": norm, "head": head, "mtp": head}
    placed = []
    for parameter in listed:
        found = rules.find(parameter.name)
        if found is None:
            raise LookupError(f"no rule for {parameter.name}")
        rule, layer = found
        placed.append(_Placed(parameter, rule, stage_of[layer] if layer >= 0 else fixed[rule.place]))
    return placed


def _strategy(
    placed: Sequence[_Placed],
    parallel: Parallel,
    states: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    tied_over_stages: bool,
    where: str,
) -> Strategy:
    """`states`: prefixes for every trainable parameter, or by name with "" for the parameter itself."""
    collected = _Collected(where, [{} for _ in range(parallel.pp)])
    for item in placed:
        name = item.parameter.name
        shared = tied_over_stages and item.rule.place == "first"
        try:
            layout = layout_of(item.parameter, item.rule, parallel, stage_shared=shared)
        except LayoutError as error:
            collected.failed.setdefault(str(error), []).append(name)
            continue
        prefixes = states.get(name, ()) if isinstance(states, Mapping) else _prefixes(item.rule, states)
        collected.stages[item.stage].update({prefix + name: layout for prefix in prefixes})
    return collected.strategy(parallel)


def _prefixes(rule: Rule, states: Sequence[str]) -> Sequence[str]:
    """Buffers have no optimizer states."""
    return ("", *states) if rule.trainable else ("",)


def _describe(placed: Sequence[_Placed], states: Sequence[str]) -> tuple[dict[str, Shape], dict[str, str]]:
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, str] = {}
    for item in placed:
        for prefix in _prefixes(item.rule, states):
            name = prefix + item.parameter.name
            shapes[name] = item.parameter.shape
            dtypes[name] = item.parameter.dtype if prefix in ("", *WEIGHT_DTYPE_STATES) else "F32"
    return shapes, dtypes
