# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Own data in ten lines
#
# [![Open in Colab][badge]](https://colab.research.google.com/)
#
# From a folder of images to a few-shot classifier of classes that it has never seen. The same from
# the command line: `python -m experiments.folder --data-dir FOLDER`.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg

# %% tags=["remove-cell"]
# Where imaml_jax is missing, pip install it: from the clone around this notebook or, in Colab, from
# an archive of the clone uploaded beside it (git archive --output imaml_jax.zip HEAD).
import importlib.util
from pathlib import Path

from IPython import get_ipython

if importlib.util.find_spec("imaml_jax") is None:
    source = ".." if Path("../setup.cfg").exists() else "imaml_jax.zip"
    get_ipython().run_line_magic("pip", f"install --quiet {source}")

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from imaml_jax import Batch, protocols
from imaml_jax.data import class_splits, episodes, glyphs, images, own
from imaml_jax.protocols import model_file
from imaml_jax.training import train
from imaml_jax.training.evaluation import make_evaluate

# %% [markdown]
# ## The folder
#
# One folder for each class, with its images in it: `images/<class>/<any name>.png`, or JPEG, WebP,
# BMP, GIF; grey or colour, of any size. **Put the path of your own here.** As a stand-in, this cell
# writes 120 classes of 8 characters each, rendered from fonts that matplotlib ships, which takes
# some seconds the first time. The characters are dark on a light ground, as on paper.

# %%
folder = Path(tempfile.mkdtemp()) / "images"
drawings = glyphs.load().train
for label in range(120):
    (folder / f"class {label:03}").mkdir(parents=True)
    for i in range(8):
        pixels = np.asarray(drawings.images[20 * label + i, ..., 0])
        Image.fromarray(pixels).resize((60, 50)).save(folder / f"class {label:03}" / f"{i}.jpg")
print(len(list(folder.glob("*/*.jpg"))), "images in", len(list(folder.iterdir())), "classes")

# %% [markdown]
# ## Ten lines
#
# Classes are split, not images: 95 to learn from, 25 that the model does not see until the test. A
# task has 5 classes (`ways`), 1 example of each (`shots`) and 5 more of each to be recognised
# (`queries`); so every class needs 6 images. First-order MAML is the quickest algorithm to train,
# and half of the usual 64 filters are enough here; `"imaml"` reaches more in the same number of
# steps. For photographs set `channels=3`, a larger `image_size`, leave `invert=True` out, and take
# 1000 steps or more on a GPU.

# %%
split = class_splits.seeded_split(own.open_folder(folder).classes, counts=(95, 0, 25))
data = own.load_folder(folder, split=split, image_size=28, channels=1)
shape = dict(num_tasks=8, ways=5, shots=1, queries=5, invert=True)
protocol = protocols.get("common", algorithm="fomaml", ways=5, shots=1)
protocol = protocol.with_settings({"filters": 32, "meta_steps": 200})
learner = protocol.build(ways=5)
result = train(
    learner,
    protocol.build_outer(),
    lambda key: episodes.sample_tasks(key, data.train, **shape),
    key=jax.random.key(0),
    num_steps=200,
    log_every=20,
    example_inputs=jnp.zeros((1, 28, 28, 1)),
    progress=False,
)
score = make_evaluate(
    learner, lambda key: episodes.sample_tasks(key, data.test, **shape), num_tasks=100
)
test = score(result.meta_params, jax.random.key(1))
print(f"accuracy on unseen classes {test.mean:.1%} ± {test.ci95:.1%} (95% CI over 100 tasks)")

# %% [markdown]
# Guessing would give 20%. The curve tells whether more steps would help: the accuracy here is that
# on training tasks, so that a gap to the accuracy above means too few classes to learn from.

# %%
steps = [row["step"] for row in result.history]
plt.figure(figsize=(5, 2.8), layout="constrained")
plt.plot(steps, [row["query_accuracy"] for row in result.history])
_ = plt.gca().set(xlabel="meta-step", ylabel="query accuracy", title="learning curve")

# %% [markdown]
# ## Keep it
#
# A saved model is a folder with the weights in float16 and a JSON file that says what they are and
# what was measured. Loading one runs nothing that is in it. The accuracies to be stated are those
# of the weights as stored, and those with `independent` batch statistics, where the prediction for
# an image does not depend on what other images it is asked for with.

# %%
stored = model_file.rounded(result.meta_params)
alone = model_file.independent(protocol).build(ways=5)
score_alone = make_evaluate(
    alone, lambda key: episodes.sample_tasks(key, data.test, **shape), num_tasks=100
)
as_stored = score(stored, jax.random.key(1))
by_itself = score_alone(stored, jax.random.key(1))
description = model_file.Description(
    dataset="my images",
    ways=5,
    shots=1,
    image_size=28,
    channels=1,
    brightness=1 - float(np.mean(data.train.images)) / 255,
    protocol=protocol,
    test_tasks=100,
    test_accuracy=as_stored.mean,
    test_ci95=as_stored.ci95,
    test_accuracy_unrounded=test.mean,
    test_accuracy_alone=by_itself.mean,
    test_ci95_alone=by_itself.ci95,
    run={"seed": 0, "meta_steps": 200},
)
model_file.save_model(folder.parent / "model", stored, description)
print(f"rounding to float16: {test.mean:.2%} before, {as_stored.mean:.2%} after")
print(f"each query image by itself: {by_itself.mean:.1%} ± {by_itself.ci95:.1%}")
print({path.name: path.stat().st_size for path in (folder.parent / "model").iterdir()}, "bytes")

# %% [markdown]
# ## Use it on new classes
#
# `python -m experiments.classify --model MODEL --support FOLDER --query FOLDER` does this for
# folders of images and writes a table and a picture. In Python: read one example of each of five
# test classes, adapt, and ask for other images of them.

# %%
_, meta_params, description = model_file.load_model(folder.parent / "model")
new = [name for name, part in split.items() if part == "test"][:5]


def read(paths):
    """Images as the model wants them: `[n, 28, 28, 1]` in [0, 1], ink 1 and paper 0."""
    sources = [images.Source(path.name, path.read_bytes) for path in paths]
    size, channels = description.image_size, description.channels
    return 1 - np.stack([images.decode(s, size, channels) for s in sources]) / np.float32(255)


support = Batch(jnp.array(read([folder / name / "0.jpg" for name in new])), jnp.arange(5))
query = read([folder / name / f"{i}.jpg" for name in new for i in range(1, 5)])
adapted, _ = jax.jit(alone.adapt)(meta_params, support, jax.random.key(0))
probabilities = jax.nn.softmax(jax.jit(alone.predict)(adapted, jnp.array(query)))
predicted = probabilities.argmax(-1)
print(f"{(predicted == np.repeat(np.arange(5), 4)).mean():.0%} of {len(query)} recognised")

figure, grid = plt.subplots(5, 5, figsize=(6, 6.6), layout="constrained")
for label in range(5):
    grid[label, 0].imshow(support.inputs[label, ..., 0], cmap="gray_r")
    grid[label, 0].set_title(f"example of {label}", fontsize=8)
    for column in range(1, 5):
        i = 4 * label + column - 1
        grid[label, column].imshow(query[i, ..., 0], cmap="gray_r")
        grid[label, column].set_title(f"{predicted[i]} ({probabilities[i].max():.0%})", fontsize=8)
for axes in grid.ravel():
    axes.set(xticks=[], yticks=[])
