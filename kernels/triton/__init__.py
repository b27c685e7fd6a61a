"""GPU kernels in Triton, one op a file, named like the op's file in kernels/gpu/.

Every file has `run(...)` with the arguments of its node `planish::gpu_<op>`, which takes CUDA tensors (CPU tensors under Triton's
interpreter), and `variants(core)`, the specializations that `run` chooses there by default, for compilation without a GPU.
Importing them imports Triton; nothing here is a plug-in, so that planish is whole without it.
"""

PLUGINS = False
"""plug-ins are not looked for in this folder"""
