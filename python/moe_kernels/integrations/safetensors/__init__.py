"""Checkpoints in safetensors files, read and written one tensor at a time."""

from moe_kernels.integrations.safetensors.checkpoint import Checkpoint
from moe_kernels.integrations.safetensors.task_vectors import load_task_vectors, save_task_vectors
from moe_kernels.integrations.safetensors.writer import write_checkpoint, write_file

__all__ = ["Checkpoint", "load_task_vectors", "save_task_vectors", "write_checkpoint", "write_file"]
