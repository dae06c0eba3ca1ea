"""Sources of tasks: a sampler that runs on the device, and one data set a file.

Imports `types` alone. Read `episodes.py` first: `sample_tasks` draws tasks from any data set here.
"""
