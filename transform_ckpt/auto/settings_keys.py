"""The keys that a job's YAML may have, section by section.  Tables only; imports nothing.

Sources, all MindFormers 1.9.0 unless said otherwise: TEMPLATE = tools/register/template.py (the classes of
`CONFIG_NAME_TO_CLASS`); YAML = the configuration files that the wheel brings (configs/); CODE = what trainer/,
core/ and utils/ read of the configuration; CONTEXT = MindSpore 2.9.0 parallel/_auto_parallel_context.py,
`_set_auto_parallel_context_func_map`, and the `_ParallelOptimizerConfig` and `_PipelineConfig` beside it; OURS = keys
of this project, which MindFormers leaves alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OURS = "transform_in_memory load_strict keep transform_timeout rank_id world_size".split()

_TEMPLATE_GENERAL = (
    "seed output_dir run_mode use_parallel resume_training print_separate_loss load_checkpoint load_ckpt_format "
    "auto_trans_ckpt transform_process_num src_strategy_path_or_dir only_save_strategy load_ckpt_async use_legacy "
    "use_legacy_format pretrained_model_dir balanced_load reshard_worker_num do_eval eval_step_interval "
    "eval_epoch_interval ignore_data_skip data_skip_steps profile profile_communication profile_memory "
    "init_start_profile profile_start_step profile_stop_step profile_rank_ids profile_pipeline profile_level mstx "
    "layer_scale layer_decay lr_scale lr_scale_factor micro_batch_interleave_num remote_save_url save_file input_data "
    "predict_batch_size adapter_id exclude_cann_cpu train_precision_sync infer_precision_sync postprocess_use_numpy"
).split()
_TEMPLATE_SECTIONS = (
    "runner_config context parallel trainer model moe_config parallel_config recompute_config swap_config "
    "runner_wrapper optimizer lr_schedule metric train_dataset train_dataset_task callbacks monitor_config processor "
    "eval_dataset eval_dataset_task eval_callbacks"
).split()
_YAML_TOP = "auto_tune autotune_per_step filepath_prefix generation_config grouped_lr_schedule profiler_level".split()
_CODE_TOP = (
    "base_config checkpoint transform_by_rank npu_num_per_node remove_redundancy tensorboard trust_remote_code "
    "use_checkpoint_health_monitor resume_by_last_timestamp_ckpt check_for_nan_in_loss_and_grad "
    "calculate_per_token_loss use_graceful_exit affinity_cpu_list affinity_config monitor_local_loss "
    "monitor_device_local_loss mindio_pool_capacity data_size data_simplification profile_output profile_cb with_stack "
    "local_rank device_num hub_model_id hub_token hub_private_repo push_to_hub predict_dataset save_checkpoint "
    "cloud_config model_config infer_config"
).split()

_TEMPLATE_PARALLEL = (
    "parallel_mode full_batch search_mode enable_parallel_optimizer gradients_mean enable_alltoall "
    "strategy_ckpt_save_file"
).split()
_CONTEXT_PARALLEL = (
    "device_num global_rank gradient_fp32_sync loss_repeated_mean pipeline_stages auto_pipeline "
    "pipeline_result_broadcast pipeline_segments auto_parallel_search_mode parameter_broadcast strategy_ckpt_load_file "
    "group_ckpt_save_file dataset_strategy force_fp32_communication parallel_optimizer_config pipeline_config "
    "grad_accumulation_step all_reduce_fusion_config communi_parallel_mode optimizer_weight_shard_size "
    "optimizer_weight_shard_aggregated_save sharding_propagation strategy_ckpt_config comm_fusion dump_local_norm "
    "dump_local_norm_path dump_device_local_norm auto_parallel_new_interface init_param_in_compile"
).split()
_TEMPLATE_PARALLEL_CONFIG = (
    "data_parallel model_parallel context_parallel expert_parallel pipeline_stage micro_batch_num seq_split_num "
    "use_seq_parallel optimizer_shard gradient_aggregation_group vocab_emb_dp context_parallel_algo "
    "ulysses_degree_in_cp mem_coeff"
).split()
_CODE_PARALLEL_CONFIG = "recompute swap".split()  # core/parallel_config.py puts those sections in here
_TEMPLATE_RECOMPUTE = (
    "recompute select_recompute parallel_optimizer_comm_recompute select_comm_recompute mp_comm_recompute "
    "recompute_slice_activation select_recompute_exclude select_comm_recompute_exclude"
).split()
_CODE_CHECKPOINT = (
    "load_path load_balanced no_load_optim reshard_worker_num save_max save_interleaved_steps no_save_optim "
    "save_remove_redundancy async_save save_path prefix"
).split()  # trainer/utils.py convert_checkpoint_config


@dataclass(frozen=True, slots=True)
class Section:
    """The keys of one section."""

    keys: tuple[str, ...]
    strict: bool = False
    """Whether MindFormers raises for any other key (template.py `_raise_error_for_unexpected_key`)."""


TOP = Section((*_TEMPLATE_GENERAL, *_TEMPLATE_SECTIONS, *_YAML_TOP, *_CODE_TOP, *OURS))

SECTIONS: Mapping[tuple[str, ...], Section] = {
    (): TOP,
    ("parallel",): Section((*_TEMPLATE_PARALLEL, *_CONTEXT_PARALLEL)),
    ("parallel_config",): Section((*_TEMPLATE_PARALLEL_CONFIG, *_CODE_PARALLEL_CONFIG), strict=True),
    ("parallel", "parallel_optimizer_config"): Section(
        (
            "gradient_accumulation_shard",
            "parallel_optimizer_threshold",
            "optimizer_weight_shard_size",
            "optimizer_level",
        )
    ),
    ("parallel", "strategy_ckpt_config"): Section(("save_file", "load_file", "only_trainable_params")),
    ("parallel", "pipeline_config"): Section(("pipeline_interleave", "pipeline_scheduler")),
    ("recompute_config",): Section(tuple(_TEMPLATE_RECOMPUTE)),
    ("checkpoint",): Section(tuple(_CODE_CHECKPOINT)),
}
"""Path of a section -> its keys.  Sections that are not listed (model, train_dataset ...) are MindFormers' alone."""
