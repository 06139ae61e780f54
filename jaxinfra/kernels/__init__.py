"""The command `jaxinfra kernels`: measures, tunes and explains what `pallas_kernels` has."""
