"""Proof of the GPU kernels without a GPU: tools, and a test of each tool with a broken kernel."""
