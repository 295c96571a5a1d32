"""Ranks of a job that has nothing to load may end when they like."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import sys, time
from transform_ckpt.auto.job import Job
from transform_ckpt.auto.settings import read_settings
from transform_ckpt.auto.strategies import by_rule
from transform_ckpt.launcher import Launcher

rank, config, output = int(sys.argv[1]), sys.argv[2], sys.argv[3]
settings = read_settings(["--config", config, "--output_dir", output])
job = Job(settings, Launcher(rank, 2, "test"), print)
job.strategy = by_rule(settings.document, settings.config).strategy
with job.transform.together():
    job.publish_strategy()
    time.sleep(6 * rank)  # the others' watch looks twice a second and waits 3 seconds
"""


def test_ranks_that_end_far_apart(tmp_path: Path) -> None:
    config = ROOT / "configs" / "llama" / "tiny_llama_cpu.yaml"
    words = [str(config), str(tmp_path)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    ended = [(process.communicate(timeout=60)[1], process.returncode) for process in ranks]
    assert ended == [("", 0), ("", 0)]
