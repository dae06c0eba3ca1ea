"""Data sets and the on-device task sampler; import the modules by name."""
