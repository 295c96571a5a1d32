"""`make demo`, second part: a Hugging Face Llama is trained on 2 workers, then predicts on 1 and goes on on 4.

Nobody converts anything by hand: every job has auto_trans_ckpt: True and a checkpoint of another layout.  Beside it the
same training runs on one worker without a change of layout; loss curves and logits are compared at the end.

The commands are those a user would type.  Input: a LlamaForCausalLM made by transformers with random weights, saved in
several safetensors files, a tokenizer trained on the spot, and this project's licence as the text.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("demo-output") / "auto"
HIDDEN, FFN, VOCAB, LAYERS, HEADS, KV_HEADS, LENGTH = 128, 256, 512, 4, 8, 4, 32
STEPS, SPLIT, GLOBAL_BATCH = 8, 4, 4
PROMPT = "You may reproduce and distribute copies of the Work"
TOLERANCE = 2e-5
"""Float32 sums in another order: 1e-7 relative for each addition of some hundred, four layers deep, over eight steps.
A wrong slice changes losses by 1e-2 and more."""

_LOSS = re.compile(r"^step (\d+)/\d+ loss ([\d.]+)", re.MULTILINE)

YAML = """\
run_mode: 'train'
seed: 7
output_dir: '{output}'
use_parallel: {parallel}
auto_trans_ckpt: {auto}
load_checkpoint: '{load}'
src_strategy_path_or_dir: '{strategy}'
resume_training: {resume}
load_strict: True
runner_config: {{epochs: 10, max_steps: {steps}, batch_size: {batch}, sink_mode: False}}
optimizer: {{type: AdamW, betas: [0.9, 0.95], eps: 1.e-8, weight_decay: 0.01}}
lr_schedule: {{type: CosineWithWarmUpLR, learning_rate: 1.e-3, warmup_steps: 2, total_steps: {total}}}
callbacks:
  - {{type: CheckpointMonitor, prefix: demo, save_checkpoint_steps: {save}, integrated_save: False}}
train_dataset:
  data_loader: {{dataset_dir: '{text}'}}
processor:
  tokenizer: {{pretrained_model_dir: '{tokenizer}'}}
parallel_config: {{data_parallel: {dp}, model_parallel: {mp}, vocab_emb_dp: False}}
parallel: {{parallel_mode: 1, full_batch: True, enable_parallel_optimizer: False}}
model:
  model_config:
    type: LlamaConfig
    num_layers: {layers}
    hidden_size: {hidden}
    intermediate_size: {ffn}
    num_heads: {heads}
    n_kv_heads: {kv_heads}
    vocab_size: {vocab}
    seq_length: {length}
    rms_norm_eps: 1.0e-6
    theta: 10000.0
    compute_dtype: 'float32'
    param_init_type: 'float32'
    use_flash_attention: False
  arch: {{type: LlamaForCausalLM}}
"""


def make_model(folder: Path) -> np.ndarray[Any, Any]:
    """Weights, configuration and tokenizer as Hugging Face saves them; transformers' logits of PROMPT."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))  # noqa: S106 - a token of text
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train([str(ROOT / "LICENSE")], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")  # noqa: S106
    fast.save_pretrained(folder)
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCAB,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size="1MB")
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = model(torch.tensor([fast(PROMPT)["input_ids"]])).logits[0].numpy()
    return logits


def write_config(name: str, **values: Any) -> Path:
    """One job's YAML."""
    sizes = {"layers": LAYERS, "hidden": HIDDEN, "ffn": FFN, "heads": HEADS, "kv_heads": KV_HEADS, "vocab": VOCAB}
    mesh = {"dp": 1, "mp": 1, "batch": GLOBAL_BATCH, "length": LENGTH, "total": STEPS, "save": SPLIT}
    chosen = {"load": "", "strategy": "", "resume": False, "auto": True, "steps": STEPS, "parallel": True}
    places = {"output": OUT / name, "text": ROOT / "LICENSE", "tokenizer": OUT / "hf"}
    path = OUT / f"{name}.yaml"
    path.write_text(YAML.format(**{**sizes, **mesh, **chosen, **places, **values}), encoding="utf-8")
    return path


def job(config: Path, workers: int, *more: str) -> dict[int, float]:
    """Run a job as a user would and show what it says; its losses by step."""
    script = os.path.relpath(ROOT / "run_mindformer.py")
    words = [script, "--config", str(config), *more]
    command = ["python", *words]
    if workers > 1:
        port = _free_port()
        log = str(config.with_suffix(".log"))
        command = ["msrun", "--worker_num", str(workers), "--local_worker_num", str(workers)]
        command += ["--master_port", str(port), "--log_dir", log, "--join", "True", *words]
    print(f"\n$ {shlex.join(command)}", flush=True)
    began = time.monotonic()
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "GLOG_v": "3"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    text = done.stdout
    if workers > 1:
        text = (Path(log) / "worker_0.log").read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines():
        if not line.startswith(("[", "saved")):
            print(f"  {line}")
    if done.returncode:
        print(done.stdout[-3000:] + done.stderr[-3000:], file=sys.stderr)
        sys.exit(done.returncode)
    print(f"  ({time.monotonic() - began:.0f} s)", flush=True)
    return {int(step): float(loss) for step, loss in _LOSS.findall(text)}


def logits_of(config: Path, *flags: str) -> np.ndarray[Any, Any]:
    """The logits of PROMPT by the embedded Llama, as `--run_mode predict` computes them."""
    from transform_ckpt.auto.job import Job
    from transform_ckpt.auto.settings import read_settings
    from transform_ckpt.embedded.config import read_embedded
    from transform_ckpt.embedded.job import predict
    from transform_ckpt.launcher import Launcher

    words = ["--config", str(config), "--run_mode", "predict", "--use_parallel", "False", *flags]
    settings = read_settings(words)
    loading = Job(settings, Launcher(0, 1, "single process"), _quiet)
    found = predict(
        read_embedded(settings.document, settings.config), 0, 1, [PROMPT], loading.load, max_new_tokens=1, report=_quiet
    )
    return found.logits[0]


def compare(
    what: str, found: Sequence[float] | np.ndarray[Any, Any], wanted: Sequence[float] | np.ndarray[Any, Any]
) -> None:
    """Say how far two series of numbers are apart; the demonstration ends when it is too far."""
    import numpy as np

    if len(found) != len(wanted) or not len(found):
        sys.exit(f"{what}: {len(found)} numbers instead of {len(wanted)}: this must not happen, please report it")
    difference = float(np.max(np.abs(np.asarray(found) - np.asarray(wanted))))
    print(f"{what}: largest difference {difference:.1e} (allowed {TOLERANCE:.0e})", flush=True)
    if not difference <= TOLERANCE:
        sys.exit("that is too much: this must not happen, please report it")


def main() -> None:
    """The whole demonstration."""
    began = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    print("making a Hugging Face Llama with random weights, and a tokenizer ...", flush=True)
    expected = make_model(OUT / "hf")
    print("  " + "  ".join(sorted(path.name for path in (OUT / "hf").iterdir())))

    print(f"\n== never resharded: {STEPS} steps on one worker")
    alone = write_config("alone", parallel=False, auto=False, load=OUT / "hf")
    reference = job(alone, 1)

    print(f"\n== complete weights -> 2 workers (model parallel), {SPLIT} steps")
    two = write_config("two", mp=2, load=OUT / "hf", steps=SPLIT)
    first = job(two, 2)

    sharded = ["--load_checkpoint", str(OUT / "two" / "checkpoint")]
    sharded += ["--src_strategy_path_or_dir", str(OUT / "two" / "strategy")]
    print("\n== the 2-rank checkpoint -> prediction on 1 worker")
    one = write_config("one", parallel=False)
    job(one, 1, "--run_mode", "predict", *sharded, "--predict_data", PROMPT)

    print("\n== the 2-rank checkpoint with Adam states and step -> 4 workers (dp 2, mp 2), training goes on")
    four = write_config("four", dp=2, mp=2, batch=GLOBAL_BATCH // 2, resume=True)
    second = job(four, 4, *sharded)

    print("\n== equal?")
    initial = logits_of(one, "--load_checkpoint", str(OUT / "hf"))
    compare("logits of the Hugging Face weights, against transformers", initial.ravel(), expected.ravel())
    curve = {**first, **second}
    compare(f"losses of {STEPS} steps, 2 then 4 workers", [curve[n] for n in sorted(curve)], [*reference.values()])
    files = OUT / "alone" / "checkpoint" / "rank_0"
    (middle,) = files.glob(f"*_{SPLIT}.ckpt")
    never = logits_of(one, "--load_checkpoint", str(middle))
    compare(f"logits after {SPLIT} steps, from 2 ranks", logits_of(one, *sharded).ravel(), never.ravel())
    print(f"\nall equal; {time.monotonic() - began:.0f} s")
    print(f"look around in {OUT}/: two/strategy, two/checkpoint, four/transformed_checkpoint")


def _quiet(_line: str) -> None:
    """Nothing is said twice."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's information messages are not the demonstration's
    main()
