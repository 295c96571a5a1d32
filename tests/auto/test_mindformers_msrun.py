"""A job under MindSpore's own launcher: msrun, its scheduler, MindFormers' build_context, two joined ranks."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest

from tests import support
from tests.auto import mindformers_driver as driver
from tests.support import assert_same

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """\
import sys
from pathlib import Path
import numpy as np
from tests.auto import mindformers_driver as driver
folder = Path(sys.argv[1])
driver.import_mindformers(folder / "output")
import mindspore as ms
from mindformers.core.context import build_context
config = driver.read_config(folder / "job.yaml")
build_context(config)
rank = ms.communication.get_rank()
assert ms.get_auto_parallel_context("parallel_mode") == "semi_auto_parallel"
network = driver.build_network(config)
driver.cut(network, driver.layouts(), rank)
driver.step(config, ms.Model(network), network, None, do_predict=True)
np.savez(folder / f"held_{rank}.npz", **driver.held(network))
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def msrun(folder: Path, *command: str) -> str:
    """Run two workers and the scheduler to their end; what the workers said."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    launcher = shutil.which("msrun", path=path)
    if launcher is None:
        pytest.skip("msrun is not there: it comes with mindspore")
    logs = folder / "logs"
    started = subprocess.Popen(
        [launcher, "--worker_num", "2", "--local_worker_num", "2", "--master_port", str(free_port()),
         "--log_dir", str(logs), "--join", "True", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        started.wait(timeout=240)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    said = "".join(path.read_text(errors="replace") for path in sorted(logs.glob("worker_*.log")))
    assert started.returncode == 0, said[-3000:]
    return said


def test_two_workers_of_msrun(ms: ModuleType, tmp_path: Path) -> None:
    if importlib.util.find_spec("mindformers") is None:
        pytest.skip("mindformers is not installed: make venv")
    whole = driver.weights()
    support.save_file(ms, whole, tmp_path / "source" / "llama.safetensors")
    driver.write_yaml(
        tmp_path,
        use_parallel=True,
        load_checkpoint=str(tmp_path / "source"),
        load_ckpt_format="safetensors",
        transform_timeout=100.0,
    )
    (tmp_path / "job.py").write_text(SCRIPT)
    said = msrun(tmp_path, "python", "-W", "ignore", "-m", "transform_ckpt.auto.mindformers", "job.py", str(tmp_path))
    assert "strategies come by rule: MindSpore's compiler makes strategies on Ascend only, this is CPU" in said
    (result,) = (tmp_path / "output" / "transformed_checkpoint").iterdir()
    saved = support.load_ranks(ms, result)
    for rank in range(2):
        expected = support.slice_rank(whole, [driver.layouts()], rank)
        assert_same(driver.load_npz(tmp_path / f"held_{rank}.npz"), expected, f"rank {rank}")
        assert_same(saved[rank], expected, f"rank {rank}, saved")
