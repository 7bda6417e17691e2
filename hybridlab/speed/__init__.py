"""Compilation, and CUDA graphs around what is compiled."""

from hybridlab.speed.compilation import CudaGraphs, buffers_kept, compile_
