"""Draws splat.png from the example in splat.md: ``python docs/splat.py`` (needs matplotlib)."""

import pathlib
import re

import matplotlib.pyplot as plt

here = pathlib.Path(__file__).parent
names = {}
for block in re.findall(r"^```python\n(.*?)^```", (here / "splat.md").read_text(), re.MULTILINE | re.DOTALL)[:2]:
    exec(block, names)

photo, degrees = names["photo"], names["degrees_apart"]
fig, axes = plt.subplots(1, 4, figsize=(11, 2.4), layout="constrained")
axes[0].imshow(photo.image)
axes[0].set(title="image")
depth = axes[1].imshow(photo.depth / photo.alpha, cmap="viridis")
axes[1].set(title="depth / alpha")
fig.colorbar(depth, ax=axes[1], fraction=0.04)
for ax, when in ((axes[2], "wrong"), (axes[3], "found")):
    image = names["photograph"](names["gaussians"], names[when], names["K"]).image
    ax.imshow(abs(image - photo.image).clip(0, 1))
    ax.set(title=f"camera off by {degrees(names[when], names['viewmat']):.2f}°")
for ax in axes:
    ax.set(xticks=(), yticks=())
fig.savefig(here / "splat.png", dpi=110)
