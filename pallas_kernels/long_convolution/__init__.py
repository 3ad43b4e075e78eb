"""Depthwise convolution with filters as long as the row: the definition by which every
implementation is tested."""
