"""Causal linear attention: the definition and the cases by which every implementation is tested and
timed."""
