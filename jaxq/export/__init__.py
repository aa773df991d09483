"""Ways out of jaxq: what other programs read."""

from jaxq.export.compressed import compressed, save_compressed
from jaxq.export.stablehlo import stablehlo

__all__ = ["compressed", "save_compressed", "stablehlo"]
