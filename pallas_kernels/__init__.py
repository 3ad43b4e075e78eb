"""Kernels of jaxmix, one folder an op. Knows jax and nothing else of the project, so it can be
copied out and works."""
