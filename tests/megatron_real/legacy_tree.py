"""The parameter names of megatron.legacy's GPTModel (Megatron-LM core_r0.6.0), over megatron-core's parallel layers.

That class is in no wheel.  Names, their order and the nesting of its saved dictionary are what a checkpoint shows.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule

from tests.megatron_real.case import Case
from tests.megatron_real.standins import Norm

_PARTS = ("embedding", "encoder", "output_layer")


def _column(settings: Any, rows: int, columns: int, *, bias: bool) -> torch.nn.Module:
    init = settings.init_method
    return ColumnParallelLinear(columns, rows, config=settings, init_method=init, bias=bias, gather_output=False)


def _row(settings: Any, rows: int, columns: int, *, bias: bool) -> torch.nn.Module:
    options = {"input_is_parallel": True, "skip_bias_add": True, "bias": bias}
    return RowParallelLinear(columns, rows, config=settings, init_method=settings.init_method, **options)


def _tree(**children: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.ModuleDict(children)


def _embedding(case: Case, settings: Any) -> torch.nn.Module:
    return VocabParallelEmbedding(case.vocab, case.hidden, init_method=settings.init_method, config=settings)


def _layer(case: Case, settings: Any, number: int) -> torch.nn.Module:
    width = settings.kv_channels * settings.num_attention_heads
    groups = settings.kv_channels * settings.num_query_groups
    qkv = _column(settings, width + 2 * groups, case.hidden, bias=case.bias or case.qkv_bias)
    up = _column(settings, case.ffn * (2 if case.gated else 1), case.hidden, bias=case.bias)
    down = _row(settings, case.hidden, case.ffn, bias=case.bias)
    layer = _tree(
        input_norm=Norm(settings, case.hidden),
        self_attention=_tree(query_key_value=qkv, dense=_row(settings, case.hidden, width, bias=case.bias)),
        post_attention_norm=Norm(settings, case.hidden),
        mlp=_tree(dense_h_to_4h=up, dense_4h_to_h=down),
    )
    layer.layer_number = number  # from 1 and global, as Megatron's own layers say it
    return layer


class LegacyModel(MegatronModule):  # type: ignore[misc]
    """One chunk; layers in equal parts, chunk v of stage p begins at v*(L/vpp) + p*(L/vpp/pp)."""

    def __init__(self, case: Case, settings: Any, stage: int) -> None:
        super().__init__(config=settings)
        pp = parallel_state.get_pipeline_model_parallel_rank()
        self.pre_process, self.post_process = (pp, stage) == (0, 0), (pp, stage) == (case.pp - 1, case.vpp - 1)
        self.share_embeddings_and_output_weights = case.tied
        count = case.layers // (case.pp * case.vpp)
        start = stage * (case.layers // case.vpp) + pp * count
        model: dict[str, torch.nn.Module] = {}
        if self.pre_process:
            model["embedding"] = _tree(word_embeddings=_embedding(case, settings))
        layers = torch.nn.ModuleList([_layer(case, settings, start + i + 1) for i in range(count)])
        model["encoder"] = _tree(layers=layers)
        if self.post_process:
            model["encoder"].add_module("final_norm", Norm(settings, case.hidden))
            if not case.tied:
                model["output_layer"] = _column(settings, case.vocab, case.hidden, bias=False)
        self.language_model = _tree(**model)
        if case.tied and self.post_process and not self.pre_process:
            self.word_embeddings = _embedding(case, settings)
        if case.tied and self.pre_process != self.post_process:
            self._head().weight.shared_embedding = True

    def _head(self) -> Any:
        return self.language_model["embedding"]["word_embeddings"] if self.pre_process else self.word_embeddings

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """As Megatron asks for it when embeddings are tied."""
        weight: torch.Tensor = self._head().weight
        return weight

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:  # noqa: FBT001, FBT002
        """Nested by part, flat below."""
        parts = {name: self.language_model[name] for name in _PARTS if name in self.language_model}
        state: dict[str, Any] = {name: part.state_dict(keep_vars=keep_vars) for name, part in parts.items()}
        if "embedding" in state:
            state["embedding"] = {"word_embeddings": parts["embedding"]["word_embeddings"].state_dict()}
        nested: dict[str, Any] = {"language_model": state}
        if hasattr(self, "word_embeddings"):
            nested["word_embeddings_for_head"] = self.word_embeddings.state_dict()
        return nested

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:  # noqa: FBT001, FBT002
        """The same nesting; KeyError for a part that is missing or too many."""
        own = self.state_dict_for_save_checkpoint()
        for given, wanted in ((state_dict, own), (state_dict["language_model"], own["language_model"])):
            if set(given) != set(wanted):
                raise KeyError(f"has {sorted(given)}, needs {sorted(wanted)}")
        for name, part in state_dict["language_model"].items():
            if name == "embedding":
                self.language_model[name]["word_embeddings"].load_state_dict(part["word_embeddings"], strict=strict)
            else:
                self.language_model[name].load_state_dict(part, strict=strict)
        if hasattr(self, "word_embeddings"):
            self.word_embeddings.load_state_dict(state_dict["word_embeddings_for_head"], strict=strict)
