"""`make demo`: a training state of 8 ranks becomes 4, 1, 6 and 8 again, each step proven.

The input is written by the real mindspore.save_checkpoint; every command is one that a user would type, run as its own
process; at the end mindspore.load_checkpoint reads the result and NumPy compares it with what was saved.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategy.layout import Layout, Stage, Strategy
from strategy.mindspore_file import write_stage
from transform_ckpt.views import Shape

if TYPE_CHECKING:
    import numpy as np

OUT = Path("demo-output")
HIDDEN, FFN, VOCAB, LAYERS = 384, 1152, 1536, 6


@dataclass(frozen=True, slots=True)
class Parallel:
    """A parallel layout of the demonstration; `zero` shards the optimizer over dp."""

    name: str
    dp: int
    mp: int
    pp: int
    zero: bool = False

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp * self.mp * self.pp

    @property
    def described(self) -> str:
        """As the headings say it."""
        return f"{self.world} rank{'s' if self.world > 1 else ''} ({self.name})"


LAYOUTS = (
    Parallel("dp2 pp4 optimizer shard", 2, 1, 4, zero=True),
    Parallel("mp2 pp2", 1, 2, 2),
    Parallel("complete weights", 1, 1, 1),
    Parallel("mp3 pp2", 1, 3, 2),
    Parallel("dp2 pp4 optimizer shard", 2, 1, 4, zero=True),
)


def parameters() -> Iterator[tuple[str, Shape, int | None, int]]:
    """Name, shape, the dimension that mp cuts, layer (-1 before the first, LAYERS behind the last)."""
    yield "model.tok_embeddings.embedding_weight", (VOCAB, HIDDEN), 0, -1
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for part, shape, axis in (
            ("attention.wq.weight", (HIDDEN, HIDDEN), 0),
            ("attention.wk.weight", (HIDDEN, HIDDEN), 0),
            ("attention.wv.weight", (HIDDEN, HIDDEN), 0),
            ("attention.wo.weight", (HIDDEN, HIDDEN), 1),
            ("feed_forward.w1.weight", (FFN, HIDDEN), 0),
            ("feed_forward.w2.weight", (HIDDEN, FFN), 1),
            ("feed_forward.w3.weight", (FFN, HIDDEN), 0),
        ):
            yield at + part, shape, axis, layer
        yield at + "attention_norm.weight", (HIDDEN,), None, layer
        yield at + "ffn_norm.weight", (HIDDEN,), None, layer
    yield "model.norm_out.weight", (HIDDEN,), None, LAYERS
    yield "lm_head.weight", (VOCAB, HIDDEN), 0, LAYERS


def strategy_of(parallel: Parallel) -> Strategy:
    """Layouts of weights and Adam states, stage by stage."""
    stages: list[dict[str, Layout]] = [{} for _ in range(parallel.pp)]
    for name, shape, axis, layer in parameters():
        at = min(max(layer, 0), LAYERS - 1) * parallel.pp // LAYERS
        tensor_map = tuple((0,) if d == axis else () for d in range(len(shape)))
        sharded = parallel.zero and len(shape) > 1
        shard = (parallel.mp, parallel.dp) if sharded else (0, 0)
        layout = Layout((parallel.dp, parallel.mp), tensor_map, *shard)
        for prefix in ("", "adam_m.", "adam_v."):
            stages[at][prefix + name] = layout
    return Strategy(tuple(Stage(parallel.dp * parallel.mp, layouts) for layouts in stages))


def whole_state() -> dict[str, np.ndarray[Any, Any]]:
    """The training state that is saved: random weights, Adam states."""
    import numpy as np

    random = np.random.default_rng(20)
    names = [(p + n, s) for n, s, _, _ in parameters() for p in ("", "adam_m.", "adam_v.")]
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in names}


def save_with_mindspore(state: dict[str, np.ndarray[Any, Any]], strategy: Strategy, folder: Path) -> None:
    """rank_i/llama-1_20.ckpt, by mindspore.save_checkpoint."""
    import mindspore as ms
    import numpy as np

    for number, stage in enumerate(strategy.stages):
        for local, rank in enumerate(strategy.ranks(number)):
            parts = []
            for name, layout in stage.layouts.items():
                box = layout.box(local, state[name].shape)
                cut = state[name][tuple(slice(a, b) for a, b in zip(box.start, box.stop(), strict=True))]
                parts.append({"name": name, "data": ms.Tensor(np.ascontiguousarray(cut))})
            (folder / f"rank_{rank}").mkdir(parents=True)
            path = str(folder / f"rank_{rank}" / "llama-1_20.ckpt")
            ms.save_checkpoint(parts, path, append_dict={"global_step": 20, "loss_scale": 1024.0})


def command(*words: str) -> None:
    """Show a command and run it; the demonstration ends where one fails."""
    arguments = ["-m", "transform_ckpt", *words]
    print(f"\n$ python {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """The whole demonstration."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    folders = [f"{OUT}/{number}_ranks{parallel.world}" for number, parallel in enumerate(LAYOUTS)]
    print("writing a Llama-like training state of 8 ranks with mindspore.save_checkpoint ...", flush=True)
    state = whole_state()
    for parallel in {p.name: p for p in LAYOUTS}.values():
        found = strategy_of(parallel)
        target = OUT / "strategy" / parallel.name.replace(" ", "_")
        target.mkdir(parents=True)
        for stage in range(parallel.pp):
            for rank in found.ranks(stage):
                write_stage(found, stage, str(target / f"ckpt_strategy_rank_{rank}.ckpt"))
    save_with_mindspore(state, strategy_of(LAYOUTS[0]), Path(folders[0]))
    strategies = [f"{OUT}/strategy/{p.name.replace(' ', '_')}" if p.world > 1 else "None" for p in LAYOUTS]
    command("inspect", folders[0], "--strategy", strategies[0])
    for step in range(1, len(LAYOUTS)):
        a, b = LAYOUTS[step - 1], LAYOUTS[step]
        print(f"\n== {a.described} -> {b.described}", flush=True)
        flags = ("--src-strategy", strategies[step - 1], "--dst-strategy", strategies[step])
        command("convert", folders[step - 1], folders[step], "--to", "mindspore", *flags, "--verify")
    print("\n== is the last one the first one?", flush=True)
    command("diff", folders[0], folders[-1], "--src-strategy", strategies[0], "--dst-strategy", strategies[-1])
    compared = compare_with_mindspore(state, strategy_of(LAYOUTS[-1]), Path(folders[-1]))
    print(f"\nmindspore.load_checkpoint reads the last one: {compared:,} tensors on 8 ranks equal what was saved")
    print(f"look around in {OUT}/ (transform_ckpt.json says what each directory holds)")


def compare_with_mindspore(state: dict[str, np.ndarray[Any, Any]], strategy: Strategy, folder: Path) -> int:
    """Every tensor of every rank, as MindSpore loads it, against the slice of the whole array."""
    import mindspore as ms
    import numpy as np

    count = 0
    for number, stage in enumerate(strategy.stages):
        for local, rank in enumerate(strategy.ranks(number)):
            loaded = ms.load_checkpoint(str(folder / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"))
            for name, layout in stage.layouts.items():
                box = layout.box(local, state[name].shape)
                wanted = state[name][tuple(slice(a, b) for a, b in zip(box.start, box.stop(), strict=True))]
                if not np.array_equal(loaded[name].asnumpy(), wanted):
                    sys.exit(f"{name} of rank {rank} differs: this must not happen, please report it")
                count += 1
            if int(loaded["global_step"].asnumpy()) != 20:
                sys.exit(f"global_step of rank {rank} was lost: this must not happen, please report it")
    return count


if __name__ == "__main__":
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's information messages are not the demonstration's
    main()
