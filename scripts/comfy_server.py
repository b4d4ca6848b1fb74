"""A ComfyUI server of the demo's own: started without a browser, spoken to over HTTP and websocket, always stopped."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import aiohttp
from host import ROOT, SetupError

READY_WITHIN = 300  # seconds
SILENT_FOR = 3600  # seconds without a word from the server
DEMO_NODES = ROOT / "scripts/demo_nodes"


class Server:
    """`async with Server(comfyui, base, log, cpu) as server`: ComfyUI at `comfyui`, keeping all it writes under `base`.

    It sees the models and inputs of `comfyui`, this pack and the demo's nodes, but none of the other custom nodes there.
    Its environment is `environment`, or this process's.
    """

    def __init__(self, comfyui: Path, base: Path, log: Path, cpu: bool, environment: dict[str, str] | None = None):
        self.comfyui, self.base, self.log, self.cpu, self.environment = comfyui, base, log, cpu, environment
        self.output = base / "output"
        self.client = uuid.uuid4().hex

    async def __aenter__(self):
        self._lay_out()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(ROOT / "scripts/launch.py"), str(self.comfyui)]
        command += ["--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--base-directory", str(self.base), "--extra-model-paths-config", str(self.base / "paths.yaml")]
        command += ["--database-url", f"sqlite:///{self.base / 'comfyui.db'}"]
        if (self.comfyui / "input").is_dir():
            command += ["--input-directory", str(self.comfyui / "input")]
        if self.cpu:
            command.append("--cpu")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self.environment
            )
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_connect=10))
        try:
            await self._ready()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_):
        await self.session.close()
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _lay_out(self) -> None:
        custom_nodes = self.base / "custom_nodes"
        custom_nodes.mkdir(parents=True)
        self.output.mkdir()
        for name, source in (("svg2", ROOT), ("svg2_demo", DEMO_NODES)):
            try:
                os.symlink(source, custom_nodes / name, target_is_directory=True)
            except OSError:  # Windows without developer mode
                shutil.copytree(
                    source, custom_nodes / name, ignore=shutil.ignore_patterns(".*", "output", "scripts", "tests")
                )
        models = {folder.name: str(folder) for folder in (self.comfyui / "models").iterdir() if folder.is_dir()}
        config = {"theirs": models, "demo": {"diffusion_models": str(DEMO_NODES / "models")}}
        (self.base / "paths.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML

    def _failure(self, what: str) -> SetupError:
        tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        print("\n".join("  | " + line for line in tail), file=sys.stderr)
        return SetupError(f"{what}; the whole log is in {self.log}.")

    async def _ready(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < READY_WITHIN:
            if self.process.poll() is not None:
                raise self._failure("ComfyUI stopped while starting")
            try:
                self.devices = (await self.get("/system_stats"))["devices"]
                return
            except aiohttp.ClientError:
                await asyncio.sleep(0.3)
        raise self._failure(f"ComfyUI did not answer within {READY_WITHIN} s")

    async def get(self, path: str):
        async with self.session.get(self.url + path) as response:
            response.raise_for_status()
            return await response.json()

    async def run(self, prompt: dict, on_progress) -> "StepClock":
        """Run one prompt to its end, calling `on_progress(node's class, done, of)` as nodes report it."""
        try:
            return await self._run(prompt, on_progress)
        except aiohttp.ClientError:
            raise self._failure("ComfyUI stopped while running the workflow") from None
        except asyncio.TimeoutError:
            raise self._failure(f"ComfyUI has been silent for {SILENT_FOR} s") from None

    async def _run(self, prompt: dict, on_progress) -> "StepClock":
        clock = StepClock()
        async with self.session.ws_connect(f"{self.url}/ws?clientId={self.client}", max_msg_size=0) as socket:
            request = {"prompt": prompt, "client_id": self.client}
            async with self.session.post(self.url + "/prompt", json=request) as response:
                answer = await response.json()
            if response.status != 200:
                raise self._failure(f"ComfyUI refused the workflow: {_complaints(answer)}")
            while True:
                message = await socket.receive(timeout=SILENT_FOR)
                if message.type == aiohttp.WSMsgType.BINARY:  # a preview picture
                    continue
                if message.type != aiohttp.WSMsgType.TEXT:
                    raise self._failure("ComfyUI stopped while running the workflow")
                event = json.loads(message.data)
                data = event["data"]
                if data.get("prompt_id") != answer["prompt_id"]:
                    continue
                if event["type"] == "progress":
                    kind = prompt[data["node"]]["class_type"]
                    clock.progress(kind, data["node"], data["value"])
                    on_progress(kind, data["value"], data["max"])
                elif event["type"] == "executing":
                    clock.executing(prompt[data["node"]]["class_type"] if data["node"] in prompt else "")
                elif event["type"] == "execution_error":
                    raise self._failure(
                        f"The node {data['node_type']} failed: {' '.join(data['exception_message'].split())}"
                    )
                elif event["type"] == "execution_interrupted":
                    raise self._failure("The run was interrupted")
                elif event["type"] == "execution_success":
                    clock.moved_on()
                    return clock


class StepClock:
    """Seconds per sampling step, seen from outside, so that dense and sparse runs are timed the same way.

    Counts from the end of a sampler's first step (loading the model and first-use costs are before it) to the sampler's
    own end: a GPU may still be busy with steps whose progress has been reported, but not when the next node starts.
    `run` is all of it: seconds from a sampler's beginning to its end.
    """

    def __init__(self):
        self.seconds, self.steps, self._running = 0.0, 0, None
        self.run, self._sampling_since = 0.0, None

    def executing(self, kind: str) -> None:
        """A node of this class begins; none ("") after the last one."""
        self.moved_on()
        self._sampling_since = time.perf_counter() if "Sampler" in kind else None

    def progress(self, kind: str, node: str, value: int) -> None:
        if "Sampler" not in kind:
            return
        if self._running is None or self._running[0] != node:
            self._settle()
            self._running = (node, time.perf_counter(), value)
        self._last = value

    def moved_on(self) -> None:
        if self._sampling_since is not None:
            self.run += time.perf_counter() - self._sampling_since
            self._sampling_since = None
        self._settle()

    def _settle(self) -> None:
        if self._running:
            _, began, first = self._running
            self.seconds += time.perf_counter() - began
            self.steps += self._last - first
            self._running = None

    @property
    def seconds_per_step(self) -> float | None:
        return self.seconds / self.steps if self.steps else None


def _complaints(answer: dict) -> str:
    """What the server has against a prompt, in one line."""
    found = [
        f"{node['class_type']}: {error['message']} ({error['details']})"
        for node in (answer.get("node_errors") or {}).values()
        for error in node["errors"]
    ]
    return "; ".join(found) or answer["error"]["message"]
