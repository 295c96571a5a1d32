"""Which models are converted between which layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.megatron_real.case import Case

Pair = tuple[Case, Case]


def pair(first: Case, **changes: Any) -> Pair:
    """A case and the same model in another layout."""
    return first, replace(first, **changes)


BUCKETS = Case(bucket_size=900, dp=2, pp=2)
MOE = Case(experts=4)
LATENT = Case(mla=True, qk_layernorm=True)
PAIRS = {
    "tp": pair(Case(), tp=2),
    "groups_below_tp": pair(Case(kv_groups=2), tp=4),
    "pp": pair(Case(pp=2, qkv_bias=True), pp=4),
    "vpp": pair(Case(pp=2, layers=8, qk_layernorm=True), vpp=2),
    "vpp_to_pp": pair(Case(pp=2, vpp=2, layers=8), pp=4, vpp=1),
    "dp": pair(Case(dp=2), dp=3),
    "cp": pair(Case(dp=2), dp=1, cp=2),
    "no_buckets": pair(BUCKETS, bucket_size=None, dp=1),
    "bucket_size": pair(BUCKETS, bucket_size=2000, tp=2),
    "same_bucket_size": pair(BUCKETS, pp=1, tp=2),
    "tied": pair(Case(tied=True), pp=2, tp=2),
    "tied_dp": pair(Case(tied=True, pp=2, hidden=8, ffn=20), dp=3),
    "tied_buckets": pair(Case(tied=True, pp=2, hidden=8, ffn=20, bucket_size=500), pp=4, dp=2),
    "biases": pair(Case(bias=True, norm="LayerNorm", gated=False), tp=2, pp=2),
    "softmax_offset": pair(Case(learned_softmax=True), tp=2),
    "uneven": pair(
        Case(layers=5, pp=3, first_stage_layers=1, last_stage_layers=2),
        pp=1,
        first_stage_layers=None,
        last_stage_layers=None,
    ),
    "uneven_other_end": pair(
        Case(layers=6, pp=2, first_stage_layers=1), first_stage_layers=None, last_stage_layers=2, tp=2
    ),
    "ep": pair(MOE, ep=2, dp=2),
    "ep4": pair(replace(MOE, ep=2, dp=2), ep=4, dp=4),
    "etp": pair(replace(MOE, tp=2, ep=2, etp=1, dp=2), etp=None),
    "etp_to_one_rank": pair(replace(MOE, pp=2, tp=2, ep=2, etp=1), pp=1, tp=1, ep=1, etp=None),
    "experts_biases": pair(replace(MOE, bias=True, etp=1), tp=2, ep=2, dp=2),
    "experts_buckets": pair(replace(MOE, pp=2, bucket_size=500), ep=2, dp=2),
    "grouped": pair(replace(MOE, grouped=True, shared_ffn=8), tp=2, ep=2, dp=2),
    "grouped_not_gated": pair(replace(MOE, grouped=True, gated=False), pp=2, ep=2, dp=2),
    "dense_first": pair(replace(MOE, dense_first=1, shared_ffn=8), pp=2, ep=2, dp=2),
    "dense_stage": pair(replace(MOE, dense_first=2, ep=2, dp=2), pp=2),
    "latent_without_q": pair(replace(LATENT, q_lora=None), tp=2),
    "latent_experts": pair(replace(LATENT, experts=4, dense_first=1, shared_ffn=8, mtp=1), tp=2, pp=2, ep=2, dp=2),
    "mtp": pair(Case(mtp=1, pp=2, dp=3, hidden=8, ffn=20, vocab=56), pp=4, dp=1),
    "mtp_tied": pair(Case(mtp=2, tied=True, dp=2, hidden=24, ffn=20, vocab=56), pp=2, tp=2, dp=1),
    "te_tied": pair(Case(tree="te", tied=True, bias=True, norm="LayerNorm"), tp=2, pp=2),
    "te_latent_experts": pair(
        replace(LATENT, tree="te", experts=4, grouped=True, dense_first=1, mtp=1), tp=2, pp=2, ep=2, etp=1
    ),
    "legacy": pair(Case(tree="legacy", tied=True, bias=True), tp=2, pp=2),
}
WIDE = {"hidden": 32, "ffn": 16}  # 0.7 to 0.9: a tied bucket begins at a multiple of 128
OLD_PAIRS = {
    "tp_pp": pair(Case(dp=2), tp=2, pp=2),
    "buckets": pair(replace(BUCKETS, tp=2, bias=True), dp=3, tp=1),
    "no_buckets": pair(replace(BUCKETS, pp=1), bucket_size=None, dp=3),
    "vpp": pair(Case(layers=8, pp=2, vpp=2, dp=2, kv_groups=2, qk_layernorm=True), tp=2, pp=4, vpp=1, dp=1),
    "tied": pair(Case(tied=True, dp=2, **WIDE), pp=2, tp=2),
    "legacy": pair(Case(tree="legacy", tied=True, bias=True, **WIDE), pp=2, tp=2, dp=2),
    "legacy_vpp": pair(Case(tree="legacy", tp=2, pp=2, vpp=2, bucket_size=640), tp=1, pp=1, vpp=1, dp=2),
    "ep": pair(MOE, ep=2, dp=2, tp=2),
    "ep4": pair(replace(MOE, ep=2, dp=2), ep=4, dp=4),
    "grouped": pair(replace(MOE, grouped=True), ep=2, dp=2, tp=2),
    "te": pair(Case(tree="te", layers=8), tp=2, pp=4, vpp=2),
}
ACROSS = {
    "dense": Case(layers=8, dp=2),
    "tied": Case(tied=True, **WIDE),
    "legacy": Case(tree="legacy", tied=True, **WIDE),
    "te": Case(tree="te"),
    "experts": replace(MOE, ep=2, dp=2),
    "grouped": replace(MOE, ep=2, dp=2, grouped=True),
}
Layers = dict[tuple[int, int], dict[int, int]]
"""{(pp, chunk): {local layer: layer}}, of chunks with layers."""
ELSEWHERE: dict[str, tuple[Case, dict[str, Any], Layers]] = {
    "noop": (
        Case(layers=6),
        {"pp": 2, "noop_layers": (2, 5)},
        {(0, 0): {0: 0, 1: 1, 3: 2}, (1, 0): {0: 3, 2: 4, 3: 5}},
    ),
    "noop_vpp": (
        Case(layers=6, tp=2, pp=2, dp=2, tied=True, hidden=32),
        {"tp": 1, "pp": 2, "vpp": 2, "noop_layers": (0, 7)},
        {(0, 0): {1: 0}, (1, 0): {0: 1, 1: 2}, (0, 1): {0: 3, 1: 4}, (1, 1): {0: 5}},
    ),
    "noop_chunk": (
        Case(layers=6, experts=4, ep=2, dp=2),
        {"pp": 2, "layers_per_virtual_stage": 2, "noop_layers": (4, 5)},
        {(0, 0): {0: 0, 1: 1}, (1, 0): {0: 2, 1: 3}, (1, 1): {0: 4, 1: 5}},
    ),
    "list": (
        Case(layers=6, mtp=1),
        {"tp": 2, "pp": 3, "num_layer_list": (1, 3, 2)},
        {(0, 0): {0: 0}, (1, 0): {0: 1, 1: 2, 2: 3}, (2, 0): {0: 4, 1: 5}},
    ),
    "dualpipev": (
        Case(layers=4, tied=True),
        {"tp": 2, "pp": 2, "schedule": "dualpipev"},
        {(0, 0): {0: 0}, (0, 1): {0: 3}, (1, 0): {0: 1}, (1, 1): {0: 2}},
    ),
}
"""Layouts of MindSpeed's that megatron-core itself does not build: options, and where the layers lie."""
