"""Safetensors files, read by the best way there is into arrays of NumPy, torch or CuPy.

The format is that of https://github.com/huggingface/safetensors; its package is not needed.
"""

from gdsdirect.safetensors.header import SafetensorsError
from gdsdirect.safetensors.lazy import TensorFile, TensorSlice, safe_open
from gdsdirect.safetensors.load import Tensors, load_file

__all__ = ["SafetensorsError", "TensorFile", "TensorSlice", "Tensors", "load_file", "safe_open"]
