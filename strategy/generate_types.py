"""What a generated strategy depends on: the mesh, the pipeline, the optimizer shard, and a model's sizes.

Values only, checked where they are read (generate_config, generate_text), so that the rules take them as they are.
May import only transform_ckpt.views.
"""

from __future__ import annotations

from dataclasses import dataclass

from transform_ckpt.views import Shape

Offset = int | tuple[int, ...] | tuple[tuple[int, ...], ...]
"""Layers that a stage has more than the average: one for all, one a stage, or a row of stages for each interleave."""

Naming = str
"""Key of `generate_rules.NAMINGS`."""


@dataclass(frozen=True, slots=True)
class OptimizerShard:
    """`parallel_optimizer_config`: parameters of `threshold_kb` KB and more are cut into at most `size` parts."""

    threshold_kb: int = 64
    size: int = -1
    """-1: as many parts as there are replicas."""


@dataclass(frozen=True, slots=True)
class Parallel:
    """`parallel_config`, and what of `parallel` and the model's config decides where a parameter lies."""

    dp: int = 1
    tp: int = 1
    cp: int = 1
    ep: int = 1
    pp: int = 1
    interleave: int = 1
    offset: Offset = 0
    zero_bubble_v: bool = False
    vocab_emb_dp: bool = True
    embedding_whole: bool = False
    """Legacy `rmsnorm_compute_2d`: the embedding is never cut."""
    embedding_opt: bool = False
    """Legacy `parallel_optimizer` of the model's config: the embedding takes part in the optimizer shard."""
    seq_parallel: bool = False
    long_sequence: bool = False
    """Both matter to the output layer of the legacy GLM only."""
    optimizer: OptimizerShard | None = None

    @property
    def devices(self) -> int:
        """Devices of one stage."""
        return self.dp * self.cp * self.tp

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.devices * self.pp


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the whole model; `dtype` is a code of transform_ckpt.dtypes."""

    name: str
    shape: Shape
    dtype: str


@dataclass(frozen=True, slots=True)
class LegacyModel:
    """Sizes of MindFormers' legacy LlamaForCausalLM, which Llama and Qwen2 use."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    qkv_concat: bool = False
    qkv_bias: bool = False
    proj_bias: bool = False
    tied: bool = False
    dtype: str = "F16"
    norm_dtype: str = "F32"
    embedding_dtype: str = "F16"


@dataclass(frozen=True, slots=True)
class GlmModel:
    """Sizes of MindFormers' legacy ChatGLM2ForConditionalGeneration (GLM2 to GLM4), with qkv_concat."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int
    mlp_concat: bool = True
    qkv_bias: bool = True
    linear_bias: bool = False
    norms: tuple[str, ...] = ()
    """Norms beside input_layernorm and post_attention_layernorm."""
    tied: bool = False
    dtype: str = "F16"
    norm_dtype: str = "F32"


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-latent attention; `concat` is mla_qkv_concat, which names and fuses the projections differently."""

    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int
    concat: bool = True


@dataclass(frozen=True, slots=True)
class Moe:
    """Mixture of experts; `pattern[i]` says whether layer i has experts."""

    experts: int
    ffn: int
    pattern: tuple[bool, ...]
    shared_ffn: int | None = None
    shared_gate: bool = False
    expert_bias: bool = False
    batch_loss: bool = False
    """gbs_aux_loss, the one loss whose graph uses router.fi_accu."""
    router_dtype: str = "F32"


@dataclass(frozen=True, slots=True)
class McoreModel:
    """Sizes of MindFormers' parallel_core GPTModel."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int = 0
    """Rows of learned position embeddings; 0 = none."""
    tied: bool = False
    gated: bool = True
    norm: str = "RMSNorm"
    sandwich_norm: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    linear_bias: bool = False
    track_logits: bool = False
    mla: Mla | None = None
    moe: Moe | None = None
    mtp: int = 0
    dtype: str = "F32"


Model = LegacyModel | GlmModel | McoreModel


@dataclass(frozen=True, slots=True)
class ModelParallelConfig:
    """A whole job: what `generate` needs.  `states` are prefixes of optimizer states, `origin` names the file."""

    model: Model
    parallel: Parallel
    states: tuple[str, ...] = ()
    only_trainable: bool = True
    origin: str = "configuration"
    notes: tuple[str, ...] = ()
