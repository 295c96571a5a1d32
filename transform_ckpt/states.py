"""Which tensors of a checkpoint are weights, optimizer states of a weight, or state that no strategy lays out.

Tables only.  Sources: MindFormers 1.9.0 callbacks and trainer, MindSpore 2.9.0 nn/optim and train/callback; the
suffixes are buffers that the compiler leaves out of strategy files when the graph does not use or train them.
"""

from __future__ import annotations

from math import prod

from transform_ckpt import dtypes
from transform_ckpt.views import Shape

OPTIMIZER_PREFIXES = (
    "adam_m.",
    "adam_v.",
    "accu_grads.",
    "exp_avg.",
    "exp_avg_sq.",
    "moments.",
    "moment1.",
    "moment2.",
)

STATE_NAMES = frozenset(
    "global_step learning_rate epoch_num step_num global_batch_size loss_scale scale_sense current_iterator_step "
    "last_overflow_iterator_step consumed_samples append_epoch_num append_step_num cur_epoch_num cur_step_num "
    "beta1_power beta2_power current_step".split()
)
STATE_SUFFIXES = (".router.fi_accu", ".router.expert_bias", ".router.expert_load", ".topk_bias")


def split_optimizer(name: str) -> tuple[str, str]:
    """("adam_m.", "w") for "adam_m.w"; ("", "w") for a weight."""
    for prefix in OPTIMIZER_PREFIXES:
        if name.startswith(prefix) and len(name) > len(prefix):
            return prefix, name[len(prefix) :]
    return "", name


def is_state(name: str, dtype: str, shape: Shape) -> bool:
    """May this tensor be in no strategy?  Single values and strings may, and the names known to be left out."""
    if dtype == dtypes.STRING or name in STATE_NAMES:
        return True
    if name.endswith(STATE_SUFFIXES):
        return True
    return prod(shape) <= 1 and not split_optimizer(name)[0] and not name.endswith((".weight", ".bias"))
