"""Grassmann mixing, normalised wedge products of tokens and earlier ones, projected: the definition
and the cases by which every implementation is tested and timed."""
