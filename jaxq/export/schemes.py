"""One layer in the terms of compressed-tensors: its scheme and its tensors.

| jaxq's weights                        | `format`             | tensors beside `weight_scale`            |
|---------------------------------------|----------------------|------------------------------------------|
| `Int`, where inputs are quantized     | int-quantized        | `weight` int8, `weight_zero_point`       |
| `Int`, where they are not             | pack-quantized       | `weight_packed`, `_shape`, `_zero_point` |
| `Float(4, 3, reserved=1)`             | float-quantized      | `weight` float8_e4m3fn                   |
| `mxfp8()`                             | mxfp8-quantized      | `weight` float8_e4m3fn                   |
| `mxfp4()`                             | mxfp4-pack-quantized | `weight_packed`                          |
| `nvfp4()`                             | nvfp4-pack-quantized | `weight_packed`, `weight_global_scale`   |

Weights are [out, in] there, scales [out, 1] or [out, groups]; a grid for the whole tensor is written as equal ones
for each channel. Integers are signed: asymmetric codes and zero points are moved down by 2**(bits - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from jaxq.formats import Float, Format, Int
from jaxq.qtensor import InputQuant, PerGroup, PerTensor, QTensor
from jaxq.quantizer import MX_BLOCKS, NVFP4_BLOCKS

E4M3, E2M1 = Float(4, 3, reserved=1), Float(2, 1)
Args = dict[str, Any]
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Layer:
    """How one linear layer is stored: the format's name, its arguments for weights and inputs, and its tensors."""

    format: str
    weights: Args
    inputs: Args | None
    tensors: Tensors

    @property
    def scheme(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "input_activations": self.inputs,
            "output_activations": None,
            "format": self.format,
        }


def refuse(path: str, what: str, instead: str) -> NoReturn:
    raise ValueError(f"{path}: {what}, which compressed-tensors has no place for: {instead}")


def layer(path: str, weight: QTensor, quant: InputQuant | None) -> Layer:
    """The layer of a kernel [in, out] and of what it reads (None: not quantized); ValueError if there is none such."""
    if weight.exponents is not None:
        refuse(path, "its input channels have exponents", "use a method without pre-shifted exponents, or fpq_baseline")
    if weight.grid.outer is not None:
        name, args, tensors = _blocks(path, weight)
    elif isinstance(weight.format, Int):
        name, args, tensors = (_packed_integers if quant is None else _integers)(weight)
    elif weight.format == E4M3:
        name, args = "float-quantized", _weight_args(weight)
        tensors = {"weight": _codes(weight).view(ml_dtypes.float8_e4m3fn), "weight_scale": _scale(weight)}
    else:
        refuse(
            path, f"its weight is of {weight.format}", "use Int, Float(4, 3, reserved=1), mxfp8(), mxfp4() or nvfp4()"
        )
    if quant is None:
        return Layer(name, args, None, tensors)
    inputs, found = _inputs(path, quant)
    return Layer(name, args, inputs, tensors | found)


def _codes(weight: QTensor) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(weight.codes).T)


def _scale(weight: QTensor) -> np.ndarray:
    """[out, groups], float32."""
    scale = np.asarray(weight.grid.scale, np.float32).T
    return np.broadcast_to(scale, (weight.shape[1], scale.shape[1]))


def _number(fmt: Format) -> Args:
    return {"num_bits": fmt.bits, "type": "int" if isinstance(fmt, Int) else "float", "symmetric": fmt.symmetric}


def _weight_args(weight: QTensor) -> Args:
    inner, groups = weight.shape[0], weight.grid.scale.shape[0]
    runs = {"strategy": "group", "group_size": inner // groups} if groups > 1 else {"strategy": "channel"}
    return {**_number(weight.format), **runs, "dynamic": False}


def signed(codes: Any, fmt: Int) -> np.ndarray:
    """Integer codes or zero points as the format has them, int8."""
    return (np.asarray(codes).astype(np.int16) - (0 if fmt.symmetric else 2 ** (fmt.bits - 1))).astype(np.int8)


def _integers(weight: QTensor) -> tuple[str, Args, Tensors]:
    assert isinstance(weight.format, Int)
    tensors = {"weight": signed(_codes(weight), weight.format), "weight_scale": _scale(weight)}
    if weight.grid.zero is not None:
        zero = signed(np.asarray(weight.grid.zero).T, weight.format)
        tensors["weight_zero_point"] = np.broadcast_to(zero, tensors["weight_scale"].shape)
    return "int-quantized", _weight_args(weight), tensors


def _packed_integers(weight: QTensor) -> tuple[str, Args, Tensors]:
    """As `_integers`; the bits of a row's codes follow each other, those of zero points down a column."""
    _, args, tensors = _integers(weight)
    codes, bits = tensors.pop("weight"), weight.format.bits
    tensors["weight_packed"] = packed(_unsigned(codes, bits), bits)
    tensors["weight_shape"] = np.array(codes.shape, np.int64)
    if "weight_zero_point" in tensors:
        zero = _unsigned(tensors["weight_zero_point"].T, bits)
        tensors["weight_zero_point"] = packed(zero, bits).T
    return "pack-quantized", args, tensors


def _unsigned(values: np.ndarray, bits: int) -> np.ndarray:
    return (values.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [rows, n] as a stream of bits a row, the lowest first, in int32 words [rows, ceil(n * bits / 32)]."""
    rows, n = codes.shape
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little").reshape(rows, n * bits)
    padded = np.pad(stream, ((0, 0), (0, -n * bits % 32)))
    return np.packbits(padded, axis=-1, bitorder="little").view("<i4")


def _blocks(path: str, weight: QTensor) -> tuple[str, Args, Tensors]:
    args, scale, outer = _weight_args(weight), _scale(weight), np.asarray(weight.grid.outer)
    size = weight.shape[0] // weight.grid.scale.shape[0]
    codes = _codes(weight)
    if weight.format == E2M1 and size == NVFP4_BLOCKS.size:
        if outer.size > 1:
            _refuse_folded(path)
        args |= {"strategy": "tensor_group", "group_size": size, "scale_dtype": "torch.float8_e4m3fn"}
        factor = {"weight_global_scale": 1 / outer.reshape(1).astype(np.float32)}
        block = scale.astype(ml_dtypes.float8_e4m3fn)
        return "nvfp4-pack-quantized", args, {"weight_packed": _pairs(codes), "weight_scale": block, **factor}
    if weight.format not in (E4M3, E2M1) or size != MX_BLOCKS.size:
        refuse(
            path,
            f"its weight is blocks of {size} x {weight.format}",
            "of block formats use mxfp8(), mxfp4() or nvfp4()",
        )
    args |= {"strategy": "group", "group_size": size, "scale_dtype": "torch.uint8"}
    significand, exponent = np.frexp(scale * outer.T)
    if (significand != 0.5).any():
        _refuse_folded(path)
    scales = {"weight_scale": (exponent + 126).astype(np.uint8)}
    if weight.format == E2M1:
        return "mxfp4-pack-quantized", args, {"weight_packed": _pairs(codes), **scales}
    return "mxfp8-quantized", args, {"weight": codes.view(ml_dtypes.float8_e4m3fn), **scales}


def _refuse_folded(path: str) -> NoReturn:
    refuse(path, "a scale was folded into its blocks", "use a block format without methods that scale channels")


def _pairs(codes: np.ndarray) -> np.ndarray:
    return packed(codes, 4).view(np.uint8)


def _inputs(path: str, quant: InputQuant) -> tuple[Args, Tensors]:
    fmt, how = quant.format, quant.granularity
    assert fmt is not None
    if how == NVFP4_BLOCKS:
        refuse(path, "its input's scale is found anew at every call", "use nvfp4() for weights alone, or mxfp4()")
    if isinstance(how, PerGroup) and how.scales == "power_of_two":
        if fmt not in (E4M3, E2M1) or how != MX_BLOCKS:
            refuse(path, f"its input is blocks of {how.size} x {fmt}", "of block formats use mxfp8() or mxfp4()")
    elif not isinstance(fmt, Int) and fmt != E4M3:
        refuse(path, f"its input is of {fmt}", "use Int, Float(4, 3, reserved=1), mxfp8() or mxfp4() for activations")
    if isinstance(how, PerTensor):
        return {**_number(fmt), "strategy": "tensor", "dynamic": False}, _static(quant)
    args = {**_number(fmt), "strategy": "token", "dynamic": True}
    if isinstance(how, PerGroup):
        args |= {"strategy": "group", "group_size": how.size}
        args |= {"scale_dtype": "torch.uint8"} if how.scales == "power_of_two" else {}
    return args, {}


def _static(quant: InputQuant) -> Tensors:
    assert quant.grid is not None
    tensors = {"input_scale": np.asarray(quant.grid.scale, np.float32).reshape(1)}
    if isinstance(quant.format, Int) and quant.grid.zero is not None:
        tensors["input_zero_point"] = signed(quant.grid.zero, quant.format).reshape(1)
    return tensors
