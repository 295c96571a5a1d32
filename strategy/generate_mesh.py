"""The mesh, the pipeline, the optimizer shard and the states of a job, from MindFormers' YAML.

Sources: MindFormers 1.9.0 core/parallel_config.py `build_parallel_config`, tools/register/template.py (defaults),
modules/transformer/transformer.py `TransformerOpParallelConfig`, core/optim, wrapper/wrapper.py; MindSpore 2.9.0
parallel/_auto_parallel_context.py.  Pure; may import only strategy.generate_{checks,families,reading,types,values}.
"""

from __future__ import annotations

from collections.abc import Mapping

from strategy.generate_checks import suggestion
from strategy.generate_families import OPTIMIZER_STATES
from strategy.generate_reading import Reading
from strategy.generate_types import OptimizerShard, Parallel
from strategy.generate_values import Values

_PARALLEL_KEYS = (
    "data_parallel model_parallel context_parallel expert_parallel pipeline_stage micro_batch_num seq_split_num "
    "use_seq_parallel optimizer_shard gradient_aggregation_group vocab_emb_dp context_parallel_algo "
    "ulysses_degree_in_cp mem_coeff recompute swap"
).split()
_MODES: Mapping[int, str] = {0: "data_parallel", 1: "semi_auto_parallel", 2: "auto_parallel", 3: "hybrid_parallel"}
_LONG_SEQUENCE = 32768
"""models/glm2/glm2.py SHARDING_SEQ_LEN_THRESHOLD."""
_TRAINING = ("train", "finetune")


def read_parallel(reading: Reading, model: Values) -> Parallel:
    """The mesh; what is wrong is recorded in `reading`."""
    if not reading.values(use_parallel=False).flag("use_parallel"):
        reading.notes.append("use_parallel is False: parallel and parallel_config are ignored, all is on one device")
        return Parallel()
    config = reading.values("parallel_config", vocab_emb_dp=True)
    for key in config.given:
        if key not in _PARALLEL_KEYS:
            reading.problems.add(f"{config.where}: unknown key {key!r}{suggestion(str(key), _PARALLEL_KEYS)}")
    if config.get("optimizer_shard"):
        reading.notes.append("parallel_config.optimizer_shard has no effect: parallel.enable_parallel_optimizer does")
    mode = _mode(reading)
    pp = config.positive("pipeline_stage", 1)
    pipeline = reading.values("parallel", "pipeline_config")
    interleaved = pipeline.flag("pipeline_interleave")
    return Parallel(
        dp=config.positive("data_parallel", 1),
        tp=config.positive("model_parallel", 1),
        cp=config.positive("context_parallel", 1),
        ep=config.positive("expert_parallel", 1),
        pp=pp,
        interleave=model.positive("interleave", 1) if interleaved else 1,
        offset=model.offset("offset"),
        zero_bubble_v=pipeline.get("pipeline_scheduler") == "zero_bubble_v" and pp > 1,
        vocab_emb_dp=config.flag("vocab_emb_dp") and pp == 1 and mode != "auto_parallel",
        embedding_whole=model.flag("flat_norm"),
        embedding_opt=model.flag("embedding_opt"),
        seq_parallel=config.flag("use_seq_parallel"),
        long_sequence=model.number("sequence", 0) >= _LONG_SEQUENCE,
        optimizer=_optimizer_shard(reading),
    )


def _mode(reading: Reading) -> str:
    written = reading.section("parallel").get("parallel_mode", 1)
    mode = str(_MODES.get(written) if isinstance(written, int) else written).lower()
    if mode in {"data_parallel", "hybrid_parallel", "stand_alone"}:
        reading.problems.add(
            f"{reading.where}: parallel.parallel_mode: expected 1 (semi_auto_parallel), found {written!r}, in which "
            "every rank holds whole parameters and no strategy is written"
        )
    if mode == "auto_parallel":
        reading.notes.append("parallel_mode auto_parallel: the compiler may choose other layouts than these rules")
    if mode == "manual_parallel":
        reading.notes.append("parallel_mode MANUAL_PARALLEL: the layouts are those of the training network")
    return mode


def _optimizer_shard(reading: Reading) -> OptimizerShard | None:
    parallel = reading.values("parallel")
    if not parallel.flag("enable_parallel_optimizer") or parallel.flag("optimizer_weight_shard_aggregated_save"):
        return None
    config = reading.values("parallel", "parallel_optimizer_config")
    if config.get("optimizer_level") is not None:
        reading.notes.append("parallel_optimizer_config.optimizer_level is not taken into account")
    size = config.number("optimizer_weight_shard_size", -1, least=-1)
    return OptimizerShard(config.number("parallel_optimizer_threshold", 64), size if size > 1 else -1)


def read_states(reading: Reading, parallel: Parallel) -> tuple[str, ...]:
    """Prefixes of what training adds to every trainable parameter; accumulated gradients only with a pipeline."""
    if reading.document.get("run_mode", "train") not in _TRAINING:
        reading.notes.append("run_mode is not training: no optimizer states, and key and value caches are left out")
        return ()
    optimizer = reading.section("optimizer")
    kind = "FusedAdamW" if optimizer.get("use_fused") else str(optimizer.get("type") or "")
    if kind and kind not in OPTIMIZER_STATES:
        reading.notes.append(f"optimizer {kind}: the names of its states are not known, only weights are listed")
    accumulated = ("accu_grads.",) if parallel.pp > 1 else ()
    return (*accumulated, *OPTIMIZER_STATES.get(kind, ()))
