"""Time and memory of one meta-step beside PyTorch libraries: `python -m experiments.benchmark`."""
