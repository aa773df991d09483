"""Steps: pure functions `Group -> Group`, one method a file."""

from jaxq.steps.compose import chain, nothing, partition, skip
from jaxq.steps.group import Group, Spec, Step, channel_range, transformed
from jaxq.steps.quantize import quantize

__all__ = ["Group", "Spec", "Step", "chain", "channel_range", "nothing", "partition", "quantize", "skip", "transformed"]
