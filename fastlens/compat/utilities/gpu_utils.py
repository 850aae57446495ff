"""How much memory torch holds on the GPU."""

import torch


def print_gpu_mem(step_name: str = "") -> None:
    """Print how many GiB the tensors on the current CUDA device take; 0.0 without one."""
    print(f"{step_name} ~ {round(torch.cuda.memory_allocated() / 2**30, 2)} GiB allocated on GPU.")
