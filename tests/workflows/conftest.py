"""The real host in this process, with a placeholder for each model file and video that the workflows load."""

import asyncio
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parents[1] / "scripts")]  # the helpers beside the tests; the builder and the converter

from shipped import BUILT, ROOT, editor  # noqa: E402


class Host:
    """The host's nodes, queue and folders; all it writes is under `base`."""

    def __init__(self, base: Path, info: dict, server):
        self.base, self.info, self.server = base, info, server

    def validate(self, prompt: dict) -> tuple:
        import execution

        return asyncio.run(execution.validate_prompt("test", prompt, None))

    def run(self, prompt: dict) -> dict:
        """Execute a whole prompt. -> what its nodes show, by node id"""
        import execution

        ok, error, outputs, complaints = self.validate(prompt)
        assert ok and not complaints, (error, complaints)
        none = {"lru": 0, "ram": 0, "ram_inactive": 0}
        executor = execution.PromptExecutor(self.server, execution.CacheType.CLASSIC, none)
        executor.execute(prompt, "test", {}, outputs)
        assert executor.success, executor.status_messages[-1]
        return executor.history_result["outputs"]


@pytest.fixture(scope="session")
def loaded(host):
    """All of the host's nodes, and ours."""
    from server import PromptServer
    from workflows.host_nodes import load

    loop = asyncio.new_event_loop()
    PromptServer(loop)  # some nodes ask for it as they are loaded
    load()
    loop.close()
    del PromptServer.instance


@pytest.fixture(scope="module")
def queue(loaded, host_base):
    """A Host that has an empty file in the place of each model, and a small Wan model that runs."""
    import comfy.utils
    import folder_paths
    import tiny_wan
    from server import PromptServer
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

    loop = asyncio.new_event_loop()
    server = PromptServer(loop)
    yield Host(base, object_info(), server)
    loop.close()
    del PromptServer.instance
    for directory, folders in known.items():
        folder_paths.folder_names_and_paths[directory][0][:] = folders
