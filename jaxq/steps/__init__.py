"""Steps: pure functions `Group -> Group`, one method a file."""

from jaxq.steps.compose import chain, nothing, partition, skip
from jaxq.steps.group import Group, Spec, Step, channel_range, transformed
from jaxq.steps.migrate import gamma_migration, smooth_quant
from jaxq.steps.os_plus import as_the_paper, channel_scale, group_outputs, next_input, os_plus
from jaxq.steps.quantize import quantize
from jaxq.steps.shift import channel_shift, fed_by_norm, foldable, run_time_shift

__all__ = [
    "Group",
    "Spec",
    "Step",
    "as_the_paper",
    "chain",
    "channel_range",
    "channel_scale",
    "channel_shift",
    "fed_by_norm",
    "foldable",
    "gamma_migration",
    "group_outputs",
    "next_input",
    "nothing",
    "os_plus",
    "partition",
    "quantize",
    "run_time_shift",
    "skip",
    "smooth_quant",
    "transformed",
]
