"""autoawq_beside_us.py HOW: AutoAWQ with this package on the path; HOW: "triton" as it is installed, "plain" without Triton.

Its GEMM and GEMV layers must give on the CPU what their Linears give, gradients included, and the awq_ext they call is ours.
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

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for layer in (gemm, gemv):
        for rows in (1, 5, 1100):  # its switch points: 8 and 1024 rows
            x = torch.randn(1, rows, 128).half()
            expected = linear(x)
            # fp16 sums of 128 products in another order, then a bias: some units in the last place of values up to 2
            torch.testing.assert_close(layer(x).view_as(expected), expected, rtol=0, atol=4 * 2**-10)
said = [str(warning.message) for warning in caught if "awq_ext.from_pretrained" in str(warning.message)]
assert len(said) == 1, [str(warning.message) for warning in caught]

x = torch.randn(1, 5, 128).half().requires_grad_()
gemm(x).sum().backward()
expected = linear.weight.sum(0).float()
torch.testing.assert_close(x.grad[0, 0].float(), expected, rtol=0, atol=64 * 2**-11)  # 64 terms below 1, each rounded
try:
    _ = awq_ext.layernorm_forward_cuda
except AttributeError as error:
    print(error)
