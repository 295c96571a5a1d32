"""`args` of a destination: the source's, with what the layout decides."""

from __future__ import annotations

from typing import Any

from strategy.megatron import DUALPIPEV
from transform_ckpt.formats.torch_values import Instance, Namespace, TensorRef
from transform_ckpt.megatron.facts import Facts

_MARK = object()


def args_for(
    args: Namespace, facts: Facts, place: tuple[int, int, int], iteration: int | None, vocabulary: int | None
) -> Namespace:
    """A Namespace that Megatron-LM's and MindSpeed-LLM's --use-checkpoint-args take the layout from."""
    fields = {key: value for key, value in args.fields.items() if is_plain(value) and not isinstance(value, TensorRef)}
    sizes = facts.sizes
    virtual = sizes.vpp > 1 and facts.schedule != DUALPIPEV
    decided: dict[str, Any] = {
        "tensor_model_parallel_size": sizes.tp,
        "pipeline_model_parallel_size": sizes.pp,
        "virtual_pipeline_model_parallel_size": sizes.vpp if virtual else None,
        "num_layers_per_virtual_pipeline_stage": facts.num_layers // sizes.pp // sizes.vpp if virtual else None,
        "expert_model_parallel_size": sizes.ep,
        "context_parallel_size": sizes.cp,
        "data_parallel_size": sizes.dp,
        "world_size": sizes.tp * sizes.pp * sizes.dp * sizes.cp,
        "num_layers": facts.num_layers,
    }
    optional = {
        "expert_tensor_parallel_size": (facts.etp, sizes.etp is not None),
        "num_layer_list": (",".join(map(str, facts.num_layer_list)) or None, bool(facts.num_layer_list)),
        "noop_layers": (_like(fields.get("noop_layers"), facts.noop_layers), bool(facts.noop_layers)),
        "decoder_first_pipeline_num_layers": (facts.first_stage_layers, facts.first_stage_layers is not None),
        "decoder_last_pipeline_num_layers": (facts.last_stage_layers, facts.last_stage_layers is not None),
        "schedules_method": (facts.schedule, facts.schedule is not None),
        "padded_vocab_size": (vocabulary, vocabulary is not None),
        "iteration": (iteration, False),
        "rank": ((place[1] * sizes.dp * sizes.cp + place[2]) * sizes.tp + place[0], False),
    }
    for key, (value, needed) in optional.items():
        if needed or fields.get(key, _MARK) not in (_MARK, None, ()):
            decided[key] = (
                value if value is not None or key not in ("iteration", "padded_vocab_size") else fields.get(key)
            )
    for name in ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"):
        if fields.get(name) and facts.first_stage_layers is None and facts.last_stage_layers is None:
            decided[name] = False
    return Namespace({**fields, **decided}, args.kind)


def bucket_args(size: int | None) -> dict[str, Any]:
    """What makes Megatron take buckets of `size` elements: 0 is one bucket for each chunk, None leaves args alone."""
    return {} if size is None else {"overlap_grad_reduce": size > 0, "ddp_bucket_size": size or None}


def _like(old: Any, layers: tuple[int, ...]) -> Any:
    """noop_layers in the form that the source has it: MindSpeed keeps a set in memory and text on the command line."""
    if not layers:
        return None
    return set(layers) if isinstance(old, set) else ",".join(map(str, layers))


def is_plain(value: Any) -> bool:
    """Can it be written again?  Objects of a training framework's classes cannot."""
    if isinstance(value, Instance):
        return False
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    return True
