"""Ten prompts in a row of one editor, changing size and preset: memory, messages and results are those of fresh runs."""

import asyncio
import json
import uuid

import aiohttp
import pytest
from workflow import to_prompt

RUNS = [(96, 17, "auto"), (128, 9, "turbo"), (96, 33, "quality"), (160, 9, "paper"), (96, 17, "auto"),
        (128, 17, "quality"), (96, 9, "turbo"), (96, 17, "balanced"), (128, 9, "turbo"), (96, 17, "auto")]  # fmt: skip


class Client:
    """A tab without a browser: queues prompts and keeps what the websocket says."""

    def __init__(self, server):
        self.server, self.id, self.messages = server, uuid.uuid4().hex, []

    async def run(self, prompt: dict) -> dict:
        """Run one prompt to its end; its entry in the history."""
        session, url = self.server.session, self.server.url
        async with session.ws_connect(f"{url}/ws?clientId={self.id}", max_msg_size=0) as socket:
            async with session.post(url + "/prompt", json={"prompt": prompt, "client_id": self.id}) as response:
                answer = await response.json()
                assert response.status == 200, answer
            while True:
                message = await socket.receive(timeout=300)
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                self.messages.append(event)
                assert event["type"] not in ("execution_error", "execution_interrupted"), event
                if event["type"] == "executing" and event["data"]["node"] is None:  # the history has it by then
                    break
        return (await self.server.get(f"/history/{answer['prompt_id']}"))[answer["prompt_id"]]

    async def latent(self, entry: dict) -> bytes:
        """The sampled latent that the prompt saved."""
        [file] = entry["outputs"]["save"]["latents"]
        async with self.server.session.get(self.server.url + "/view", params=file) as response:
            return await response.read()


@pytest.fixture
def prompt(demo, comfyui, loop):
    nodes = loop.run_until_complete(comfyui.get("/object_info"))

    def make(size: int, length: int, preset: str) -> dict:
        prompt = to_prompt(demo(width=size, height=size, length=length, preset=preset, steps=3), nodes)
        prompt = {name: node for name, node in prompt.items() if node["class_type"] not in ("CreateVideo", "SaveVideo", "SVG2DemoDecode")}
        [(sampler, node)] = [(name, node) for name, node in prompt.items() if node["class_type"] == "KSampler"]
        node["inputs"]["seed"] = 1
        prompt["save"] = {"class_type": "SaveLatent", "inputs": {"samples": [sampler, 0], "filename_prefix": "ten"}}
        return prompt

    return make


def tensor(latent: bytes):
    from safetensors.torch import load

    return load(latent)["latent_tensor"]


def resident(server) -> float:
    """MiB of memory that the server's process has in use."""
    import psutil

    return psutil.Process(server.process.pid).memory_info().rss / 2**20


def test_ten_runs_in_a_row(loop, comfyui, prompt):
    async def test():
        client, latents, memory = Client(comfyui), [], []
        for number, settings in enumerate(RUNS):
            graph = prompt(*settings)
            graph["3"]["inputs"]["kmeans_iters"] = 2 + number  # the same size and preset twice: not from the host's cache
            client.messages.clear()
            entry = await client.run(graph)
            latents.append((graph, tensor(await client.latent(entry))))
            told = [m["data"] for m in client.messages if m["type"] == "svg2.status"]
            assert [m["state"] for m in told] == ["sampling"] * 3 + ["done"], "one a step, one at the end"
            assert [m["step"] for m in told[:-1]] == [1, 2, 3] and told[-1]["sparse_steps"] > 0
            memory.append(resident(comfyui))
        # The largest video comes third and fourth: from then on nothing may pile up.
        assert max(memory[4:]) <= max(memory[:4]) + 64, memory
        for number in (2, 9):
            graph, latent = latents[number]
            async with comfyui.session.post(comfyui.url + "/free", json={"unload_models": True, "free_memory": True}) as answer:
                assert answer.status == 200
            await asyncio.sleep(2)  # the host frees between prompts
            again = await client.latent(await client.run(graph))
            assert (tensor(again) == latent).all(), f"run {number} again, on its own"

    loop.run_until_complete(test())
