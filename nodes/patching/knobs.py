"""The knobs of sparse attention: the values that mean auto, and the settings that a preset and the others come to."""

from dataclasses import replace

from ...svg2_core.config import SVG2Config
from ...svg2_core.presets import preset_config

# By input of the node; a knob without a value for auto is None here.
AUTO = {
    "density": 0,
    "q_clusters": 0,
    "k_clusters": 0,
    "top_p": 0,
    "warmup_steps": -1,
    "min_k_ratio": -1,
    "kmeans_init_iters": 0,
    "kmeans_iters": 0,
    "end_percent": None,
    "dense_blocks": "auto",
    "min_tokens": -1,
    "compensation": "auto",
}


def resolve(family: str, preset: str, density: float = 0.0, top_p: float = 0.0, **knobs) -> SVG2Config:
    """The settings of a preset for a model family, less the knobs that are not at auto.

    Raises ValueError naming the input and what it accepts, where a value is out of range or density and top_p are both set.
    """
    if density and top_p:
        raise ValueError(
            f"density and top_p are two rules for the same choice, and both are set, to {density:g} and {top_p:g}: leave one at 0 (auto)"
        )
    base = preset_config(preset, family)
    if top_p:
        base = replace(base, density=None)  # pairs are chosen by mass
    knobs = {"density": density, "top_p": top_p, **knobs}
    if "dense_blocks" in knobs:
        knobs["dense_blocks"] = knobs["dense_blocks"].strip()
    return replace(base, **{name: value for name, value in knobs.items() if value != AUTO[name]})
