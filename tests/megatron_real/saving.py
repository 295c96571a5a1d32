"""model_optim_rng.pt as Megatron-LM writes it (megatron/training/checkpointing.py, core_r0.6.0 to 0.16)."""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

import numpy as np
import torch
from megatron.core.enums import ModelType

from tests.megatron_real import logical
from tests.megatron_real.case import ITERATION, Case
from tests.megatron_real.session import Session

_GLOBAL_BATCH = 8


def model_file(session: Session) -> dict[str, Any]:
    """The dictionary this rank saves."""
    case = session.case
    state: dict[str, Any] = {
        "args": arguments(case),
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "num_floating_point_operations_so_far": 123456.0,
    }
    for number, chunk in enumerate(session.chunks):
        state["model" if case.vpp == 1 else f"model{number}"] = chunk.state_dict_for_save_checkpoint()
    state["optimizer"] = session.optimizer.state_dict()
    state["opt_param_scheduler"] = _scheduler()
    state["rng_state"] = [_rng()]
    return state


def _scheduler() -> dict[str, Any]:
    return {
        "max_lr": logical.LR,
        "lr_warmup_steps": 0,
        "num_steps": ITERATION * _GLOBAL_BATCH,
        "lr_decay_style": "cosine",
        "lr_decay_steps": 10 * _GLOBAL_BATCH,
        "min_lr": logical.MIN_LR,
        "start_wd": logical.WEIGHT_DECAY,
        "end_wd": logical.WEIGHT_DECAY,
        "wd_incr_style": "constant",
        "wd_incr_steps": 10 * _GLOBAL_BATCH,
    }


def _rng() -> dict[str, Any]:
    """The "cuda" states are the CPU's: of the same type."""
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),  # noqa: NPY002 - what Megatron-LM saves
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }


def arguments(case: Case) -> Namespace:
    """The options a converter may look at, and some of other types."""
    virtual = case.vpp > 1
    return Namespace(
        num_layers=case.layers,
        hidden_size=case.hidden,
        ffn_hidden_size=case.ffn,
        num_attention_heads=case.heads,
        num_query_groups=case.kv_groups or case.heads,
        group_query_attention=case.kv_groups is not None,
        kv_channels=case.hidden // case.heads,
        qk_layernorm=case.qk_layernorm,
        padded_vocab_size=case.vocab,
        make_vocab_size_divisible_by=1,
        seq_length=8,
        max_position_embeddings=8,
        position_embedding_type="rope",
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp if virtual else None,
        num_layers_per_virtual_pipeline_stage=case.layers // case.pp // case.vpp if virtual else None,
        decoder_first_pipeline_num_layers=case.first_stage_layers,
        decoder_last_pipeline_num_layers=case.last_stage_layers,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.expert_tp,
        data_parallel_size=case.dp,
        world_size=case.world,
        rank=torch.distributed.get_rank(),
        sequence_parallel=bool(case.experts) and case.tp > 1,
        untie_embeddings_and_output_weights=not case.tied,
        swiglu=case.gated,
        add_bias_linear=case.bias,
        add_qkv_bias=case.qkv_bias,
        normalization=case.norm,
        num_experts=case.experts,
        moe_grouped_gemm=case.grouped,
        moe_use_legacy_grouped_gemm=case.grouped,
        moe_shared_expert_intermediate_size=case.shared_ffn,
        moe_ffn_hidden_size=case.ffn if case.experts else None,
        multi_latent_attention=case.mla,
        mtp_num_layers=case.mtp or None,
        use_mcore_models=case.tree == "mcore",
        transformer_impl="local",
        bf16=True,
        fp16=False,
        params_dtype=torch.bfloat16,
        model_type=ModelType.encoder_or_decoder,
        accumulate_allreduce_grads_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=case.bucket_size is not None,
        overlap_param_gather=False,
        ddp_bucket_size=case.bucket_size,
        optimizer="adam",
        lr=logical.LR,
        min_lr=logical.MIN_LR,
        weight_decay=logical.WEIGHT_DECAY,
        adam_beta1=logical.BETAS[0],
        adam_beta2=logical.BETAS[1],
        adam_eps=logical.EPS,
        clip_grad=0.0,
        micro_batch_size=1,
        global_batch_size=_GLOBAL_BATCH,
        train_iters=10,
        iteration=ITERATION,
        consumed_train_samples=ITERATION * _GLOBAL_BATCH,
        consumed_valid_samples=0,
        data_parallel_random_init=False,
        tokenizer_type="NullTokenizer",
        eval_micro_batch_size=None,
        data_path=["corpus"],
    )
