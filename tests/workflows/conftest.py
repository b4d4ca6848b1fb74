"""The real host in this process, with a placeholder for each model file and video that the workflows load."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parents[1] / "scripts")]  # the helpers beside the tests; the builder and the converter

from hosts_queue import Queue, serving  # noqa: E402
from shipped import BUILT, ROOT, editor  # noqa: E402


@pytest.fixture(scope="session")
def loaded(host):
    """All of the host's nodes, and ours."""
    from workflows.host_nodes import load

    with serving():
        load()


@pytest.fixture(scope="module")
def queue(loaded, host_base):
    """A Queue that has an empty file in the place of each model, and a small Wan model that runs."""
    import comfy.utils
    import folder_paths
    import tiny_wan
    from workflows.host_nodes import object_info

    base = host_base
    (base / "input/example.png").write_bytes((ROOT / "scripts/demo_nodes/bunny.png").read_bytes())
    for video in [n["widgets_values"][0] for name in BUILT for n in editor(name)["nodes"] if n["type"] == "LoadVideo"]:
        (base / "input" / video).touch()

    known = {}
    models = [m for name in BUILT for node in editor(name)["nodes"] for m in node["properties"].get("models", [])]
    for directory in sorted({model["directory"] for model in models}):
        known[directory] = list(folder_paths.get_folder_paths(directory))
        (base / directory).mkdir()
        folder_paths.add_model_folder_path(directory, str(base / directory))
    for model in models:
        (base / model["directory"] / model["name"]).touch()
    weights = dict(tiny_wan.random_wan().model.diffusion_model.state_dict())
    for kind in ("high", "low"):  # two files: nodes that load the same one would be one node to the host
        comfy.utils.save_torch_file(weights, str(base / f"diffusion_models/tiny_wan_{kind}.safetensors"))

    with serving() as server:
        yield Queue(base, server, object_info())
    for directory, folders in known.items():
        folder_paths.folder_names_and_paths[directory][0][:] = folders
