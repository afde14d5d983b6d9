"""Draws hash_grid.png from the example in hash_grid.md: ``python docs/hash_grid.py`` (needs matplotlib)."""

import pathlib
import re

import matplotlib.pyplot as plt

here = pathlib.Path(__file__).parent
names = {}
for block in re.findall(r"^```python\n(.*?)^```", (here / "hash_grid.md").read_text(), re.MULTILINE | re.DOTALL)[:2]:
    exec(block, names)

fig, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained", width_ratios=(1, 1, 2))
pixels, line, error = names["pixels"], names["line"], names["errors"]["smoothstep"]
for ax, title, values in (
    (axes[0], "image", names["image"](pixels)),
    (axes[1], f"fit, smoothstep: {-10 * names['jnp'].log10(error):.1f} dB", names["fits"]["smoothstep"](pixels)),
):
    ax.imshow(values.reshape(128, 128), cmap="gray", vmin=0, vmax=1, extent=(0, 1, 0, 1), origin="lower")
    ax.plot(line[:, 0], line[:, 1], color="#cc0000", linewidth=1.5)
    ax.set(title=title, xticks=(0, 1), yticks=(0, 1))
for name, color in (("linear", "#999999"), ("smoothstep", "#3465a4")):
    axes[2].plot(line[:, 0], names["slopes"][name], color=color, linewidth=1.2, label=name)
axes[2].set(title="slope of each fit along the red line", xlabel="x", xlim=(line[0, 0], line[-1, 0]))
axes[2].spines[["top", "right"]].set_visible(False)
axes[2].legend(frameon=False, title="interpolation")
fig.savefig(here / "hash_grid.png", dpi=110)
