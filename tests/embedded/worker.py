"""What msrun starts in test_msrun: one rank of each job (arguments: YAMLs as JSON, output directory), or the scheduler.

Several jobs in one process, because starting it takes longer than running them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from transform_ckpt.embedded import job
from transform_ckpt.embedded.config import read_embedded


def main() -> None:
    jobs, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        job.run_scheduler()
        return
    for name, document in jobs.items():
        run(document, output / name)


def run(document: dict[str, Any], output: Path) -> None:
    """Train, predict and evaluate as one rank."""
    config = read_embedded(document, "worker.yaml")
    rank, world = int(os.environ["RANK_ID"]), int(os.environ["RANK_SIZE"])
    losses = job.train(config, rank, world, str(output), None, resume=False)
    predicted = job.predict(config, rank, world, [[3, 1, 4, 1, 5]], None, max_new_tokens=1)
    result = {
        "losses": losses,
        "evaluated": job.evaluate(config, rank, world, None),
        "ids": predicted.ids,
        "logits": predicted.logits[0].tolist(),
    }
    (output / f"result_{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
