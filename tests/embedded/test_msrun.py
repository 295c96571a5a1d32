"""Several workers under the real msrun do what one worker does: losses, logits, and the slices that they save."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from strategy.generate import generate
from tests.embedded.documents import document, sharded
from tests.embedded.msrun import MsrunError, run_msrun
from tests.strategy.generate_support import held
from tests.support import load_file
from transform_ckpt.embedded.config import read_embedded

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
COMMON = {
    "steps": STEPS,
    "runner_wrapper": {"use_clip_grad": True, "max_grad_norm": 0.5},
    "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-4, "weight_decay": 0.1},
}
"""With an eps far below a gradient a step is that gradient's sign, which rounding may turn around."""


def one_worker(job, ms, output, **changes):
    """(results, saved tensors) of one worker with the same global batch."""
    config = read_embedded(document(batch=4, **changes, **COMMON), "job.yaml")
    predicted = job.predict(config, 0, 1, [[3, 1, 4, 1, 5]], None, max_new_tokens=1)
    results = {
        "losses": job.train(config, 0, 1, str(output), None, resume=False),
        "evaluated": job.evaluate(config, 0, 1, None),
        "ids": [list(ids) for ids in predicted.ids],
        "logits": predicted.logits[0],
    }
    return results, load_file(ms, output / f"checkpoint/rank_0/tiny_rank_0-1_{STEPS}.safetensors")


def compare(job, ms, jobs, tmp_path):
    """Every rank's results and slices against those of one worker; `jobs` by name: (YAML, keys that one worker has)."""
    world = 4 // next(iter(jobs.values()))[0]["runner_config"]["batch_size"]
    world *= next(iter(jobs.values()))[0]["parallel_config"]["model_parallel"]
    yamls = {name: yaml for name, (yaml, _) in jobs.items()}
    script = [Path(__file__).with_name("worker.py"), json.dumps(yamls), tmp_path / "several"]
    logs = run_msrun(script, world, tmp_path, {"PYTHONPATH": str(ROOT)})
    assert f"step {STEPS}/{STEPS} loss " in logs["worker_0"]
    assert "loss" not in logs["scheduler"]
    for name, (yaml, changes) in jobs.items():
        wanted, saved = one_worker(job, ms, tmp_path / "one" / name, **changes)
        stage = generate(read_embedded(yaml, "job.yaml").job).strategy.stages[0]
        assert stage.devices == world
        for rank in range(world):
            compare_rank(ms, tmp_path / "several" / name, rank, wanted, saved, stage)


def compare_rank(ms, output, rank, wanted, saved, stage):
    found = json.loads((output / f"result_{rank}.json").read_text())
    np.testing.assert_allclose(found["losses"], wanted["losses"], rtol=0, atol=2e-6)
    assert found["evaluated"] == pytest.approx(wanted["evaluated"], abs=2e-6)
    assert found["ids"] == wanted["ids"]
    np.testing.assert_allclose(found["logits"], wanted["logits"], rtol=0, atol=1e-6)
    path = output / f"checkpoint/rank_{rank}/tiny_rank_{rank}-1_{STEPS}.safetensors"
    read = load_file(ms, path)
    assert read.keys() == saved.keys()
    for name, value in read.items():
        whole = saved[name]
        layout = stage.layouts.get(name)
        box = held(layout, whole.shape)[rank] if layout else [(0, n) for n in whole.shape]
        part = whole[tuple(slice(start, stop) for start, stop in box)]
        bound = 1e-4 * np.abs(whole).max() if name.startswith("adam") else 1e-5
        np.testing.assert_allclose(value, part, rtol=0, atol=bound, err_msg=f"{output.name} rank {rank}: {name}")


def test_model_parallel(job, ms, tmp_path):
    tied = {"tie_word_embeddings": True}
    compare(
        job,
        ms,
        {"cut head": (document(mp=2, **COMMON), {}), "tied": (document(mp=2, **tied, **COMMON), tied)},
        tmp_path,
    )


@pytest.mark.slow
def test_data_and_model_parallel(job, ms, tmp_path):
    """Also with the optimizer shard, over both ranks of the data and, of a whole output layer, over all four."""
    mesh = {"dp": 2, "mp": 2, "batch": 2, **COMMON}
    tied = {"tie_word_embeddings": True}
    whole = {"vocab_emb_dp": True}
    jobs = {
        "sharded, whole head": (document(**mesh, parallel=whole) | {"parallel": sharded()}, {}),
        "sharded, tied": (document(**mesh, **tied) | {"parallel": sharded()}, tied),
    }
    compare(job, ms, jobs, tmp_path)


def is_alive(pid):
    """A zombie that nobody has waited for has no command line."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def test_a_failing_job_shows_its_logs(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('this is why')")
    with pytest.raises(MsrunError, match="this is why"):
        run_msrun([script], 1, tmp_path, timeout=60)


def test_a_job_that_hangs_is_ended(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(f"import os, time\nopen({str(tmp_path)!r} + f'/{{os.getpid()}}.pid', 'w')\ntime.sleep(600)")
    with pytest.raises(MsrunError, match="took too long"):
        run_msrun([script], 1, tmp_path, timeout=8)
    started = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(started) == 2, "the worker and the scheduler"
    assert not [pid for pid in started if is_alive(pid)]
