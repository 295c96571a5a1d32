"""`transform-ckpt diff A B`: tensor by tensor, whatever the layouts."""

from __future__ import annotations

import json

import click

from transform_ckpt.cli.options import PATH, allow_missing_flag, end_with_differences, json_flag

SHOWN = 20


@click.command("diff")
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option("--src-strategy", "--a-strategy", "a_strategy", metavar="FILE|DIR", help="Strategy of A.")
@click.option("--dst-strategy", "--b-strategy", "b_strategy", metavar="FILE|DIR", help="Strategy of B.")
@click.option("--no-optimizer", is_flag=True, help="Leave optimizer states out of the comparison.")
@allow_missing_flag
@json_flag
def command(
    a: str,
    b: str,
    a_strategy: str | None,
    b_strategy: str | None,
    no_optimizer: bool,
    allow_missing: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compare the checkpoints A and B as whole tensors; exit code 6 when they differ."""
    from transform_ckpt import api
    from transform_ckpt.cli.progress import progress
    from transform_ckpt.compare import compare, logicals
    from transform_ckpt.megatron.containers import PREFIX as MEGATRON_STATES
    from transform_ckpt.states import split_optimizer

    one = api.open_checkpoint(a, a_strategy, allow_missing=allow_missing)
    two = api.open_checkpoint(b, b_strategy, allow_missing=allow_missing)
    names = list({**logicals(one), **logicals(two)})
    if no_optimizer:
        names = [n for n in names if not split_optimizer(n)[0] and not n.startswith(MEGATRON_STATES)]
    with progress("compare") as show:
        found = list(compare(one, two, names=names, progress=show))
    if as_json:
        rows = [{"name": d.name, "kind": d.kind, "detail": d.detail} for d in found]
        print(json.dumps({"ok": not found, "exit_code": 6 if found else 0, "tensors": len(names), "differences": rows}))
    else:
        for difference in found[:SHOWN]:
            print(difference)
        if len(found) > SHOWN:
            print(f"... and {len(found) - SHOWN} more (--json lists all)")
    if found:
        end_with_differences(f"{len(found)} of {len(names)} tensors differ", as_json=as_json)
    if not as_json:
        print(f"{len(names)} tensors, all equal")
