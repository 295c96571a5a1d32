"""Draws a model and two layouts of it that megatron-core should be able to build."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from tests.megatron_real.case import Case


def drawn_pair(random: Random, version: str, most_ranks: int) -> tuple[Case, Case]:
    """The same model in two layouts of that many processes at most."""
    model = _model(random, version)
    return _layout(random, model, most_ranks), _layout(random, model, most_ranks)


def _model(random: Random, version: str) -> Case:
    """Sizes that are no multiples of each other, so that every padding shows."""
    flag = random.choice
    tree = random.choices(("mcore", "te", "legacy"), (5, 3, 1))[0]
    model = Case(
        version=version,
        tree=tree,
        layers=flag((4, 8)),
        hidden=flag((8, 16, 24)),
        ffn=flag((4, 12, 20)),
        vocab=flag((40, 56)),
        kv_groups=flag((None, 2)),
        gated=flag((True, True, False)),
        bias=flag((True, False)),
        qkv_bias=flag((True, False)),
        norm=flag(("RMSNorm", "LayerNorm")),
        tied=flag((True, False)),
    )
    if tree == "legacy":
        return model
    model = replace(model, qk_layernorm=tree == "mcore" and flag((True, False)))
    if flag((True, False)):
        model = replace(
            model,
            bias=False,
            experts=4,
            shared_ffn=flag((None, 8)),
            grouped=tree == "te" or flag((True, False)),
        )
    if version != "0.16.1":
        return model
    if model.experts:
        model = replace(model, dense_first=flag((0, 1)))
    if flag((True, False, False)):
        model = replace(model, mla=True, qk_layernorm=True, kv_groups=None, qkv_bias=False, q_lora=flag((None, 8)))
    return replace(
        model, mtp=flag((0, 0, 1)), learned_softmax=tree == "mcore" and not model.mla and flag((True, False))
    )


def _layout(random: Random, model: Case, most_ranks: int) -> Case:
    while True:
        pp = random.choice((1, 2, 2, 4))
        expert = random.choice((1, 2, 4)) if model.experts else 1
        case = replace(
            model,
            tp=random.choice((1, 2, 4)),
            pp=pp,
            vpp=random.choice((1, 2)) if pp > 1 else 1,
            ep=expert,
            dp=random.choice((1, 2, 3, 4)),
            cp=1 if model.learned_softmax else random.choice((1, 1, 1, 2)),
            bucket_size=random.choice((None, 300, 900)),
        )
        if model.experts and case.version == "0.16.1":
            case = replace(case, etp=random.choice((None, 1)))
        if random.randrange(4) == 0 and pp == 2 and case.vpp == 1 and case.tree != "legacy":
            case = replace(case, first_stage_layers=random.choice((1, 3)))
        if case.world <= most_ranks and _fits(case):
            return case


def _fits(case: Case) -> bool:
    """Layers and experts divide, and every TP rank's weights are saved: Megatron's first expert ranks save them."""
    block, expert_ranks = case.tp * case.cp * case.dp, case.ep * case.expert_tp
    return case.layers % (case.pp * case.vpp) == 0 and block % expert_ranks == 0 and expert_ranks % case.tp == 0
