"""MindFormers' legacy LlamaForCausalLM on the CPU: its names and sums, in float32, on the slices of one rank.

Same function as Hugging Face's LlamaForCausalLM under plain renaming: rotary positions turn halves of a head, not
neighbours (MindFormers 1.9.0 modules/layers.py, models/llama/).  Model parallelism is a column-cut then a row-cut
product for attention and feed-forward, each with one sum forward and one backward.
"""

# ruff: noqa: D102 - construct and bprop do what their class says

from __future__ import annotations

from collections.abc import Callable, Mapping

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from transform_ckpt.embedded.collectives import Array, Cell, Enter, Leave, Ranks, Whole
from transform_ckpt.embedded.config import EmbeddedConfig
from transform_ckpt.embedded.layout import Slice

_MASKED = float(np.finfo(np.float32).min)


class Weights:
    """Makes parameters by full name, with what is needed to compute with them."""

    def __init__(self, slices: Mapping[str, Slice], ranks: Ranks, initial: Callable[[Slice], Array]) -> None:
        self.slices = slices
        self.ranks = ranks
        self.initial = initial

    def parameter(self, name: str) -> Parameter:
        """What a rank stores; the cell that it becomes an attribute of completes its name."""
        return Parameter(Tensor(self.initial(self.slices[name])), name=name.rpartition(".")[2])

    def whole(self, name: str) -> Callable[[Tensor], Tensor]:
        """From what a rank stores of a parameter to what it computes with."""
        found = self.slices[name]
        if found.parts == 1:
            return _same
        cut_by_mp = found.replicas == self.ranks.dp.size and self.ranks.mp.size > 1
        group = self.ranks.dp if cut_by_mp else self.ranks.world
        return Whole(group, found.parts, group.size // self.ranks.dp.size)


def _same(value: Tensor) -> Tensor:
    return value


class Matrix(Cell):
    """A linear layer without bias: [tokens, columns] x [rows, columns]."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.weight = weights.parameter(f"{name}.weight")
        self.whole = weights.whole(f"{name}.weight")
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, value: Tensor) -> Tensor:
        return self.product(value, self.whole(self.weight))


class Norm(Cell):
    """Root mean square norm."""

    def __init__(self, weights: Weights, name: str, eps: float) -> None:
        super().__init__()
        self.weight = weights.parameter(f"{name}.weight")
        self.eps = eps

    def construct(self, value: Tensor) -> Tensor:
        square = ops.mean(value * value, -1, True)
        return value * ops.rsqrt(square + self.eps) * self.weight


class Attention(Cell):
    """Heads of one rank; queries of a group share its key and value without copying them."""

    def __init__(self, weights: Weights, name: str, config: EmbeddedConfig) -> None:
        super().__init__()
        model = config.model
        self.size = model.hidden // model.heads
        self.groups = model.kv_heads // config.mp
        self.shared = model.heads // model.kv_heads
        self.wq = Matrix(weights, f"{name}.wq")
        self.wk = Matrix(weights, f"{name}.wk")
        self.wv = Matrix(weights, f"{name}.wv")
        self.wo = Matrix(weights, f"{name}.wo")
        self.enter, self.leave = Enter(weights.ranks.mp), Leave(weights.ranks.mp)
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.product = ops.BatchMatMul()

    def construct(self, value: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        batch, length, hidden = value.shape
        rows = self.enter(value).reshape((batch * length, hidden))
        query = _turned(self._heads(self.wq(rows), batch, length), turn)
        key = _turned(self._heads(self.wk(rows), batch, length), turn)
        values = self._heads(self.wv(rows), batch, length)
        query = query.reshape((batch, self.groups, self.shared * length, self.size))
        scores = self.scores(query, key) * self.size**-0.5
        scores = scores.reshape((batch, self.groups, self.shared, length, length)) + mask
        chances = ops.softmax(scores, -1).reshape((batch, self.groups, self.shared * length, length))
        mixed = self.product(chances, values).reshape((batch, self.groups * self.shared, length, self.size))
        mixed = mixed.transpose((0, 2, 1, 3)).reshape((batch * length, self.groups * self.shared * self.size))
        return self.leave(self.wo(mixed)).reshape((batch, length, hidden))

    def _heads(self, rows: Tensor, batch: int, length: int) -> Tensor:
        return rows.reshape((batch, length, -1, self.size)).transpose((0, 2, 1, 3))


def _turned(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions: the second half of a head is the imaginary part of the first."""
    cosine, sine = turn
    half = heads.shape[-1] // 2
    swapped = ops.concat((-heads[..., half:], heads[..., :half]), -1)
    return heads * cosine + swapped * sine


class FeedForward(Cell):
    """SwiGLU: w1 is the gate, w3 goes up, w2 comes down."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.w1 = Matrix(weights, f"{name}.w1")
        self.w2 = Matrix(weights, f"{name}.w2")
        self.w3 = Matrix(weights, f"{name}.w3")
        self.enter, self.leave = Enter(weights.ranks.mp), Leave(weights.ranks.mp)

    def construct(self, value: Tensor) -> Tensor:
        rows = self.enter(value).reshape((-1, value.shape[-1]))
        gate = self.w1(rows)
        return self.leave(self.w2(gate * ops.sigmoid(gate) * self.w3(rows))).reshape(value.shape)


class Layer(Cell):
    """One decoder layer."""

    def __init__(self, weights: Weights, name: str, config: EmbeddedConfig) -> None:
        super().__init__()
        self.attention_norm = Norm(weights, f"{name}.attention_norm", config.norm_eps)
        self.attention = Attention(weights, f"{name}.attention", config)
        self.ffn_norm = Norm(weights, f"{name}.ffn_norm", config.norm_eps)
        self.feed_forward = FeedForward(weights, f"{name}.feed_forward")

    def construct(self, value: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        value = value + self.attention(self.attention_norm(value), turn, mask)
        return value + self.feed_forward(self.ffn_norm(value))


class Embedding(Cell):
    """Rows of the vocabulary; a token of another rank's rows adds nothing here."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        found = weights.slices[f"{name}.embedding_weight"]
        self.embedding_weight = weights.parameter(found.name)
        self.whole = weights.whole(found.name)
        self.rows = Rows(found, weights.ranks)

    def construct(self, ids: Tensor, weight: Tensor) -> Tensor:
        local, here = self.rows.local(ids)
        vectors = ops.gather(weight, local, 0)
        return self.rows.leave(vectors * here.expand_dims(-1)) if self.rows.cut else vectors


class Rows:
    """Which rows of the vocabulary a rank computes with."""

    def __init__(self, found: Slice, ranks: Ranks) -> None:
        self.count = found.used[0]
        self.cut = self.count < found.full[0]
        self.first = ranks.mp_index * self.count if self.cut else 0
        self.ranks = ranks
        self.leave = Leave(ranks.mp) if self.cut else _same
        self.enter = Enter(ranks.mp) if self.cut else _same

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(row numbers within this rank's rows, 1.0 where the token is one of them)."""
        local = ids - self.first
        here = ops.logical_and(local >= 0, local < self.count)
        return local * here.astype(mindspore.int32), here.astype(mindspore.float32)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over [tokens, rows]; the largest logit of all ranks is taken off first, without a gradient."""
        logits = logits - self._largest(ops.stop_gradient(logits)).expand_dims(-1)
        local, here = self.local(labels)
        wanted = ops.gather_elements(logits, 1, local.expand_dims(-1)).squeeze(-1) * here
        total = ops.exp(logits).sum(-1)
        total, wanted = self.leave(ops.stack((total, wanted)))
        return (ops.log(total) - wanted).mean()

    def _largest(self, logits: Tensor) -> Tensor:
        largest = ops.amax(logits, -1)
        return ops.amax(self.ranks.mp.gather(largest), 0) if self.cut else largest


class Model(Cell):
    """Everything but the output layer."""

    def __init__(self, weights: Weights, config: EmbeddedConfig) -> None:
        super().__init__()
        self.tok_embeddings = Embedding(weights, "model.tok_embeddings")
        layers = range(config.model.layers)
        self.layers = nn.CellList([Layer(weights, f"model.layers.{number}", config) for number in layers])
        self.norm_out = Norm(weights, "model.norm_out", config.norm_eps)
        self.theta = config.theta
        self.head_size = config.model.hidden // config.model.heads

    def construct(self, ids: Tensor, vocabulary: Tensor) -> Tensor:
        turn, mask = self._positions(ids.shape[1])
        value = self.tok_embeddings(ids, vocabulary)
        for layer in self.layers:
            value = layer(value, turn, mask)
        return self.norm_out(value)

    def _positions(self, length: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """((cosines, sines) of [length, head], what is added to scores so that no token sees a later one)."""
        powers = np.arange(0, self.head_size, 2, dtype=np.float32) / np.float32(self.head_size)
        turns = np.outer(np.arange(length, dtype=np.float32), 1 / np.float32(self.theta) ** powers)
        turns = np.concatenate((turns, turns), axis=-1).astype(np.float32)
        mask = np.triu(np.full((length, length), _MASKED, np.float32), 1)
        return (Tensor(np.cos(turns)), Tensor(np.sin(turns))), Tensor(mask)


class LlamaForCausalLM(Cell):
    """Logits of this rank's rows of the vocabulary, or with labels the mean loss of this rank's samples."""

    def __init__(self, weights: Weights, config: EmbeddedConfig) -> None:
        super().__init__()
        self.model = Model(weights, config)
        name = "model.tok_embeddings.embedding_weight"
        if not config.model.tied:
            self.lm_head = Matrix(weights, "lm_head")
            name = "lm_head.weight"
        self.tied = config.model.tied
        self.rows = Rows(weights.slices[name], weights.ranks)
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        embedding = self.model.tok_embeddings
        vocabulary = embedding.whole(embedding.embedding_weight)
        value = self.rows.enter(self.model(ids, vocabulary))
        value = value.reshape((-1, value.shape[-1]))
        logits = self.product(value, vocabulary) if self.tied else self.lm_head(value)
        if labels is None:
            return logits
        return self.rows.cross_entropy(logits, labels.reshape((-1,)))

    def all_logits(self, ids: Tensor) -> Tensor:
        """[tokens, vocabulary] on every rank."""
        logits = self(ids)
        if not self.rows.cut:
            return logits
        parts = self.rows.ranks.mp.gather(logits)
        return parts.transpose((1, 0, 2)).reshape((logits.shape[0], -1))
