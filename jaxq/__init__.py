"""jaxq quantizes JAX programs: a forward function and its parameters in, another parameter tree for it out."""

from jaxq.cache import new_cache
from jaxq.calibrate import calibrate
from jaxq.execute import execute
from jaxq.fold import FoldError, fold
from jaxq.formats import AnyFloat, Float, Int
from jaxq.generate import Generated, generate
from jaxq.pack import bits_per_weight, pack, unpack
from jaxq.qtensor import InputQuant, Packed, QTensor, Quantized
from jaxq.quantizer import (
    Quantizer,
    mxfp4,
    mxfp6,
    mxfp8,
    nvfp4,
    per_channel,
    per_group,
    per_tensor,
    per_token,
)
from jaxq.search import coarse_to_fine, exhaustive
from jaxq.shardings import shardings
from jaxq.sites import SiteRow, Sites, sites
from jaxq.steps import (
    Exponents,
    FloatSearch,
    chain,
    fpq_baseline,
    gamma_migration,
    llm_fp4,
    os_plus,
    partition,
    post_shifted_fp4,
    pre_shifted_fp4,
    quantize,
    skip,
    smooth_quant,
)

__version__ = "0.1.0"

__all__ = [
    "AnyFloat",
    "Exponents",
    "Float",
    "FloatSearch",
    "FoldError",
    "Generated",
    "InputQuant",
    "Int",
    "Packed",
    "QTensor",
    "Quantized",
    "Quantizer",
    "SiteRow",
    "Sites",
    "bits_per_weight",
    "calibrate",
    "chain",
    "coarse_to_fine",
    "execute",
    "exhaustive",
    "fold",
    "fpq_baseline",
    "gamma_migration",
    "generate",
    "llm_fp4",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "new_cache",
    "nvfp4",
    "os_plus",
    "pack",
    "partition",
    "per_channel",
    "per_group",
    "per_tensor",
    "per_token",
    "post_shifted_fp4",
    "pre_shifted_fp4",
    "quantize",
    "shardings",
    "sites",
    "skip",
    "smooth_quant",
    "unpack",
]
