"""What a trainer asks of the automatic transform, free of any trainer's own types."""

from __future__ import annotations

from dataclasses import dataclass

from transform_ckpt.errors import UsageError

DEFAULT_TIMEOUT_SECONDS = 1800.0
DEFAULT_KEEP = 2


@dataclass(frozen=True, slots=True)
class Request:
    """`load_checkpoint` and `src_strategy` are the YAML's paths; `output_dir` is where results go.

    `transform`: cut the checkpoint for this job (auto_trans_ckpt); False loads each rank's own file as it is.
    `processes` (transform_process_num): None = every rank its own slice; fewer make contiguous blocks for the others.
    `in_memory`: each rank reads its slices into its parameters, nothing is written and nobody waits.
    `resume`: the file name that resume_training may give to choose a step.
    `optimizer`: False leaves optimizer states out.  `container`: "ckpt", "safetensors" or None = the source's.
    `remote_url`: the bucket through which nodes without a shared disk (ModelArts) give each other what they write.
    `saves`: the job saves checkpoints, so its strategy stays when its other results are removed.
    `timeout` is of every wait, in seconds.  `keep`: how many runs' results stay.
    """

    load_checkpoint: str
    output_dir: str
    src_strategy: str | None = None
    transform: bool = True
    resume: str | None = None
    processes: int | None = None
    in_memory: bool = False
    optimizer: bool = True
    container: str | None = None
    keep: int = DEFAULT_KEEP
    timeout: float = DEFAULT_TIMEOUT_SECONDS
    workers: int = 0
    memory_nbytes: int = 1 << 30
    remote_url: str | None = None
    saves: bool = False

    def __post_init__(self) -> None:
        if self.in_memory and self.processes is not None:
            raise UsageError(
                "transform_in_memory: True and transform_process_num disagree: in memory every rank reads its own "
                "slices; drop one of them"
            )
        if self.processes is not None and self.processes < 1:
            raise UsageError(f"transform_process_num {self.processes}: expected 1 or more")
        if self.keep < 1:
            raise UsageError(f"keep {self.keep}: expected 1 or more, the result of this run is the first")
        if self.timeout <= 0:
            raise UsageError(f"transform_timeout {self.timeout:g}: expected a number of seconds above 0")
