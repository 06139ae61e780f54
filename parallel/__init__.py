"""Training on many devices: meshes, collectives, every parallelism, and what they cost.

Each module is one idea and is imported by itself: `mesh`, `collectives`, `collective_matmul`,
`census`. Everything runs on emulated devices (`jax_num_cpu_devices=8`) as it does on real ones.
"""
