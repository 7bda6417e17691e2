"""Compilation, and CUDA graphs around what is compiled."""

from hybridlab.speed.compilation import compile_
from hybridlab.speed.cuda_graphs import CudaGraphs, buffers_kept
