"""Draws distortion.png from the example in distortion.md: ``python docs/distortion.py`` (needs matplotlib)."""

import pathlib
import re

import matplotlib.pyplot as plt

here = pathlib.Path(__file__).parent
names = {}
exec(re.search(r"^```python\n(.*?)^```", (here / "distortion.md").read_text(), re.MULTILINE | re.DOTALL)[1], names)

fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
for ax, title, w in (
    (axes[0], "without distortion loss", names["without"]),
    (axes[1], "with 0.01 × distortion loss", names["with_loss"]),
):
    ax.bar(names["m"], w, width=names["interval"], color="#3465a4")
    ax.axvline(0.6, color="#cc0000", linewidth=1, linestyle="--", zorder=0)
    ax.set(title=f"{title}: largest weight {w.max():.2f}", xlabel="position m along the ray", xlim=(0, 1))
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("weight w")
axes[0].text(0.59, 0.9, "rendered depth", color="#cc0000", ha="right", transform=axes[0].transAxes)
fig.savefig(here / "distortion.png", dpi=110)
