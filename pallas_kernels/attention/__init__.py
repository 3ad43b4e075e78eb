"""Softmax attention: the definition, and JAX's own TPU kernel behind the signature of this
project."""
