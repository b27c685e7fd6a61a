"""Fused ops as a GPU runs them: what each stores there, its node in a program for a GPU, and its numbers in plain torch.

One file an op, named like the op's file in kernels/. The kernel itself is the file of the same name in kernels/triton/.
"""
