"""Framework internals of JAX beside PyTorch, by measurement.

Each contrast is a module that runs alone, `python -m contrast.capture`: it has a CLAIM, a function
for each framework that returns plain facts, and a `main` that prints them side by side. Counts and
bytes are exact and tested; times are recorded. `python -m contrast.gpu OUT` measures what
needs a GPU. PyTorch is an extra: pip install 'jaxinfra[torch]'.
"""

NAMES = {
    "capture": "how a Python function becomes a graph",
    "ir_ladder": "operations on every rung from Python to kernels",
    "fusion": "bytes and kernels of a chain, fused and not",
    "inductor_source": "the Triton kernels that torch.compile writes, read without a GPU",
    "autodiff": "what is kept for the backward pass, and derivatives of derivatives",
    "batching": "vmap, gradients of each example, and branches",
    "remat": "memory against computing again",
    "compile_cost": "what L layers cost the compiler",
    "recompilation": "programs compiled for a stream of shapes",
    "dispatch": "what a call costs, and how far Python runs ahead",
    "graphs": "small kernels launched or replayed (GPU)",
    "memory": "a plan of the whole program, or an allocator",
    "in_place": "donation and mutation",
    "precision": "what products are computed in, and their errors",
    "randomness": "keys and generators",
    "data_parallel": "collectives in the program, or hooks in the backward pass",
    "one_triton_source": "one Triton kernel launched from both",
}
