"""Which file a GPU gets, and that nothing damaged or foreign ever reaches the driver: the next step is.

The simulated driver judges machine code by its own ELF header, so a wrong choice is refused as a real GPU would.
"""

import json

import pytest

NAME = "near_field_fa2"


def images_seen(fake):
    """What was given to the driver: architecture numbers of machine code, "ptx"."""
    from fake_driver import architecture

    return [architecture(image) if image.startswith(b"\x7fELF") else "ptx" for image in fake.images.values()]


@pytest.mark.parametrize(
    ("capability", "file"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "PTX compute_80"),  # Orin: machine code of desktop GPUs is not promised to run there
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 1), "PTX compute_80"),  # Thor
        ((10, 3), "sm_100"),
        ((11, 0), "PTX compute_80"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((13, 0), "PTX compute_80"),  # not known to this version
    ],
)
def test_each_gpu_gets_its_file(simulate, driver, prebuilt, capability, file):
    fake = simulate(capability, version=13000)
    module = driver.load(NAME, 0)
    assert module.origin == f"prebuilt {file}"
    assert images_seen(fake) == ["ptx" if "PTX" in file else int(file[3:])]
    built = next(iter(fake.images.values()))
    path = prebuilt / (f"{NAME}.ptx" if "PTX" in file else f"{NAME}.{file}.cubin")
    assert built == path.read_bytes()
    entry = next(e for e in json.loads((prebuilt / "manifest.json").read_text())["files"] if e["file"] == path.name)
    assert set(module.kernels) == set(entry["kernels"]) == {name for _, name in fake.functions.values()}
    assert module.reasons == (
        () if "sm" in file else ("no prebuilt machine code is for compute capability {}.{}".format(*capability),)
    )


def test_an_older_gpu_gets_none(simulate, driver):
    fake = simulate((7, 5))
    with pytest.raises(driver.NoImage, match=r"no prebuilt machine code is for compute capability 7\.5"):
        driver.load(NAME, 0)
    assert not fake.images


def test_architecture_specific_code_runs_on_that_one_alone():
    from svg2_pack.cuda.images import Image, fits

    def runs(kind, arch):
        image = Image(None, "x", kind, arch, "", (12, 8))
        return [c for c in [(8, 0), (8, 9), (9, 0), (9, 1), (10, 0), (12, 0), (12, 1)] if fits(image, c)]

    assert runs("sass", "90a") == runs("ptx", "90a") == [(9, 0)]
    assert runs("sass", "90") == [(9, 0), (9, 1)]
    assert runs("ptx", "90") == [(9, 0), (9, 1), (10, 0), (12, 0), (12, 1)]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)])
def test_the_kernels_for_hopper_load_nowhere_else(simulate, driver, capability):
    """Not even later: the driver is never offered the file, and no compiler the source."""
    fake = simulate(capability, version=13000)
    if capability == (9, 0):
        module = driver.load("near_field_fa3", 0)
        assert module.origin == "prebuilt sm_90a" and module.reasons == ()
        assert set(module.kernels) == {f"svg2_near_field_{t}_{d}" for t in ("bf16", "fp16") for d in (64, 128)}
    else:
        reason = driver.why_not("near_field_fa3", 0)
        assert "no prebuilt machine code is for compute capability {}.{}".format(*capability) in reason
        assert not fake.images


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_a_foreign_one(path):
    path.write_bytes((path.parent / f"{NAME}.sm_80.cubin").read_bytes())


SPOILT = {
    "one flipped bit": flip,
    "truncated": truncate,
    "foreign": replace_by_a_foreign_one,
    "deleted": lambda p: p.unlink(),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_file_is_never_loaded(simulate, driver, prebuilt, how):
    fake = simulate((8, 9))
    SPOILT[how](prebuilt / f"{NAME}.sm_89.cubin")
    module = driver.load(NAME, 0)
    assert images_seen(fake) == [86] and module.origin == "prebuilt sm_86"
    (reason,) = module.reasons
    assert reason.startswith(f"prebuilt sm_89: {NAME}.sm_89.cubin ")
    assert ("cannot be read" if how == "deleted" else "is damaged or foreign") in reason


@pytest.mark.parametrize("how", SPOILT)
def test_with_every_file_spoilt_nothing_is_loaded(simulate, driver, prebuilt, how):
    fake = simulate((12, 0))
    for path in sorted(prebuilt.glob(f"{NAME}*")):
        SPOILT[how](path) if path.name != f"{NAME}.sm_80.cubin" or how != "foreign" else flip(path)
    with pytest.raises(driver.NoImage) as caught:
        driver.load(NAME, 0)
    assert not fake.images and "cuModuleLoadDataEx" not in fake.names()
    assert [reason.split(":")[0] for reason in caught.value.reasons] == [
        "prebuilt sm_120", "prebuilt PTX compute_80", "compiled here by torch's NVRTC",
    ]  # fmt: skip


def test_a_failure_is_remembered_until_forgotten(simulate, driver, prebuilt):
    fake = simulate((12, 0))
    moved = prebuilt.rename(prebuilt.with_name("elsewhere"))
    for _ in range(2):
        with pytest.raises(driver.NoImage, match=r"manifest\.json, is missing"):
            driver.load(NAME, 0)
    assert fake.names().count("cuDriverGetVersion") == 1
    moved.rename(prebuilt)
    assert "is missing" in driver.why_not(NAME, 0)
    driver.forget()
    assert driver.why_not(NAME, 0) is None


def edit_manifest(prebuilt, change):
    path = prebuilt / "manifest.json"
    content = json.loads(path.read_text())
    change(content["files"], next(e for e in content["files"] if e["file"] == f"{NAME}.sm_89.cubin"))
    path.write_text(json.dumps(content))


def test_a_file_that_the_manifest_does_not_list_is_not_loaded(simulate, driver, prebuilt):
    fake = simulate((8, 9))
    edit_manifest(prebuilt, lambda entries, entry: entries.remove(entry))
    assert driver.load(NAME, 0).origin == "prebuilt sm_86" and images_seen(fake) == [86]


def test_machine_code_comes_before_ptx_of_the_same_capability(simulate, driver, prebuilt):
    edit_manifest(prebuilt, lambda entries, entry: entries.reverse())
    simulate((8, 0))
    assert driver.load(NAME, 0).origin == "prebuilt sm_80"


@pytest.mark.parametrize("key", ["file", "name", "kind", "arch", "sha256", "toolkit"])
@pytest.mark.parametrize("value", [None, 7, "../../somewhere.cubin", "missing"])
def test_a_damaged_manifest_loads_nothing(simulate, driver, prebuilt, key, value):
    """Every value that decides what is loaded is checked; only a name that nobody asks for is no damage."""
    fake = simulate((8, 9))
    edit_manifest(prebuilt, lambda entries, entry: entry.pop(key) if value == "missing" else entry.update({key: value}))
    if key == "name" and value != "missing":
        assert driver.load(NAME, 0).origin == "prebuilt sm_86"
        return
    with pytest.raises(driver.NoImage, match=r"manifest\.json, is damaged"):
        driver.load(NAME, 0)
    assert not fake.images


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"files": [3]}', "\0\1", '{"files": [{}]}'])
def test_a_manifest_that_is_none(simulate, driver, prebuilt, text):
    simulate((8, 9))
    (prebuilt / "manifest.json").write_text(text)
    assert "manifest.json, is damaged" in driver.why_not(NAME, 0)


def test_line_ends_that_git_changed_do_no_harm(simulate, driver, prebuilt):
    path = prebuilt / f"{NAME}.ptx"
    original = path.read_bytes()
    path.write_bytes(original.replace(b"\n", b"\r\n"))
    fake = simulate((13, 0))
    assert driver.load(NAME, 0).origin == "prebuilt PTX compute_80"
    assert list(fake.images.values()) == [original]


def test_a_driver_older_than_the_toolkits_major_version(simulate, driver):
    fake = simulate((8, 6), version=11040)
    reason = driver.why_not(NAME, 0)
    assert "prebuilt sm_86 needs an NVIDIA driver that knows CUDA 12.0, this one knows 11.4" in reason
    assert not fake.images


def test_a_driver_of_the_same_major_version_takes_machine_code_but_not_ptx(simulate, driver):
    fake = simulate((8, 6), (8, 7), version=12000)
    assert driver.load(NAME, 0).origin == "prebuilt sm_86"
    assert "PTX compute_80 needs an NVIDIA driver that knows CUDA 12.8, this one knows 12.0" in driver.why_not(NAME, 1)
    assert images_seen(fake) == [86]


@pytest.mark.parametrize(("code", "words"), [(200, "INVALID_IMAGE"), (209, "NO_BINARY_FOR_GPU"), (222, "PTX_VERSION")])
def test_a_driver_that_refuses_a_file(simulate, driver, code, words):
    """Whatever its version says: every file is offered, and each refusal is on record."""
    simulate((12, 0), fail={"cuModuleLoadDataEx": code})
    with pytest.raises(driver.NoImage) as caught:
        driver.load(NAME, 0)
    sass, ptx, _ = caught.value.reasons
    assert sass.startswith("prebuilt sm_120: ") and ptx.startswith("prebuilt PTX compute_80: ")
    assert words in sass and words in ptx and ("newer NVIDIA driver" in ptx or "update it" in ptx)


def test_the_drivers_compiler_is_quoted(simulate, driver, prebuilt, monkeypatch):
    """A driver whose PTX compiler is older than it says (a compatibility package can make that)."""
    from svg2_pack.cuda import images

    monkeypatch.setattr(images, "driver_needed", lambda image: (0, 0))
    simulate((13, 0), version=12040)
    reason = driver.why_not(NAME, 0)
    assert "(ptxas fatal: Unsupported .version 8.7)" in reason and "too old for this file: update it" in reason


def test_a_wrong_choice_would_be_refused(simulate, driver, prebuilt, monkeypatch):
    """The simulated driver does judge: with everything declared fitting, only the right file gets through."""
    from svg2_pack.cuda import images

    monkeypatch.setattr(images, "fits", lambda image, capability: True)
    fake = simulate((8, 6))
    assert driver.load(NAME, 0).origin == "prebuilt sm_86" and images_seen(fake) == [86]
    assert fake.names().count("cuModuleLoadDataEx") == 5  # 120, 100, 90, 89 were refused first


def test_names_and_devices_that_do_not_exist(simulate, driver):
    import torch

    simulate((8, 0))
    with pytest.raises(ValueError, match="not on cpu"):
        driver.load(NAME, torch.device("cpu"))
    with pytest.raises(ValueError, match="no kernel source is called 'unknown'"):
        driver.load("unknown", 0)
    with pytest.raises(KeyError):
        driver.load(NAME, 0).kernel("unknown")
