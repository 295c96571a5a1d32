"""A small Llama on MindSpore's CPU back-end, so that converted checkpoints are trained from where there is no Ascend.

MindFormers' legacy names, slices as strategy.generate lays them out, MindSpore's own loading and saving.
`config`, `layout` and `schedule` import no MindSpore; `job` has the entry points.
"""
