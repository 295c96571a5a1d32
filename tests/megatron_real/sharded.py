"""What Megatron itself says a rank's parameters are of the whole model: its sharded_state_dict, for torch_dist.

An answer to "is the logical model the one Megatron means?" that owes nothing to the cuts of this harness.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from tests.megatron_real.case import Case
from tests.megatron_real.session import start


def global_pieces(case: Case, _: Path) -> list[list[Any]]:
    """Per model tensor of this rank: key, whole shape (new leading axes included), offset, shape, first weights."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    chunks = start(case).chunks
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    found = []
    for chunk in chunks:
        state = chunk.module.module.sharded_state_dict(metadata=metadata)
        apply_factories(state)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor):
                shape = [1] * tensor.prepend_axis_num + list(tensor.local_shape)
                values = tensor.data.detach().float().reshape(-1).tolist()
                found.append([tensor.key, list(tensor.global_shape), list(tensor.global_offset), shape, values])
    return found
