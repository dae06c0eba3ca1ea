"""Sources of tasks: a sampler that runs on the device, and one file per data set.

Imports, of this package, `types` alone. Read `episodes.py` first: `sample_tasks` draws tasks from
any image data set; for a new one, copy `mini_imagenet.py`. `sinusoid.py` has its own sampler.
"""
