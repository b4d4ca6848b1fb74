"""The host's queue in this process: its own validation, execution and caching of prompts."""

import asyncio
import contextlib
import copy
import json
from pathlib import Path

import torch


@contextlib.contextmanager
def serving():
    """The host's server, which some nodes ask for as they are loaded. Nobody connects to it."""
    from server import PromptServer

    loop = asyncio.new_event_loop()
    yield PromptServer(loop)
    loop.close()
    del PromptServer.instance


class Queue:
    """The host's executor; all that it writes is under `base`. info: the host's own description of its nodes."""

    def __init__(self, base: Path, server, info: dict | None = None):
        self.base, self.output, self.server, self.info = base, base / "output", server, info
        self.forget()

    def forget(self):
        """As after the host's restart: nothing is cached."""
        import execution

        none = {"lru": 0, "ram": 0, "ram_inactive": 0}
        self.executor = execution.PromptExecutor(self.server, execution.CacheType.CLASSIC, none)

    def validate(self, prompt: dict) -> tuple:
        import execution

        return asyncio.run(execution.validate_prompt("test", prompt, None))

    def run(self, prompt: dict, outputs: list | None = None) -> set[str]:
        """-> the nodes that were executed, all others being cached."""
        prompt = copy.deepcopy(prompt)
        if outputs is None:
            ok, error, outputs, complaints = self.validate(prompt)
            assert ok and not complaints, (error, complaints)
        self.executor.execute(prompt, "test", {}, outputs)
        self.events = dict(self.executor.status_messages)
        return set(prompt) - set(self.events["execution_cached"]["nodes"])

    def show(self, prompt: dict) -> dict:
        """Execute a whole prompt anew. -> what its nodes show, by node id"""
        self.forget()
        self.run(prompt)
        assert self.executor.success, self.executor.status_messages[-1]
        return self.executor.history_result["outputs"]

    def sample(self, name: str = "") -> torch.Tensor:
        from safetensors.torch import load_file

        return load_file(sorted(self.output.glob(f"{name}sample_*.latent"))[-1])["latent_tensor"]

    def report(self, name: str = "") -> dict:
        [report] = json.loads((self.output / f"{name}report.json").read_text())["reports"]
        return report
