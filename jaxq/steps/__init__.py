"""Steps: pure functions `Group -> Group`, one method a file."""

from jaxq.steps.compose import chain, nothing, partition, skip
from jaxq.steps.float_operands import FloatSearch
from jaxq.steps.float_search import Clips, linear_clips, log_clips
from jaxq.steps.float_turns import Exponents
from jaxq.steps.group import Group, Spec, Step, channel_range, transformed
from jaxq.steps.llm_fp4 import fpq_baseline, llm_fp4, post_shifted_fp4, pre_shifted_fp4
from jaxq.steps.migrate import gamma_migration, smooth_quant
from jaxq.steps.os_plus import as_the_paper, channel_scale, group_outputs, next_input, os_plus
from jaxq.steps.output_error import cosine, diagonal_hessian, output_error
from jaxq.steps.quantize import quantize
from jaxq.steps.shift import channel_shift, fed_by_attention, fed_by_norm, foldable, run_time_shift

__all__ = [
    "Clips",
    "Exponents",
    "FloatSearch",
    "Group",
    "Spec",
    "Step",
    "as_the_paper",
    "chain",
    "channel_range",
    "channel_scale",
    "channel_shift",
    "cosine",
    "diagonal_hessian",
    "fed_by_attention",
    "fed_by_norm",
    "foldable",
    "fpq_baseline",
    "gamma_migration",
    "group_outputs",
    "linear_clips",
    "llm_fp4",
    "log_clips",
    "next_input",
    "nothing",
    "os_plus",
    "output_error",
    "partition",
    "post_shifted_fp4",
    "pre_shifted_fp4",
    "quantize",
    "run_time_shift",
    "skip",
    "smooth_quant",
    "transformed",
]
