"""Depthwise convolution with filters as long as the row: the definition and the cases by which
every implementation is tested and timed."""
