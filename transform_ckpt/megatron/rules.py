"""By which rule Megatron cuts each parameter over tensor- and expert-parallel ranks: a table of names.

A stored tensor holds boxes of a logical one, which is the tensor of a model on one rank (TP = EP = ETP = 1), but for:
gated `linear_fc1` is [all gates; all ups], so that a shard [gate_r; up_r] is two boxes; `experts.weight1` of grouped
experts is [E, H, 2, F] ([E, H, 1, F] when not gated) and `experts.weight2` [E, F, H], as they lie in memory (the stored
shape only reinterprets it); experts have global numbers.  Padding rows of the vocabulary belong to the logical tensor.

Shapes decide what names leave open, by comparison with a sibling in the same layer.  Facts: megatron-core 0.16.1
(tensor_parallel/layers.py, transformer/moe/experts.py, multi_latent_attention.py, multi_token_prediction.py),
megatron.legacy, MindSpeed-LLM convert_ckpt_v2.  May import views and errors only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from transform_ckpt.errors import InputError
from transform_ckpt.views import Box, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """One rank's place: sizes and ranks of TP, EP and ETP, and how many experts the model has (None: it has none)."""

    tp: int = 1
    tp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0
    etp: int = 1
    etp_rank: int = 0
    num_experts: int | None = None

    def __post_init__(self) -> None:
        for size, rank in ((self.tp, self.tp_rank), (self.ep, self.ep_rank), (self.etp, self.etp_rank)):
            if not 0 <= rank < size:
                raise ValueError(f"rank {rank} of {size} in {self}")

    @property
    def alone(self) -> bool:
        """Whether one rank holds everything."""
        return self.tp == self.ep == self.etp == 1

    def experts(self, name: str) -> int:
        """How many experts a rank has; `name` is the tensor that asks."""
        if self.num_experts is None:
            raise InputError(f"{name!r}: is an expert's, but how many the model has is not known: give num_experts")
        count, rest = divmod(self.num_experts, self.ep)
        if rest or not count:
            raise InputError(f"{name!r}: {self.num_experts} experts do not divide over EP {self.ep}")
        return count


@dataclass(frozen=True, slots=True)
class Rule:
    """How a tensor is cut, whatever the sizes: what a reader learns of it, and all that a writer needs.

    `axis` of the logical tensor is cut over TP, or over ETP when it is an expert's; None is whole on every rank.
    `blocks` parts of axis 0 are cut each by itself.  `stacked`: axis 0 counts the experts and is cut over EP.
    `vocabulary`: axis 0 may be padded.  `known` is False for a name that only one rank can have.
    """

    axis: int | None = None
    blocks: int = 1
    expert: bool = False
    stacked: bool = False
    vocabulary: bool = False
    known: bool = True


WHOLE = Rule()
ROWS = Rule(0)
COLUMNS = Rule(1)
VOCABULARY = Rule(0, vocabulary=True)
UNKNOWN = Rule(known=False)
EXPERT_WHOLE = Rule(expert=True)
EXPERT_COLUMNS = Rule(1, expert=True)
GROUPED1 = Rule(3, expert=True, stacked=True)
GROUPED2 = Rule(1, expert=True, stacked=True)


@dataclass(frozen=True, slots=True)
class Cut:
    """How a stored tensor holds parts of a logical one.

    `name` is the logical name, with the layer's local number still in place.  `boxes` lie one behind the other in the
    stored tensor; what is behind them (a vocabulary's padding in a target) is zeros.
    """

    name: str
    shape: Shape
    stored: Shape
    boxes: tuple[Box, ...]
    rule: Rule


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored tensor among the others of its model chunk."""

    name: str
    shape: Shape
    others: Mapping[str, Shape]
    sharding: Sharding

    def sibling(self, old: str, new: str) -> Shape:
        """Shape of the matrix whose name has `new` where this one's has the regular expression `old`."""
        name = re.sub(old, new, self.name)
        shape = self.others.get(name)
        if shape is None or len(shape) != 2:
            found = "absent" if shape is None else f"of shape {list(shape)}"
            raise self.error(f"{name!r}, which tells how it is cut, is {found}: the checkpoint is not whole")
        return shape

    @property
    def rows(self) -> int:
        """Length of axis 0."""
        return self.shape[0] if self.shape else 0

    def beside(self, leaf: str) -> bool:
        """Whether the same attention has such a tensor."""
        return f"{self.name.rpartition('.linear_')[0]}.{leaf}" in self.others

    def error(self, what: str) -> InputError:
        """What is wrong with it, as an error."""
        return InputError(f"{self.name!r} of shape {list(self.shape)}: {what}")


Found = tuple[Rule, Shape]
"""A rule, and the stored shape with the logical tensor's axes."""


def _first_of_mlp(tensor: Stored) -> Found:
    """Gated when it has twice as many rows as the second matrix has columns."""
    second = {"linear_fc1": "linear_fc2", "dense_h_to_4h": "dense_4h_to_h"}
    first = next(name for name in second if name in tensor.name)
    _, width = tensor.sibling(rf"{first}\.(?:weight|bias)(?=\d*$)", f"{second[first]}.weight")
    if not tensor.rows or tensor.rows not in {width, 2 * width}:
        raise tensor.error(f"expected {width} rows, or {2 * width} when gated, as {second[first]} has {width} columns")
    return Rule(0, blocks=tensor.rows // width, expert="mlp.experts." in tensor.name), tensor.shape


def _grouped_first(tensor: Stored) -> Found:
    """[H, n * 2F] is [n, H, 2, F] in memory, or [n, H, 1, F]."""
    rows, hidden = tensor.sibling("weight1$", "weight2")
    count = tensor.sharding.experts(tensor.name)
    if not rows or rows % count or tensor.shape not in {(hidden, rows), (hidden, 2 * rows)}:
        raise tensor.error(
            f"expected [{hidden}, {rows}], or [{hidden}, {2 * rows}] when gated, for {count} experts, "
            f"as weight2 is [{rows}, {hidden}]"
        )
    return GROUPED1, (count, hidden, tensor.shape[1] // rows, rows // count)


def _grouped_second(tensor: Stored) -> Found:
    count = tensor.sharding.experts(tensor.name)
    if len(tensor.shape) != 2 or tensor.shape[0] % count:
        raise tensor.error(f"expected the rows of {count} experts one behind the other")
    return GROUPED2, (count, tensor.shape[0] // count, tensor.shape[1])


def _fused_qkv(tensor: Stored) -> Found:
    """MindSpeed's latent attention has both down-projections under this name, whole on every rank."""
    latent = tensor.beside("linear_kv_up_proj.weight") or tensor.beside("linear_kv_nope.weight")
    return (WHOLE if latent else ROWS), tensor.shape


def _down_projection(tensor: Stored) -> Found:
    """Cut in the local spec, whole in Transformer Engine's.

    On several ranks q_down has as many rows as q_up has columns when whole, and kv_down is as q_down; where there is no
    q_down, kv_down (kv_lora + rope rows) has more rows than kv_up has columns when whole.  One rank's shapes are the
    same in both: Transformer Engine has the norm in the up-projection.
    """
    tp = tensor.sharding.tp
    if tp == 1:
        fused = any(tensor.beside(f"linear_{x}_up_proj.layer_norm_weight") for x in ("q", "kv"))
        apart = any(tensor.beside(f"{x}_layernorm.weight") for x in ("q", "kv"))
        is_whole = fused or (not apart and any(name.endswith(".layer_norm_weight") for name in tensor.others))
    elif tensor.beside("linear_q_down_proj.weight"):
        rows, _ = tensor.sibling("linear_(?:q|kv)_down", "linear_q_down")
        _, rank = tensor.sibling("linear_(?:q|kv)_down", "linear_q_up")
        if rows not in {rank, rank / tp}:
            raise tensor.error(f"linear_q_down_proj has {rows} rows, expected {rank}, or a {tp}th when it is cut")
        is_whole = rows == rank
    else:
        _, rank = tensor.sibling("linear_kv_down", "linear_kv_up")
        is_whole = tensor.rows > rank
    return (WHOLE if is_whole else ROWS), tensor.shape


_WB = r"\.(?:weight|bias)"
_LM = r"(?:language_model\.)?"
_STACK = _LM + r"(?:encoder|decoder|transformer)\."
_LAYER = re.compile(rf"^(?:{_STACK}layers\.\d+|mtp\.layers\.\d+\.(?:transformer_layer|mtp_model_layer))\.")
_OUTSIDE = (
    (_LM + r"embedding\.word_embeddings\.weight", VOCABULARY),
    (r"word_embeddings(?:_for_head)?\.weight", VOCABULARY),
    (_LM + r"output_layer" + _WB, VOCABULARY),
    (r"lm_head" + _WB, VOCABULARY),
    (r"lm_head\.(?:dense|norm|layernorm|layer_norm)" + _WB, WHOLE),
    (_LM + r"embedding\.(?:position|tokentype)_embeddings\.weight", WHOLE),
    (rf"(?:{_STACK})?final_(?:norm|layernorm)" + _WB, WHOLE),
    (r"mtp\.final_layernorms\.\d+" + _WB, WHOLE),
    (r"mtp\.layers\.\d+\.(?:enorm|hnorm|final_layernorm)" + _WB, WHOLE),
    (r"mtp\.layers\.\d+\.eh_proj" + _WB, ROWS),
)
_ATTENTION, _MLP, _EXPERTS = r"self_attention\.", r"mlp\.(?:shared_experts\.)?", r"mlp\.experts\."
_IN_LAYER = (
    (r"(?:input_norm|post_attention_norm|post_attn_norm)" + _WB, WHOLE),
    (r"(?:input|post_attention|pre_mlp|post_mlp)_layernorm" + _WB, WHOLE),
    (r".+\.layer_norm_(?:weight|bias)", WHOLE),  # Transformer Engine: in front of a linear layer
    (r".+\.post_layernorm" + _WB, WHOLE),
    (_ATTENTION + r"(?:q|k|kv)_layernorm" + _WB, WHOLE),
    (_ATTENTION + r"(?:query_key_value|query|key_value)" + _WB, ROWS),
    (_ATTENTION + r"linear_(?:(?:q|q_up|kv_up)_proj|qk_nope|qk_rope|kv_nope|v)" + _WB, ROWS),
    (_ATTENTION + r"linear_qkv" + _WB, _fused_qkv),
    (_ATTENTION + r"linear_(?:q|kv)_down_proj\.weight", _down_projection),
    (_ATTENTION + r"core_attention\.softmax_offset", ROWS),
    (_ATTENTION + r"dsa_indexer\..+", WHOLE),
    (_ATTENTION + r"(?:linear_proj|dense)\.weight", COLUMNS),
    (_ATTENTION + r"(?:linear_proj|dense)\.bias", WHOLE),
    (_MLP + r"(?:linear_fc1|dense_h_to_4h)" + _WB, _first_of_mlp),
    (_MLP + r"(?:linear_fc2|dense_4h_to_h)\.weight", COLUMNS),
    (_MLP + r"(?:linear_fc2|dense_4h_to_h)\.bias", WHOLE),
    (r"mlp\.shared_experts\.gate[._]weight", WHOLE),
    (r"mlp\.router\.(?:weight|bias|expert_bias)", WHOLE),
    (_EXPERTS + r"(?:local_experts\.#\.linear_fc1" + _WB + r"|linear_fc1" + _WB + "#)", _first_of_mlp),
    (_EXPERTS + r"(?:local_experts\.#\.linear_fc2\.weight|linear_fc2\.weight#)", EXPERT_COLUMNS),
    (_EXPERTS + r"(?:local_experts\.#\.linear_fc2\.bias|linear_fc2\.bias#)", EXPERT_WHOLE),
    (_EXPERTS + r"weight1", _grouped_first),
    (_EXPERTS + r"weight2", _grouped_second),
)
_TABLE = (*_OUTSIDE, *((r"layer:" + pattern, entry) for pattern, entry in _IN_LAYER))
EXPERT = re.compile(r"(.*mlp\.experts\.(?:local_experts\.|linear_fc[12]\.(?:weight|bias)))(\d{1,9})(.*)")
"""What is before and behind the number of an expert, in a file or in the model."""


def rule_of(tensor: Stored) -> Found | None:
    """The rule of a tensor by its name and, where that leaves it open, by its shape; None for an unknown name."""
    entry = _entry(EXPERT.sub(r"\1#\3", _LAYER.sub("layer:", tensor.name)))
    return (entry, tensor.shape) if isinstance(entry, Rule) else entry and entry(tensor)


@lru_cache(maxsize=4096)
def _entry(name: str) -> Rule | Callable[[Stored], Found] | None:
    """What the table has for a name with "layer:" for all up to the layer's number, and # for the expert's."""
    return next((entry for pattern, entry in _TABLE if re.fullmatch(pattern, name)), None)
