"""The delta rule: the definition and the cases by which every implementation is tested and
timed."""
