"""Written by the build."""

TORCH_VERSION = "2.13.0"  # the torch that awq_ext._C is compiled against
