"""jaxq quantizes JAX programs: a forward function and its parameters in, another parameter tree for it out."""

from jaxq.calibrate import calibrate
from jaxq.execute import execute
from jaxq.fold import FoldError, fold
from jaxq.formats import Int
from jaxq.qtensor import InputQuant, QTensor, Quantized
from jaxq.quantizer import Quantizer, per_channel, per_group, per_tensor, per_token
from jaxq.steps import chain, partition, quantize, skip

__version__ = "0.1.0"
