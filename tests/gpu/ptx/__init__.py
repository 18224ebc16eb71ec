"""A PTX interpreter: executes what nvcc and Triton emit, on the CPU, with checks and counters.

``run_ptx`` is the way in. Not modelled: timing, the order of weak memory operations between blocks, tensor cores'
order of summation, races on global memory, clusters, tcgen05. Blocks of one chunk run concurrently, chunks one after
the other, so a block may not wait for a later one.
"""

from .bulk import TensorMap
from .compiler import Fault
from .counters import Counters, report
from .launch import compile_ptx, execute, run_ptx
from .parser import PtxError

__all__ = ["Counters", "Fault", "PtxError", "TensorMap", "compile_ptx", "execute", "report", "run_ptx"]
