"""autoawq_beside_us.py HOW: AutoAWQ with this package on the path; HOW: "triton" as it is installed, "plain" without Triton.

It still imports and packs; its GEMM and GEMV layers fail with an error that names awq_ext.from_pretrained.
"""

from __future__ import annotations

import sys
import warnings

if sys.argv[1] == "plain":
    sys.modules["triton"] = None
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import awq
    from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV
    from awq.modules.linear.gemm import TRITON_AVAILABLE
    from awq.quantize.quantizer import AwqQuantizer

import awq_ext

assert (sys.argv[1] == "triton") == TRITON_AVAILABLE
assert sys.modules["awq.modules.linear.gemm"].awq_ext is awq_ext
assert hasattr(awq, "AutoAWQForCausalLM") and hasattr(awq_ext, "quantize")

torch.manual_seed(0)
quantizer = AwqQuantizer.__new__(AwqQuantizer)
quantizer.group_size, quantizer.w_bit, quantizer.zero_point = 32, 4, True
linear = torch.nn.Linear(128, 64).half()
linear.weight.data, scales, zeros = quantizer.pseudo_quantize_tensor(linear.weight.data)
gemm = WQLinear_GEMM.from_linear(linear, 4, 32, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())
gemv = WQLinear_GEMV.from_linear(linear, 4, 32, scales=scales, zeros=zeros)
gemm.training = True
assert torch.equal(gemm.scales, scales.t().half())  # packing needs no kernel

for layer in (gemm, gemv):
    for rows in (1, 5, 1100):  # its switch points: 8 and 1024 rows
        try:
            layer(torch.randn(1, rows, 128).half())
        except AttributeError as error:
            assert "load the model with awq_ext.from_pretrained" in str(error), error
            message = error
        else:
            raise AssertionError(f"{type(layer).__name__} ran {rows} rows without a kernel")
print(message)
