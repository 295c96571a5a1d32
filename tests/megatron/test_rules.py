"""What a rank stores of each parameter, against a cutter of a few NumPy lines and against files of the real systems."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategy.megatron import LayerMap, directory_name, layer_map
from transform_ckpt.check import exact_cover
from transform_ckpt.errors import InputError
from transform_ckpt.megatron.cuts import read_cuts, stored_name, write_cut
from transform_ckpt.megatron.rules import Cut, Rule, Sharding
from transform_ckpt.views import Box, whole

Tensors = Iterator[tuple[str, tuple[int, ...], str]]
check = settings(deadline=None, max_examples=10)


# ---------------------------------------------------------------------------------------------- models, cut by hand


def by_hand(kind: str, array: Any, at: Sharding) -> Any:
    """What a rank stores of a whole tensor, as Megatron's layers initialise it."""
    tp, rank = (at.etp, at.etp_rank) if kind.startswith("expert") else (at.tp, at.tp_rank)
    match kind.removeprefix("expert "):
        case "whole":
            return array
        case "rows":
            return np.split(array, tp)[rank]
        case "columns":
            return np.split(array, tp, axis=1)[rank]
        case "gated":
            gate, up = np.split(array, 2)
            return np.concatenate([np.split(gate, tp)[rank], np.split(up, tp)[rank]])
        case "grouped1":  # each expert's transposed [gate_r; up_r], then seen as [H, n * 2F]
            mine = np.split(array, at.ep)[at.ep_rank]
            fc1 = [by_hand("expert rows", e.transpose(2, 1, 0), at).transpose(2, 1, 0) for e in mine]
            return np.stack([e.reshape(e.shape[0], -1) for e in fc1]).reshape(array.shape[1], -1)
        case "grouped2":
            mine = np.split(array, at.ep)[at.ep_rank]
            return np.concatenate([by_hand("expert rows", e, at) for e in mine])
    raise AssertionError(kind)


def decoder(layer: str, tp: int, width: int) -> Tensors:
    """Attention and a dense MLP, by the names of the local spec and of Transformer Engine."""
    layer, h, f, q = layer.format(0), 4, tp * width, 6 * tp
    for norm in ("input_layernorm", "pre_mlp_layernorm", "post_attn_norm", "post_mlp_layernorm"):
        yield f"{layer}.{norm}.weight", (h,), "whole"
    yield f"{layer}.self_attention.linear_qkv.layer_norm_weight", (h,), "whole"
    yield f"{layer}.mlp.linear_fc1.layer_norm_bias", (h,), "whole"
    yield f"{layer}.self_attention.linear_proj.post_layernorm.weight", (h,), "whole"
    yield f"{layer}.self_attention.q_layernorm.weight", (2,), "whole"
    yield f"{layer}.self_attention.k_layernorm.bias", (2,), "whole"
    yield f"{layer}.self_attention.linear_qkv.weight", (q, h), "rows"
    yield f"{layer}.self_attention.linear_qkv.bias", (q,), "rows"
    yield f"{layer}.self_attention.core_attention.softmax_offset", (2 * tp,), "rows"
    yield f"{layer}.self_attention.linear_proj.weight", (h, 2 * tp), "columns"
    yield f"{layer}.self_attention.linear_proj.bias", (h,), "whole"
    yield f"{layer}.mlp.linear_fc1.weight", (2 * f, h), "gated"
    yield f"{layer}.mlp.linear_fc1.bias", (2 * f,), "gated"
    yield f"{layer}.mlp.linear_fc2.weight", (h, f), "columns"
    yield f"{layer}.mlp.linear_fc2.bias", (h,), "whole"


def legacy(layer: str, tp: int, width: int) -> Tensors:
    """megatron.legacy: not gated in one layer, gated in the other."""
    h, f = 4, tp * width
    for number, (blocks, kind) in enumerate(((1, "rows"), (2, "gated"))):
        at = layer.format(number)
        for norm in ("input_norm", "input_layernorm", "post_attention_norm", "post_attention_layernorm"):
            yield f"{at}.{norm}.bias", (h,), "whole"
        yield f"{at}.mlp.dense_h_to_4h.weight", (blocks * f, h), kind
        yield f"{at}.mlp.dense_h_to_4h.bias", (blocks * f,), kind
        yield f"{at}.mlp.dense_4h_to_h.weight", (h, f), "columns"
        yield f"{at}.mlp.dense_4h_to_h.bias", (h,), "whole"
        for name in ("query_key_value", "query", "key_value"):
            yield f"{at}.self_attention.{name}.weight", (3 * tp, h), "rows"
            yield f"{at}.self_attention.{name}.bias", (3 * tp,), "rows"
        yield f"{at}.self_attention.dense.weight", (h, tp), "columns"
        yield f"{at}.self_attention.dense.bias", (h,), "whole"


def moe(layer: str, tp: int, width: int, etp: int, experts: int) -> Tensors:
    """Router, shared and other experts: gated in layer 0 only (no model has its experts in three ways)."""
    h, f = 4, etp * width
    for number, (blocks, kind) in enumerate(((2, "gated"), (1, "rows"))):
        at = layer.format(number) + ".mlp"
        yield f"{at}.router.weight", (experts, h), "whole"
        yield f"{at}.router.bias", (experts,), "whole"
        yield f"{at}.router.expert_bias", (experts,), "whole"
        yield f"{at}.shared_experts.gate_weight", (1, h), "whole"
        yield f"{at}.shared_experts.linear_fc1.weight", (blocks * tp * width, h), kind
        yield f"{at}.shared_experts.linear_fc2.weight", (h, tp * width), "columns"
        yield f"{at}.experts.weight1", (experts, h, blocks, f), "expert grouped1"
        yield f"{at}.experts.weight2", (experts, f, h), "expert grouped2"
        for e in range(experts):
            for form in ("local_experts.{e}.{fc}.{w}", "{fc}.{w}{e}"):
                names = [
                    f"{at}.experts.{form.format(e=e, fc=fc, w=w)}"
                    for fc, w in product(("linear_fc1", "linear_fc2"), ("weight", "bias"))
                ]
                yield names[0], (blocks * f, h), f"expert {kind}"
                yield names[1], (blocks * f,), f"expert {kind}"
                yield names[2], (h, f), "expert columns"
                yield names[3], (h,), "expert whole"


def latent(layer: str, tp: int, width: int) -> Tensors:
    """Latent attention: local and Transformer Engine's, both without q_lora, MindSpeed's, MindSpeed's split one."""
    h, q, kv, rope = 4, 2 * tp * width, 4 * tp, tp
    for number, kind in enumerate(("rows", "whole", "rows", "whole")):
        at = layer.format(number) + ".self_attention"
        if number < 2:
            yield f"{at}.linear_q_down_proj.weight", (q, h), kind
            yield f"{at}.linear_q_up_proj.weight", (3 * tp, q), "rows"
        else:
            yield f"{at}.linear_q_proj.weight", (3 * tp, h), "rows"
        yield f"{at}.linear_kv_down_proj.weight", (kv + rope, h), kind
        yield f"{at}.linear_kv_up_proj.weight", (5 * tp, kv), "rows"
        norm = "kv_layernorm.weight" if kind == "rows" else "linear_kv_up_proj.layer_norm_weight"
        yield f"{at}.{norm}", (kv,), "whole"
    for number, ups in ((4, "q_up_proj kv_up_proj"), (5, "qk_nope qk_rope kv_nope v")):
        at = layer.format(number) + ".self_attention"
        yield f"{at}.linear_qkv.weight", (q + kv + rope, h), "whole"
        for up in ups.split():
            yield f"{at}.linear_{up}.weight", (5 * tp, kv), "rows"
        for name in ("wq_b.weight", "wk.weight", "k_norm.bias", "weights_proj.weight"):
            yield f"{at}.dsa_indexer.{name}", (h,), "whole"


def outside(tp: int) -> Tensors:
    """What is in no layer."""
    for prefix in ("", "language_model."):
        yield f"{prefix}embedding.word_embeddings.weight", (3 * tp, 4), "rows"
        yield f"{prefix}embedding.position_embeddings.weight", (5, 4), "whole"
        yield f"{prefix}output_layer.weight", (3 * tp, 4), "rows"
    for stack in ("decoder", "encoder", "language_model.encoder", "language_model.transformer"):
        yield f"{stack}.final_norm.weight", (4,), "whole"
        yield f"{stack}.final_layernorm.bias", (4,), "whole"
    for norm in ("final_layernorm", "mtp.final_layernorms.1", *(f"mtp.layers.0.{n}norm" for n in ("e", "h"))):
        yield f"{norm}.weight", (4,), "whole"
    yield "mtp.layers.0.final_layernorm.weight", (4,), "whole"
    yield "mtp.layers.0.eh_proj.weight", (2 * tp, 8), "rows"
    yield "word_embeddings.weight", (3 * tp, 4), "rows"
    yield "word_embeddings_for_head.weight", (3 * tp, 4), "rows"
    yield "lm_head.bias", (3 * tp,), "rows"
    yield "lm_head.dense.weight", (4, 4), "whole"


LAYERS = (
    "decoder.layers.{}",
    "encoder.layers.{}",
    "language_model.encoder.layers.{}",
    "language_model.transformer.layers.{}",
    "mtp.layers.{}.transformer_layer",
    "mtp.layers.{}.mtp_model_layer",
)


STACKS = {
    "decoder": lambda layer, tp, ep, etp, width: decoder(layer, tp, width),
    "legacy": lambda layer, tp, ep, etp, width: legacy(layer, tp, width),
    "moe": lambda layer, tp, ep, etp, width: moe(layer, tp, width, etp, ep * width),
    "latent": lambda layer, tp, ep, etp, width: latent(layer, tp, width),
    "outside": lambda layer, tp, ep, etp, width: outside(tp),
}
SIZES = st.tuples(*[st.integers(1, 3)] * 3)


def ranks(tp: int, ep: int, etp: int, experts: int | None) -> list[Sharding]:
    return [
        Sharding(tp=tp, tp_rank=t, ep=ep, ep_rank=e, etp=etp, etp_rank=x, num_experts=experts)
        for t, e, x in product(range(tp), range(ep), range(etp))
    ]


def name_by_hand(name: str, at: Sharding) -> str | None:
    """The stored name of a logical one, None where another rank has this expert."""
    match = re.search(r"(?<=experts[.])\d+|(?<=fc[12][.]weight)\d+|(?<=fc[12][.]bias)\d+", name)
    if match is None:
        return name
    count = at.num_experts // at.ep
    ep_rank, local = divmod(int(match[0]), count)
    return f"{name[: match.start()]}{local}{name[match.end() :]}" if ep_rank == at.ep_rank else None


def iota(shape: tuple[int, ...]) -> Any:
    return np.arange(int(np.prod(shape))).reshape(shape)


def held(cut: Cut, logical: Any) -> Any:
    """The stored tensor filled from its boxes, as the converter does it."""
    stored = np.zeros(int(np.prod(cut.stored)), logical.dtype)
    at = 0
    for box in cut.boxes:
        stored[at : at + box.numel] = part(logical, box).ravel()
        at += box.numel
    return stored.reshape(cut.stored)


def part(tensor: Any, box: Box) -> Any:
    return tensor[tuple(slice(a, b) for a, b in zip(box.start, box.stop(), strict=True))]


@check
@given(source=SIZES, target=SIZES, width=st.integers(1, 2), layer=st.sampled_from(LAYERS))
@pytest.mark.parametrize("stack", STACKS)
def test_ranks_hold_what_megatron_stores_and_together_everything(
    stack: str, source: tuple[int, int, int], target: tuple[int, int, int], width: int, layer: str
) -> None:
    """`source` and `target` are (tp, ep, etp); the model divides by both."""
    sizes = [a * b for a, b in zip(source, target, strict=True)]
    tensors, experts = [*STACKS[stack](layer, *sizes, width)], sizes[1] * width
    boxes: dict[str, set[Box]] = {}
    rules: dict[str, Rule] = {}
    for at in ranks(*source, experts):
        stored = {}
        for name, shape, kind in tensors:
            local = name_by_hand(name, at)
            assert stored_name(name, at) == local
            if local is not None:
                stored[local] = name, by_hand(kind, iota(shape), at)
        cuts = read_cuts({local: array.shape for local, (_, array) in stored.items()}, at, "chunk")
        assert cuts.keys() == stored.keys()
        for local, (name, array) in stored.items():
            cut = cuts[local]
            assert cut.name == name
            np.testing.assert_array_equal(held(cut, iota(cut.shape)), array, strict=True)
            assert write_cut(name, cut.shape, cut.rule, at) == cut
            boxes.setdefault(name, set()).update(cut.boxes)
            assert rules.setdefault(name, cut.rule) == cut.rule
    shapes = {name: shape for name, shape, _ in tensors}
    assert boxes.keys() == shapes.keys()
    for name, found in boxes.items():
        outer = whole(shapes[name])
        assert exact_cover([box.view_in(outer) for box in found], outer.numel) is None
    for at in ranks(*target, experts):
        for name, shape, kind in tensors:
            cut = write_cut(name, shape, rules[name], at)
            np.testing.assert_array_equal(held(cut, iota(shape)), by_hand(kind, iota(shape), at), strict=True)


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_have_many_prefixes(layer: str) -> None:
    expected = {name: kind == "whole" for name, _, kind in decoder(layer, 2, 1)}
    shapes = {name: by_hand(kind, iota(shape), TWO).shape for name, shape, kind in decoder(layer, 2, 1)}
    cuts = read_cuts(shapes, TWO, "chunk")
    assert {name: cut.rule.axis is None for name, cut in cuts.items()} == expected


@check
@given(tp=st.integers(1, 4), source=st.integers(1, 4), rows=st.integers(1, 9), padded=st.integers(0, 9))
def test_vocabulary_is_clipped_and_padded(tp: int, source: int, rows: int, padded: int) -> None:
    name, per_rank = "embedding.word_embeddings.weight", -(-padded // tp)
    (cut,) = read_cuts({name: (rows, 3)}, Sharding(tp=source), "chunk").values()
    assert cut.shape == (rows * source, 3)
    logical = iota(cut.shape) + 1
    found = np.concatenate(
        [held(write_cut(name, cut.shape, cut.rule, at, per_rank * tp), logical) for at in ranks(tp, 1, 1, None)]
    )
    expected = np.concatenate([logical, np.zeros((per_rank * tp, 3), int)])[: per_rank * tp]
    np.testing.assert_array_equal(found, expected)
    bias = write_cut("output_layer.bias", (2,), cut.rule, Sharding(tp=2, tp_rank=1), rows=6)
    assert (bias.stored, bias.boxes) == ((3,), ())


def test_rows_are_for_the_vocabulary_only() -> None:
    assert write_cut("w", (4, 3), Rule(0), Sharding(tp=2), rows=8).stored == (2, 3)


def test_one_rank_has_unknown_tensors_whole_and_they_stay_there() -> None:
    (cut,) = read_cuts({"decoder.layers.0.mixer.A_log": (4, 2)}, Sharding(), "chunk").values()
    assert cut.boxes == (whole((4, 2)),)
    assert write_cut(cut.name, cut.shape, cut.rule, Sharding()) == cut
    for at in (Sharding(tp=2), Sharding(ep=2), Sharding(etp=2)):
        with pytest.raises(
            InputError, match=r"'decoder.layers.0.mixer.A_log': how TP ., EP . cut it is not known: write"
        ):
            write_cut(cut.name, cut.shape, cut.rule, at)


def test_scalars_are_whole() -> None:
    (cut,) = read_cuts({"scale": ()}, Sharding(), "chunk").values()
    assert cut.boxes == (Box((), ()),)


QKV = "decoder.layers.{}.self_attention.linear_{}.weight"


def test_one_rank_tells_whose_latent_attention_it_is_by_its_norms() -> None:
    shapes = {QKV.format(0, f"{x}_{way}_proj"): (4, 4) for x, way in product(("q", "kv"), ("up", "down"))}
    for extra, axis in (
        ("decoder.layers.0.self_attention.kv_layernorm.weight", 0),
        ("decoder.layers.0.self_attention.linear_q_up_proj.layer_norm_weight", None),
        ("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", None),
        ("decoder.layers.1.pre_mlp_layernorm.weight", 0),
    ):
        cuts = read_cuts({**shapes, extra: (4,)}, Sharding(), "chunk")
        assert {cuts[QKV.format(0, f"{x}_down_proj")].rule.axis for x in ("q", "kv")} == {axis}


# ------------------------------------------------------------------------------------------------------- what is wrong

FC1, FC2 = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc2.weight"
EXPERT = "decoder.layers.0.mlp.experts."
TWO = Sharding(tp=2)


@pytest.mark.parametrize(
    ("shapes", "at", "message"),
    [
        (
            {"vision.w": (2,), "decoder.layers.0.mixer.in": (4,)},
            TWO,
            r"chunk: how TP 2, EP 1 .*: decoder.*mixer.in, vi",
        ),
        ({"w": (2,)}, Sharding(ep=2), "TP 1, EP 2 cut these is not known: w;"),
        ({"layer:mlp.linear_fc2.weight.x": (2, 2)}, TWO, "not known"),
        ({FC1: (4, 2)}, TWO, f"chunk: '{FC1}' of shape .4, 2.: '{FC2}', which tells how it is cut, is absent"),
        ({FC1: (4, 2), FC2: (2,)}, TWO, r"is of shape \[2\]"),
        ({FC1: (6, 2), FC2: (2, 2)}, TWO, r"'.*fc1.weight' of shape .6, 2.: expected 2 rows, or 4 when gated"),
        ({FC1: (), FC2: (2, 2)}, TWO, "expected 2 rows"),
        ({FC1: (0, 2), FC2: (2, 0)}, TWO, "expected 0 rows"),
        ({FC2: (4,)}, TWO, "expected 2 axes at least, as axis 1 is cut"),
        ({QKV.format(0, "qkv"): ()}, TWO, "expected 1 axes at least"),
        ({f"{EXPERT}weight1": (4, 8)}, Sharding(ep=2, num_experts=2), "weight2', which tells how it is cut, is absent"),
        ({f"{EXPERT}weight2": (8, 4)}, Sharding(ep=2), "experts.weight2': is an expert's, but how many"),
        ({f"{EXPERT}weight2": (7, 4)}, Sharding(ep=2, num_experts=4), "rows of 2 experts"),
        ({f"{EXPERT}weight2": (8,)}, Sharding(ep=2, num_experts=4), "rows of 2 experts"),
        ({f"{EXPERT}weight2": (8, 4)}, Sharding(ep=2, num_experts=3), "3 experts do not divide over EP 2"),
        (
            {f"{EXPERT}weight1": (4, 6), f"{EXPERT}weight2": (4, 4)},
            Sharding(num_experts=2),
            r"expected \[4, 4\], or \[4, 8",
        ),
        ({f"{EXPERT}weight1": (3, 8), f"{EXPERT}weight2": (4, 4)}, Sharding(num_experts=2), r"expected \[4, 4\]"),
        ({f"{EXPERT}weight1": (4, 8), f"{EXPERT}weight2": (4, 4)}, Sharding(num_experts=3), "for 3 experts"),
        ({f"{EXPERT}linear_fc2.weight2": (4, 4)}, Sharding(ep=2, num_experts=4), "a rank has 2 experts"),
        ({f"{EXPERT}linear_fc2.weight1": (4, 4)}, Sharding(num_experts=3), r"fc2.weight\*' of experts 0, 2 is missing"),
        (
            {f"{EXPERT}local_experts.0.linear_fc2.bias": (4,)},
            Sharding(num_experts=2),
            r"\*.linear_fc2.bias' of experts 1",
        ),
        ({QKV.format(0, "q_down_proj"): (3, 4), QKV.format(0, "q_up_proj"): (4, 8)}, TWO, "3 rows, expected 8"),
        ({QKV.format(0, "q_down_proj"): (3, 4)}, TWO, "q_up_proj.weight', which tells how it is cut, is absent"),
        ({QKV.format(0, "kv_down_proj"): (3, 4)}, TWO, "kv_up_proj.weight', which tells how it is cut, is absent"),
    ],
)
def test_what_cannot_be_read_is_refused(shapes: Mapping[str, Any], at: Sharding, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_cuts(shapes, at, "chunk")


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as caught:
        read_cuts({FC1: (4, 2), FC1.replace("0", "1"): (4, 2), "odd": (2,)}, TWO, "chunk")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("shape", "rule", "at", "message"),
    [
        ((5, 2), Rule(0), TWO, r"'w' of shape \[5, 2\]: 5 on axis 0 do not divide into 2 parts"),
        ((6, 2), Rule(0, blocks=2), TWO, "6 on axis 0 do not divide into 2 x 2 parts"),
        ((3, 2, 2), Rule(1, expert=True, stacked=True), Sharding(ep=2), "3 on axis 0 do not divide into 2 parts"),
        ((3, 3), Rule(1, expert=True), Sharding(etp=2), "3 on axis 1"),
    ],
)
def test_what_does_not_divide_is_refused(shape: Any, rule: Rule, at: Sharding, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_cut("w", shape, rule, at)
    with pytest.raises(InputError, match="7 on axis 0"):
        write_cut("w", (8, 2), Rule(0, vocabulary=True), TWO, rows=7)


def test_names_and_ranks_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="2 experts do not divide over EP 4"):
        stored_name(f"{EXPERT}linear_fc1.weight1", Sharding(ep=4, num_experts=2))
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Sharding(etp=2, etp_rank=2)


# -------------------------------------------------------------------------------------- files of the real systems


@pytest.fixture(scope="module")
def torch() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch")


class Whole:
    """Logical tensors with global layer numbers, put together from the ranks' files; replicas must agree."""

    def __init__(self, layers: LayerMap) -> None:
        self.layers = layers
        self.tensors: dict[str, Any] = {}
        self.rules: dict[str, Rule] = {}
        self._filled: dict[str, Any] = {}

    def add(self, chunk: Mapping[str, Any], at: Sharding, pp: int, vpp: int) -> None:
        for local, cut in read_cuts({name: array.shape for name, array in chunk.items()}, at, "golden").items():
            name = re.sub(
                r"(?<=[.]layers[.])\d+", lambda m: str(self.layers.global_layer(pp, vpp, int(m[0]))), cut.name
            )
            assert self.rules.setdefault(name, cut.rule) == cut.rule
            whole_one = self.tensors.setdefault(name, np.zeros(cut.shape, chunk[local].dtype))
            filled = self._filled.setdefault(name, np.zeros(cut.shape, bool))
            assert whole_one.shape == cut.shape
            flat, start = chunk[local].ravel(), 0
            for box in cut.boxes:
                mine = flat[start : start + box.numel].reshape(box.size)
                there = part(filled, box)
                np.testing.assert_array_equal(part(whole_one, box)[there], mine[there])
                part(whole_one, box)[...] = mine
                there[...] = True
                start += box.numel
            assert start == flat.size

    def done(self) -> dict[str, Any]:
        assert all(filled.all() for filled in self._filled.values())
        return self.tensors


def load_legacy(torch: Any, root: Path, layers: LayerMap, tp: int, ep: int = 1, experts: int | None = None) -> Any:
    found, pp = Whole(layers), len(layers.chunks)
    for p, at in product(range(pp), ranks(tp, ep, 1, experts)):
        directory = directory_name(at.tp_rank, p, at.ep_rank, pp_size=pp, ep_size=ep)
        # ETP is TP in these files
        at = Sharding(**{f: getattr(at, f) for f in at.__slots__} | {"etp": tp, "etp_rank": at.tp_rank})  # noqa: PLW2901
        file = torch.load(root / "iter_0000001" / directory / "model_optim_rng.pt", weights_only=False)
        chunks = [file["model"]] if "model" in file else [file[f"model{v}"] for v in range(len(layers.chunks[p]))]
        for v, chunk in enumerate(chunks):
            tensors = {name: value.float().numpy() for name, value in chunk.items() if hasattr(value, "numpy")}
            found.add(tensors, at, p, v)
    return found.done()


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("llama_tp2pp2", {}),
        ("llama_tp2pp2vpp1", {"layers_per_virtual_stage": 1}),
        ("llama_tp2pp2_noop25", {"noop_layers": [2, 5]}),
        ("llama_tp1pp2_list13", {"num_layer_list": [1, 3]}),
    ],
)
def test_golden_files_of_one_model_are_the_same_whole(golden: Path, torch: Any, case: str, options: Any) -> None:
    root = golden / "mcore_legacy"
    layers = layer_map(4 + len(options.get("noop_layers", ())), pp=2, **options)
    found = load_legacy(torch, root / case, layers, tp=1 if "tp1" in case else 2)
    expected = load_legacy(torch, root / "llama_tp1pp1", layer_map(4), tp=1)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.parametrize("case", ["qwen3_moe_tp1ep2_seq", "qwen3_moe_tp2pp2ep2_gg"])
def test_golden_experts_are_those_of_hugging_face(golden: Path, torch: Any, case: str) -> None:
    from safetensors.torch import load_file

    hf: dict[str, Any] = {}
    for path in sorted((golden / "hf" / "qwen3_moe").glob("*.safetensors")):
        hf |= {name: value.float().numpy() for name, value in load_file(path).items()}
    tp, pp = (2, 2) if "tp2" in case else (1, 1)
    found = load_legacy(torch, golden / "mcore_legacy" / case, layer_map(4, pp=pp), tp, ep=2, experts=4)
    for layer, expert in product(range(4), range(4)):
        theirs, ours = f"model.layers.{layer}.mlp.experts.{expert}.", f"decoder.layers.{layer}.mlp.experts."
        gate, up, down = (hf[f"{theirs}{name}_proj.weight"] for name in ("gate", "up", "down"))
        if tp == 2:
            np.testing.assert_array_equal(found[f"{ours}weight1"][expert].transpose(1, 2, 0), [gate, up])
            np.testing.assert_array_equal(found[f"{ours}weight2"][expert].T, down)
        else:
            one = f"{ours}local_experts.{expert}.linear_fc"
            np.testing.assert_array_equal(found[f"{one}1.weight"], np.concatenate([gate, up]))
            np.testing.assert_array_equal(found[f"{one}2.weight"], down)
    np.testing.assert_array_equal(found["embedding.word_embeddings.weight"], hf["model.embed_tokens.weight"])
    for layer in range(4):
        ours, theirs = f"decoder.layers.{layer}.self_attention.", f"model.layers.{layer}.self_attn."
        np.testing.assert_array_equal(found[f"{ours}linear_proj.weight"], hf[f"{theirs}o_proj.weight"])


DIST_OPT = [
    ("mcore060/legacy_tp1_pp2_vpp2_dp2", 1, 2, 2, 1, 8),
    ("mcore060/legacy_tp2_pp2_dp1", 2, 2, 1, 1, 4),
    ("mcore060/legacy_tp2_pp2_dp2_buckets", 2, 2, 1, 1, 4),
    ("mcore060/mcore_moe_tp1_pp1_ep2_dp2", 1, 1, 1, 2, 4),
    ("mcore060/mcore_tp2_pp2_dp2", 2, 2, 1, 1, 4),
    ("mcore070/tp2_pp2_dp2_buckets", 2, 2, 1, 1, 4),
    ("mcore0161/tp2_pp2_dp2_buckets", 2, 2, 1, 1, 4),
]


def of_global_expert(name: str) -> str:
    """`local_experts.1...@ep1` of two experts a rank is expert 3."""
    name, _, ep_rank = name.partition("@ep")
    return re.sub(r"(?<=local_experts[.])\d+", lambda m: str(int(m[0]) + 2 * int(ep_rank)), name)


def gate_then_up(name: str, array: Any, tp: int) -> Any:
    """The truth has [gate_0; up_0; gate_1; up_1]."""
    if not re.search("linear_fc1|dense_h_to_4h", name):
        return array
    return array.reshape(tp, 2, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)


def test_all_golden_optimizers_are_compared(golden: Path) -> None:
    cases = [
        path.parent.parent.relative_to(golden / "dist_opt") for path in golden.glob("dist_opt/*/*/truth/meta.json")
    ]
    assert sorted(map(str, cases)) == sorted(case for case, *_ in DIST_OPT)


@pytest.mark.parametrize(("case", "tp", "pp", "vpp", "ep", "num_layers"), DIST_OPT)
@pytest.mark.parametrize("state", ["param", "exp_avg_sq"])
def test_golden_optimizer_states_are_the_true_ones(
    golden: Path, case: str, tp: int, pp: int, vpp: int, ep: int, num_layers: int, state: str
) -> None:
    truth = golden / "dist_opt" / case / "truth"
    dims = {
        name: item["tp_dim"] for name, item in json.loads((truth / "meta.json").read_text()).get("params", {}).items()
    }
    found = Whole(layer_map(num_layers, pp=pp, vpp=vpp))
    for p, at in product(range(pp), ranks(tp, ep, 1, 4 if ep > 1 else None)):
        suffix = f"_ep{at.ep_rank:03d}" if ep > 1 else ""
        with np.load(truth / f"truth_tp{at.tp_rank:02d}_pp{p:03d}{suffix}.npz") as file:
            for v in range(vpp):
                start, end = f"chunk{v}|module.", f"|{state}"
                names = [key for key in file if key.startswith(start) and key.endswith(end)]
                found.add({key[len(start) : -len(end)]: file[key] for key in names}, at, p, v)
    expected: dict[str, Any] = {}
    with np.load(truth / "truth_full.npz") as file:
        for key in file:
            name, _, what = key.removeprefix("module.").rpartition("|")
            if what == state:
                expected[of_global_expert(name)] = gate_then_up(name, file[key], tp)
                if dims:
                    assert found.rules[of_global_expert(name)].axis == dims[f"module.{name}"]
    assert found.done().keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found.tensors[name], array, strict=True)
