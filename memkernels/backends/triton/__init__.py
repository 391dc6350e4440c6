"""Kernels in Triton: NVIDIA GPUs, or Triton's interpreter on the CPU (TRITON_INTERPRET=1)."""

import triton

VERSION = triton.__version__
