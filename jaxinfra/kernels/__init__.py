"""The command `jaxinfra kernels`: measures, tunes and explains what `pallas_kernels` has."""

BENCHES = {  # what `jaxinfra kernels bench` measures, and the module here that does
    "matmul": "matmul_bench", "attention": "attention_bench", "paged-attention": "paged_bench",
    "losses": "loss_bench", "grouped": "grouped_bench", "quantised": "quantised_bench",
    "decode-layer": "decode_layer_bench", "norm": "norm_bench", "rope": "rope_bench",
}  # fmt: skip
