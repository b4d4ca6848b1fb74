"""The workflows in the real host: built anew, validated as prompts, listed as templates, and run on a small model."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest
from shipped import BUILT, FOLDER, ROOT, api, declared_inputs, editor

pytestmark = pytest.mark.xdist_group("workflows")


def test_the_committed_files_are_what_the_builder_writes(queue, tmp_path):
    import build_workflows

    written = build_workflows.write(tmp_path, queue.info)
    expected = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in written}
    shipped = {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in FOLDER.rglob("*.json")}
    del shipped["demo_wan.json"], shipped["demo_wan_small.json"]
    assert shipped == expected, "run scripts/build_workflows.py"


def plain(prompt: dict) -> dict:
    """Without the titles that the editor adds for people."""
    return {i: {key: node[key] for key in ("class_type", "inputs")} for i, node in prompt.items()}


@pytest.mark.parametrize("name", BUILT)
def test_the_twin_is_the_graph(queue, name):
    """By the project's own converter, which knows nothing of the builder."""
    from workflow import to_prompt

    twin, converted = plain(api(name)), to_prompt(editor(name), queue.info)
    for number, node in twin.items():
        kinds = {key: kind for key, (kind, *_) in declared_inputs(queue.info[node["class_type"]]).items()}
        for key in [key for key in node["inputs"] if kinds[key] == "COMFY_DYNAMICCOMBO_V3"]:
            # The converter leaves these combos out, for the demo drops the nodes that have them.
            assert converted[number]["inputs"].pop(key, "auto") == node["inputs"].pop(key) == "auto"
    assert twin == converted


@pytest.mark.parametrize("name", BUILT)
def test_the_server_accepts_the_twin(queue, name):
    ok, error, _, complaints = queue.validate(api(name))
    assert ok and not error and not complaints


@pytest.mark.parametrize("name", BUILT)
def test_the_demo_can_run_it(queue, name):
    """`scripts/demo.py --workflow FILE` samples it dense and sparse, and takes the frames from behind its outputs."""
    from workflow import frame_rate, prepare, to_prompt

    prompt = to_prompt(editor(name), queue.info)
    prepared = prepare(prompt, queue.info, enabled=False, name="dense")
    frames = prepared["svg2_demo_save"]["inputs"]["images"][0]
    assert prompt[frames]["class_type"].startswith("VAEDecode")
    assert frame_rate(prompt) in (16.0, 24.0, 25.0)


def test_the_template_browser_lists_the_graphs_and_not_their_twins(host, monkeypatch, tmp_path):
    """The host's own routes, with the pack installed in a folder of some name."""
    import folder_paths
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer
    from app.custom_node_manager import CustomNodeManager

    (tmp_path / "any_name").symlink_to(ROOT, target_is_directory=True)
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda kind: [str(tmp_path)])

    async def ask():
        app, routes = web.Application(), web.RouteTableDef()
        CustomNodeManager().add_routes(routes, app, [("any_name", str(tmp_path / "any_name"))])
        app.add_routes(routes)
        async with TestClient(TestServer(app)) as client:
            listed = await (await client.get("/workflow_templates")).json()
            pictures = [await client.get(f"/api/workflow_templates/any_name/{name}.jpg") for name in BUILT]
            return listed, [picture.status for picture in pictures]

    listed, statuses = asyncio.run(ask())
    assert sorted(listed["any_name"]) == sorted([*BUILT, "demo_wan", "demo_wan_small"])
    assert set(statuses) == {200}


def small(name: str, steps: int, **svg2) -> dict:
    """A workflow as it is shipped, but for its model, text encoder and decoder, which are the demo's, and its size.

    Its frames go into `framesNODE.npy`, NODE being the decoder, in place of the video.
    """
    prompt = plain(api(name))
    text = {"class_type": "SVG2DemoConditioning", "inputs": {"prompt": "bunny", "width": 96, "height": 96, "length": 9}}
    replaced = {}  # (node, slot) of the shipped graph -> (node, slot) here
    for number, node in list(prompt.items()):
        match node:
            case {"class_type": "UNETLoader", "inputs": inputs}:
                inputs["unet_name"] = f"tiny_wan_{'low' if 'low' in inputs['unet_name'] else 'high'}.safetensors"
            case {"class_type": "LoraLoaderModelOnly", "inputs": {"model": model}}:
                replaced[number, 0] = model
                del prompt[number]
            case {"class_type": "CLIPLoader" | "VAELoader" | "CreateVideo" | "SaveVideo"}:
                del prompt[number]
            case {"class_type": "CLIPTextEncode", "inputs": {"text": written}}:
                replaced[number, 0] = ["text", 0 if written.isascii() else 1]
                del prompt[number]
            case {"class_type": "EmptyHunyuanLatentVideo"}:
                replaced[number, 0] = ["text", 2]
                del prompt[number]
            case {"class_type": "VAEDecode", "inputs": inputs}:
                node["class_type"] = "SVG2DemoDecode"
                del inputs["vae"]
                saved = {"images": [number, 0], "name": f"frames{number}"}
                prompt[f"save{number}"] = {"class_type": "SVG2DemoSave", "inputs": saved}
            case {"class_type": "KSampler", "inputs": inputs}:
                inputs["steps"] = steps
            case {"class_type": "SVG2SparseAttention", "inputs": inputs}:
                inputs.update(min_tokens=0, **svg2)  # the test's video is short
    for node in prompt.values():
        for key, value in node["inputs"].items():
            while isinstance(value, list) and (value[0], value[1]) in replaced:
                value = replaced[value[0], value[1]]
            node["inputs"][key] = value
    return {**prompt, "text": text}


def find(prompt: dict, kind: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(id=i, inputs=node["inputs"]) for i, node in prompt.items() if node["class_type"] == kind]


def frames(queue, decoder: str) -> np.ndarray:
    return np.load(queue.output / f"frames{decoder}.npy")


def steps_of(queue, shown: dict) -> list[bool]:
    """Per step whether it ran sparse, from the file that a report node offers for download."""
    [file] = shown["svg2_json"]
    report = json.loads((queue.base / file["type"] / file["subfolder"] / file["filename"]).read_text(encoding="utf-8"))
    return [step["sparse"] for step in report["steps"]]


def test_a_against_b_runs(queue):
    """From the same noise, once dense and once sparse; Compare gets the first as its reference."""
    prompt = small("compare_dense_and_svg2", steps=4, top_p=0.3)
    [compare], [report] = find(prompt, "SVG2Compare"), find(prompt, "SVG2Report")
    dense, sparse = compare.inputs["reference"][0], compare.inputs["candidate"][0]
    shown = queue.show(prompt)
    a, b = frames(queue, dense), frames(queue, sparse)
    assert np.abs(a - b).max() > 1e-3
    psnr = 10 * np.log10(1 / np.mean((a - b) ** 2))
    assert shown[compare.id]["images"] and f"{psnr:.1f}" in "".join(shown[compare.id]["text"])
    assert shown[report.id]["images"] and "density" in "".join(shown[report.id]["text"])
    assert steps_of(queue, shown[report.id]) == [True] * 4

    queue.show(small("compare_dense_and_svg2", steps=4, enabled=False))
    assert np.array_equal(a, frames(queue, dense))
    assert np.array_equal(a, frames(queue, sparse)), (
        "switched off, both branches give the same video: one seed for both"
    )


def test_two_experts_run_as_their_notes_say(queue):
    """All steps are sparse; with warm-up, the first of the stage that begins is dense. The two reports are of the two samplers."""
    for warmup, begins in ((-1, [True, True]), (1, [False, True])):
        prompt = small("wan2.2_t2v_14B_4steps", steps=4, warmup_steps=warmup)
        shown = queue.show(prompt)
        first, second = (node.id for node in find(prompt, "SVG2Report"))
        assert steps_of(queue, shown[first]) == begins
        assert steps_of(queue, shown[second]) == [True, True]
