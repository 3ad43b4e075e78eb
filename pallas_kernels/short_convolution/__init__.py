"""Depthwise causal convolution over a few tokens: the definition and the cases by which every
implementation is tested and timed."""
