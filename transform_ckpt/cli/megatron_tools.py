"""tools/convert_pt2ckpt.py and tools/convert_ckpt2pt.py: flags of MindSpeed-Core-MS's converters, this engine.

Defaults of sizes are what the checkpoint says; the originals had 1 for all of them.  A size that is given must be the
checkpoint's own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transform_ckpt.cli.dropin import run_tool
from transform_ckpt.errors import InputError, PartialError, UsageError

INIT_ORDER = "tp-cp-ep-dp-pp"
_LONGEST = 1 << 30
"""Seconds that an alarm can be set to."""
_SIZES = ("tp", "pp", "dp", "cp", "ep", "vpp")


def _common(parser: argparse.ArgumentParser, processes: int) -> None:
    """Flags that both have."""
    for name in _SIZES:
        parser.add_argument(f"--{name}-size", type=int, help=f"{name.upper()} of the Megatron run (default: its args)")
    parser.add_argument("--stage-list", type=int, nargs="+", help="layers of each pipeline stage")
    parser.add_argument("--num-layers", type=int, help="layers of the model (default: its args)")
    parser.add_argument("--convert-param-only", action="store_true", help="weights without an optimizer")
    parser.add_argument("--debug", action="store_true", help="print every tensor on stderr")
    parser.add_argument("--multiprocess-off", action="store_true", help="one process")
    parser.add_argument("--process-limit", type=int, default=processes, help="processes at most")
    parser.add_argument("--process_timeout", type=int, default=3600, help="seconds; what is done by then is kept")
    parser.add_argument("--megatron-core-version", help="whose rules the buffers follow, where nothing tells")
    parser.add_argument("--bucket-size", type=int, help="--ddp-bucket-size of the run, in elements")
    parser.add_argument("--memory", default="1G", help="memory bound of each process")


def convert_pt2ckpt() -> int:
    """tools/convert_pt2ckpt.py (MindSpeed-Core-MS mindspeed_ms/tools/converter/convert_pt2ckpt.py)."""
    parser = argparse.ArgumentParser(description="Megatron checkpoints with the distributed optimizer, for MindSpore.")
    parser.add_argument("--megatron-path", required=True, help="the iter_XXXXXXX directory, or the root above it")
    parser.add_argument("--ms-path", required=True, help="where rank_i/, pt_meta/ and strategy/ go")
    parser.add_argument("--param-map-path", help="param_map/ of the run (default: rebuilt from the model)")
    parser.add_argument("--parallel-init-order", default=INIT_ORDER, help=f"only {INIT_ORDER}")
    parser.add_argument("--vpp-per-stage", type=int, dest="vpp_size", help=argparse.SUPPRESS)
    parser.add_argument("--noop", type=int, nargs="+", help="layers without tensors, numbered among all")
    parser.add_argument("--generate-all-dp-cp", action="store_true", help="files of every data-parallel rank")
    parser.add_argument("--file-prefix", default="network", help="files are rank_i/{prefix}.{format}")
    parser.add_argument("--format", default="ckpt", choices=("ckpt", "safetensors"))
    parser.add_argument(
        "--dist-opt-content", nargs="+", default=["param", "exp_avg", "exp_avg_sq"], help="which states are written"
    )
    parser.add_argument("--optimizer-names", default="exp_avg", choices=("exp_avg", "adam"), help="exp_avg. or adam_m.")
    parser.add_argument("--hf-config", help="config.json of the model, for what args lacks")
    _common(parser, 4)
    return run_tool(parser, _pt2ckpt)


def _pt2ckpt(arguments: argparse.Namespace) -> None:
    from transform_ckpt import api
    from transform_ckpt.megatron.containers import STATES
    from transform_ckpt.megatron.hf_defaults import args_of_config
    from transform_ckpt.megatron.mindspore_target import ConvertedOptions
    from transform_ckpt.megatron_plans import MegatronSource, megatron_to_mindspore

    if arguments.parallel_init_order != INIT_ORDER:
        raise UsageError(f"--parallel-init-order {arguments.parallel_init_order}: only {INIT_ORDER} is supported")
    strange = [state for state in arguments.dist_opt_content if state not in STATES]
    if strange:
        raise UsageError(f"--dist-opt-content {' '.join(strange)}: expected some of {' '.join(STATES)}")
    if "/" in arguments.file_prefix or arguments.file_prefix in ("", ".", ".."):
        raise UsageError(f"--file-prefix {arguments.file_prefix!r} must be the beginning of a file name, without '/'")
    source = MegatronSource(
        param_map=arguments.param_map_path,
        version=arguments.megatron_core_version,
        bucket_size=arguments.bucket_size,
        given=_given(arguments),
        defaults=args_of_config(arguments.hf_config) if arguments.hf_config else {},
        optimizer=not arguments.convert_param_only,
        strict=True,
    )
    options = ConvertedOptions(
        container=arguments.format,
        prefix=arguments.file_prefix,
        content=tuple(state for state in STATES if state in arguments.dist_opt_content),
        param_only=arguments.convert_param_only,
        every_rank=arguments.generate_all_dp_cp,
        optimizer_names=arguments.optimizer_names,
    )
    with api.without_collection():
        plan, converted = megatron_to_mindspore(arguments.megatron_path, source, options)
    dst = _run(plan, arguments.ms_path, arguments)
    pairs = [(src, os.path.join(dst, relpath)) for src, relpath in converted.pairs]
    if arguments.as_json:
        print(json.dumps({"ok": True, "dst": dst, "converted": pairs, "notes": list(plan.notes)}))
    else:
        print("\n".join(f"convert '{src}' to '{path}' successfully." for src, path in pairs))


def convert_ckpt2pt() -> int:
    """tools/convert_ckpt2pt.py (MindSpeed-Core-MS mindspeed_ms/tools/converter/convert_ckpt2pt.py)."""
    parser = argparse.ArgumentParser(description="MindSpore files of Megatron shards back into Megatron checkpoints.")
    parser.add_argument("--ms-path", required=True, help="directory of rank_i/ or mp_rank_TT_PPP/")
    parser.add_argument("--megatron-path", required=True, help="where iter_XXXXXXX/ goes")
    parser.add_argument("--param-map-path", help="pt_meta/ (JSON and args_*.pt), or param_map/ of the run")
    parser.add_argument("--src-model-format", choices=("ckpt", "safetensors"), help="default: what is there")
    parser.add_argument("--noop", type=int, nargs="+", help="layers without tensors, numbered among all")
    parser.add_argument("--container", choices=("list", "coalesced"), help="default: that of the Megatron run")
    parser.add_argument("--template", help="model_optim_rng.pt, or a directory of them, where pt_meta has no args_*.pt")
    parser.add_argument("--iteration", help="number or release (default: step_num of the files)")
    _common(parser, 8)
    return run_tool(parser, _ckpt2pt)


def _ckpt2pt(arguments: argparse.Namespace) -> None:
    from transform_ckpt import api
    from transform_ckpt.formats import container_of
    from transform_ckpt.megatron_plans import MegatronTarget, converted_to_megatron

    given = _given(arguments)
    target = MegatronTarget(
        layout={key: given[key] for key in ("dp", "cp") if key in given},
        iteration=_iteration(arguments.iteration),
        container=arguments.container,
        version=arguments.megatron_core_version,
        bucket_size=arguments.bucket_size,
        all_places=False,
        keep_step=True,
    )
    with api.without_collection():
        plan = converted_to_megatron(
            arguments.ms_path,
            target,
            meta=arguments.param_map_path,
            template=arguments.template,
            given=given,
            optimizer=not arguments.convert_param_only,
        )
    odd = [h.path for h in plan.source.headers if arguments.src_model_format not in (None, container_of(h.path))]
    if odd:
        raise InputError(f"{odd[0]}: --src-model-format {arguments.src_model_format} is given: give that of the files")
    dst = _run(plan, arguments.megatron_path, arguments)
    pairs = [(h.path, _target_of(dst, number, plan)) for number, h in enumerate(plan.source.headers)]
    if arguments.as_json:
        print(json.dumps({"ok": True, "dst": dst, "sources": [p for p, _ in pairs], "notes": list(plan.notes)}))
    else:
        folders = dict.fromkeys(os.path.dirname(src) for src, _ in pairs)
        print("\n".join(f"convert '{folder}' to '{dst}' successfully." for folder in folders))


def _target_of(dst: str, number: int, plan: Any) -> str:
    return os.path.join(dst, plan.target.files[min(number, len(plan.target.files) - 1)].relpath)


def _iteration(text: str | None) -> int | str | None:
    if text in (None, "release"):
        return text
    if not str(text).isdecimal():
        raise UsageError(f"--iteration {text}: expected a number or release")
    return int(str(text))


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Sizes and layer options that the user gave."""
    found: dict[str, Any] = {name: getattr(arguments, f"{name}_size") for name in _SIZES}
    found |= {
        "num_layers": arguments.num_layers,
        "num_layer_list": tuple(arguments.stage_list or ()),
        "noop_layers": tuple(arguments.noop or ()),
    }
    bad = [f"--{name}-size {found[name]}" for name in _SIZES if found[name] is not None and found[name] < 1]
    if bad:
        raise UsageError(f"{', '.join(bad)}: sizes are 1 or more")
    return {key: value for key, value in found.items() if value not in (None, ())}


def _run(plan: Any, dst: str, arguments: argparse.Namespace) -> str:
    """Carry the plan out; what was said on the way goes to stderr."""
    from transform_ckpt import api
    from transform_ckpt.cli.options import Size
    from transform_ckpt.cli.progress import progress

    if arguments.process_limit < 1 or arguments.process_timeout < 1:
        raise UsageError("--process-limit and --process_timeout are 1 or more")
    if arguments.debug:
        for file in plan.target.files:
            for spec in file.specs:
                print(f"{file.relpath}: {spec.name} {spec.dtype}{list(spec.shape)}", file=sys.stderr)
    workers = 1 if arguments.multiprocess_off else min(arguments.process_limit, len(os.sched_getaffinity(0)))
    memory = Size().convert(arguments.memory, None, None)
    with progress("convert") as show, _timeout(arguments.process_timeout):
        options = api.RunOptions(workers, memory, overwrite=arguments.overwrite, progress=show)
        result = api.carry_out(plan, dst, options)
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    return result.dst


@contextmanager
def _timeout(seconds: int) -> Iterator[None]:
    def expire(_number: int, _frame: Any) -> None:
        raise PartialError(f"--process_timeout: {seconds} s have passed; run the same command again to continue")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(min(seconds, _LONGEST))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
