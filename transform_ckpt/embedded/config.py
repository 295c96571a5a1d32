"""What the embedded CPU run takes from MindFormers' YAML; what it cannot honour is refused by name.

Sizes and mesh are read by strategy.generate_config, so that network and strategies agree.  Sources of the other keys
and their defaults: MindFormers 1.9.0 models/llama/llama_config.py, core/callback/callback.py `CheckpointMonitor`,
core/lr/lr_schedule.py, core/optim/adamw.py, wrapper/wrapper.py `MFTrainOneStepCell`.  `runner_config.max_steps` is our
own: it bounds a run whatever `epochs` says.  `seed` is also that of the initial weights.
May import only strategy.generate_*, transform_ckpt.errors and transform_ckpt.embedded.schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from strategy.generate_config import parse_config
from strategy.generate_reading import Reading
from strategy.generate_types import LegacyModel, ModelParallelConfig
from strategy.generate_values import Values
from transform_ckpt.embedded.schedule import SCHEDULES, Schedule
from transform_ckpt.errors import InputError

_BIAS_CORRECTION: Mapping[str, bool] = {"AdamW": True, "AdamWeightDecay": False}
"""optimizer.type -> whether the moments are corrected (MindSpore's AdamWeightDecay does not)."""

_FORMATS = ("ckpt", "safetensors")


@dataclass(frozen=True, slots=True)
class Optimizer:
    """`optimizer` and `lr_schedule`; `clip_norm` None = gradients are not clipped."""

    schedule: Schedule = field(default_factory=Schedule)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    bias_correction: bool = True
    clip_norm: float | None = None


@dataclass(frozen=True, slots=True)
class Saving:
    """`callbacks`: CheckpointMonitor.  `keep` 0 = all."""

    prefix: str = "CKP"
    every: int = 1
    keep: int = 5
    format: str = "ckpt"


@dataclass(frozen=True, slots=True)
class EmbeddedConfig:
    """A job on the CPU.  `job` is what its strategy is generated from; `batch_size` is that of one data-parallel rank.

    `dataset` None is a stream of tokens drawn from `seed`; `saving` None saves nothing; `max_steps` None means that
    `epochs` decides alone.  `eos` None: decoding stops at its length only.
    """

    job: ModelParallelConfig
    model: LegacyModel
    theta: float = 10000.0
    norm_eps: float = 1e-5
    seq_length: int = 2048
    eos: int | None = None
    batch_size: int = 1
    epochs: int = 1
    max_steps: int | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    saving: Saving | None = None
    seed: int = 0
    dataset: str | None = None
    eval_dataset: str | None = None
    tokenizer: str | None = None

    @property
    def where(self) -> str:
        """The configuration's name in messages."""
        return self.job.origin

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.job.parallel.dp

    @property
    def mp(self) -> int:
        """Model-parallel size."""
        return self.job.parallel.tp

    @property
    def vocab_emb_dp(self) -> bool:
        """Whether embedding and output layer are whole on every rank."""
        return self.job.parallel.vocab_emb_dp

    @property
    def global_batch_size(self) -> int:
        """Samples in a step, of all ranks."""
        return self.batch_size * self.dp


def read_embedded(document: Mapping[str, Any], where: str) -> EmbeddedConfig:
    """InputError with everything that is missing, wrong, or not there on the CPU."""
    job = parse_config(document, None, where)
    if not isinstance(job.model, LegacyModel):
        raise InputError(
            f"{where}: the embedded CPU run has MindFormers' legacy LlamaForCausalLM only (use_legacy: True and "
            "model.arch.type: LlamaForCausalLM); strategies of this model are made all the same"
        )
    reading = Reading(where, document)
    path = ("model", "model_config") if reading.section("model", "model_config") else ("model_config",)
    network = reading.values(*path)
    runner = reading.values("runner_config")
    _refuse(reading, job, job.model, network, runner)
    batch = "batch_size" if runner.get("batch_size") is not None else "micro_batch_size"
    config = EmbeddedConfig(
        job=job,
        model=job.model,
        theta=_real(network, _first(network, "theta", "rope_theta", "rotary_base"), 10000.0),
        norm_eps=_real(network, "rms_norm_eps", 1e-5),
        seq_length=network.positive("seq_length", 2048),
        eos=network.number("eos_token_id") if isinstance(network.get("eos_token_id"), int) else None,
        batch_size=runner.positive(batch, 1),
        epochs=runner.positive("epochs", 1),
        max_steps=runner.positive("max_steps") if runner.get("max_steps") is not None else None,
        optimizer=_optimizer(reading),
        saving=_saving(reading),
        seed=reading.values().number("seed", 0),
        dataset=_dataset(reading, "train_dataset"),
        eval_dataset=_dataset(reading, "eval_dataset"),
        tokenizer=_tokenizer(reading),
    )
    reading.problems.raise_if_any(InputError)
    return config


def _refuse(reading: Reading, job: ModelParallelConfig, model: LegacyModel, network: Values, runner: Values) -> None:
    parallel = job.parallel
    refused = {
        "parallel_config.pipeline_stage": parallel.pp > 1,
        "parallel_config.context_parallel": parallel.cp > 1,
        "parallel_config.expert_parallel": parallel.ep > 1,
        "model_config.qkv_concat": model.qkv_concat,
        "model_config.qkv_has_bias": model.qkv_bias,
        "model_config.attn_proj_has_bias": model.proj_bias,
        "model_config.extend_method": str(network.get("extend_method")) != "None",
        "runner_config.gradient_accumulation_steps": runner.positive("gradient_accumulation_steps", 1) > 1,
    }
    for key, found in refused.items():
        if found:
            reading.problems.add(
                f"{reading.where}: {key}: the embedded CPU run has data_parallel, model_parallel and the optimizer "
                "shard of a plain Llama only; strategies of this configuration are made all the same"
            )


def _first(values: Values, *keys: str) -> str:
    """The first of several names of one thing that is given."""
    return next((key for key in keys if values.get(key) is not None), keys[0])


def _real(values: Values, key: str, default: float, *, least: float = 0.0, most: float = float("inf")) -> float:
    """A number; text that is one counts (YAML 1.1 reads 1e-3 as text)."""
    value = values.get(key)
    if value is None:
        return default
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or not least <= number <= most or number == float("inf"):
        values.problem(key, f"a number of at least {least:g}" + f", at most {most:g}" * (most < float("inf")), value)
        return default
    return number


def _optimizer(reading: Reading) -> Optimizer:
    values = reading.values("optimizer")
    kind = values.get("type") or "AdamW"
    if kind not in _BIAS_CORRECTION or values.get("use_fused"):
        values.problem("type", f"one of {', '.join(_BIAS_CORRECTION)}, without use_fused", kind)
    betas = values.get("betas")
    if betas is not None and not (isinstance(betas, list | tuple) and len(betas) == 2):
        values.problem("betas", "two numbers below 1", betas)
        betas = None
    first, second = betas or (0.9, 0.999)
    parts = Values(values.where, {"betas[0]": first, "betas[1]": second}, {}, values.problems)
    wrapper = reading.values("runner_wrapper")
    return Optimizer(
        schedule=_schedule(reading, _real(values, "learning_rate", 1e-3)),
        betas=(_real(parts, "betas[0]", 0.9, most=0.999999), _real(parts, "betas[1]", 0.999, most=0.999999)),
        eps=_real(values, "eps", 1e-8),
        weight_decay=_real(values, "weight_decay", 0.0),
        bias_correction=_BIAS_CORRECTION.get(str(kind), True),
        clip_norm=_real(wrapper, "max_grad_norm", 1.0) if wrapper.flag("use_clip_grad") else None,
    )


def _schedule(reading: Reading, plain_rate: float) -> Schedule:
    """Without lr_schedule the rate is optimizer.learning_rate."""
    values = reading.values("lr_schedule")
    if not values.given:
        return Schedule(learning_rate=plain_rate)
    kind = values.get("type")
    if kind not in SCHEDULES:
        values.problem("type", f"one of {', '.join(SCHEDULES)}", kind)
    known = {"type", *(part.name for part in fields(Schedule))} - {"kind"}
    for key in values.given:
        if key not in known:
            reading.problems.add(f"{values.where}: unknown key {key!r}; known are {', '.join(sorted(known))}")
    total = values.get("total_steps")
    return Schedule(
        kind=str(kind),
        learning_rate=_real(values, "learning_rate", plain_rate),
        warmup_steps=values.number("warmup_steps", 0),
        warmup_ratio=None if values.get("warmup_ratio") is None else _real(values, "warmup_ratio", 0.0, most=1.0),
        warmup_lr_init=_real(values, "warmup_lr_init", 0.0),
        lr_end=_real(values, "lr_end", 0.0),
        num_cycles=_real(values, "num_cycles", 0.5),
        total_steps=None if total in (None, -1) else values.positive("total_steps"),
    )


def _saving(reading: Reading) -> Saving | None:
    """Of several CheckpointMonitors the first; None without one, as MindFormers then saves nothing."""
    callbacks = reading.document.get("callbacks") or []
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    given = next((c for c in listed if isinstance(c, dict) and c.get("type") == "CheckpointMonitor"), None)
    if given is None:
        return None
    values = Values(f"{reading.where}: callbacks: CheckpointMonitor", given, {}, reading.problems)
    prefix = str(values.get("prefix") or "CKP")
    if "/" in prefix:
        values.problem("prefix", "a name without '/'", prefix)
    kind = values.get("checkpoint_format") or "ckpt"
    if kind not in _FORMATS:
        values.problem("checkpoint_format", f"one of {', '.join(_FORMATS)}", kind)
    every = values.positive("save_checkpoint_steps", 1)
    return Saving(prefix, every, values.number("keep_checkpoint_max", 5), str(kind))


def _dataset(reading: Reading, section: str) -> str | None:
    path = reading.section(section, "data_loader").get("dataset_dir")
    return str(path) if path else None


def _tokenizer(reading: Reading) -> str | None:
    """The directory of a Hugging Face tokenizer, or a file in it."""
    values = reading.values("processor", "tokenizer")
    key = _first(values, "pretrained_model_dir", "tokenizer_file", "vocab_file")
    return str(values.get(key)) if values.get(key) else None
