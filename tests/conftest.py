"""Shared by all tests: the pack loaded as ComfyUI loads it, the real host, and poisoned uninitialised memory."""

import importlib.util
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; subprocesses must count alike to be bit-equal
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


def _adapt_interpreter():
    """Triton's interpreter, one launch at a time (its place in the grid is a global), and less of its time in vain: half
    goes into patching triton.language anew at every call of a helper, a quarter of the rest into checks nobody reads, and
    half of what is then left into making the same few types again (`_remember_types`)."""
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    patched, launching, launch = set(), threading.Lock(), interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        if self.fn not in patched:
            patched.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def run(self, *args, **kwargs):
        with launching:
            return launch(self, *args, **kwargs)

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, *scope):
        patch_tensor(tensor, *scope)  # whose older versions make an array of one element an index: no number to numpy 2.4
        (scope[0].set_attr if scope else setattr)(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch
    count = interpreter.InterpreterBuilder.create_histogram

    def histogram(self, *args):
        """In 32 bits, as it says; older versions store 64 over the neighbours."""
        found = count(self, *args)
        found.data = found.data.astype("int32")
        return found

    interpreter.InterpreterBuilder.create_histogram = histogram
    interpreter.InterpretedFunction.__call__ = call
    interpreter.GridExecutor.__call__ = run
    _remember_types(interpreter)


def _remember_types(interpreter):
    """Each type, and what a tensor knows from its type, is made once: they are never changed, and equal by their names."""
    from triton.language import core

    types, of_tensors, of_numpy = {}, {}, {}
    make_type, make_tensor, numpy_type = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype

    def block_type(self, element_ty, shape):
        key = element_ty.name, *map(int, shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = self.__dict__ | {"sides": key[1:]}
        self.__dict__ = types[key]

    def tensor(self, handle, type):
        if type.name not in of_tensors:
            make_tensor(self, None, type)
            of_tensors[type.name] = dict(self.__dict__)
        self.__dict__.update(of_tensors[type.name])
        self.handle = handle

    def handle(self, data, dtype, attr=None):
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr

    def np_dtype(type):
        if type.name not in of_numpy:
            of_numpy[type.name] = numpy_type(type)
        return of_numpy[type.name]

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    interpreter.TensorHandle.__init__, interpreter._get_np_dtype = handle, np_dtype
    if not hasattr(interpreter, "interpreter_semantic"):
        return  # the older versions, with which few tests run
    semantic, same = type(interpreter.interpreter_semantic), core.dtype.__eq__
    broadcast, checked, constant = semantic.broadcast_impl_value, semantic.binary_op_type_checking_impl, semantic.scalar_constant
    constants, plain, integers = {}, ("int1", "int32", "int64", "fp32"), ("int32", "int64")

    def broadcast_impl_value(self, lhs, rhs):
        of_lhs, of_rhs = (x.type.__dict__.get("sides", ()) for x in (lhs, rhs))
        if of_lhs == of_rhs:
            return lhs, rhs
        if len(of_lhs) != len(of_rhs) or any(a != b and 1 not in (a, b) for a, b in zip(of_lhs, of_rhs, strict=True)):
            return broadcast(self, lhs, rhs)
        shape = tuple(map(max, of_lhs, of_rhs))
        if of_lhs != shape:
            lhs = core.tensor(self.builder.create_broadcast(lhs.handle, shape), core.block_type(lhs.dtype, list(shape)))
        if of_rhs != shape:
            rhs = core.tensor(self.builder.create_broadcast(rhs.handle, shape), core.block_type(rhs.dtype, list(shape)))
        return lhs, rhs

    def binary_op_type_checking_impl(self, lhs, rhs, *args, **kwargs):
        if type(lhs) is type(rhs) is core.tensor:
            of_lhs, of_rhs = lhs.dtype.name, rhs.dtype.name
            moved = of_lhs.startswith("pointer") and of_rhs in integers and args[:1] == (True,)
            if moved or (of_lhs == of_rhs and of_rhs in plain):
                return broadcast_impl_value(self, lhs, rhs)
        return checked(self, lhs, rhs, *args, **kwargs)

    def scalar_constant(self, value, dtype):
        key = type(value), value, dtype and dtype.name
        if key not in constants:
            constants[key] = constant(self, value, dtype)
        return constants[key]

    def patch_attr(obj, name, member, builder, *scope):
        function = getattr(member, "__wrapped__", member)

        def call(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        (scope[0].set_attr if scope else setattr)(obj, name, call)

    semantic.broadcast_impl_value, semantic.binary_op_type_checking_impl = broadcast_impl_value, binary_op_type_checking_impl
    semantic.scalar_constant = scalar_constant
    core.dtype.__eq__ = lambda self, other: self is other or same(self, other)
    interpreter._patch_attr = patch_attr


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
if INTERPRETED:
    _adapt_interpreter()

ROOT = Path(__file__).resolve().parents[1]
ALIAS = "svg2_pack"


def _load(name: str, path: Path, **kwargs):
    spec = importlib.util.spec_from_file_location(name, path, **kwargs)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Helpers beside the tests (brute_force, tiny_models) are imported by their names, from any folder of tests.
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("kernels", "models", "nodes", "browser", "engines")]

# ComfyUI loads a pack by file location under a name nobody controls. So do the tests, all under this one.
_load(ALIAS, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])

if INTERPRETED and os.environ.get("SVG2_BACKEND") == "triton":
    # `SVG2_BACKEND=triton python scripts/test.py tests/nodes` runs the tests of the nodes with the Triton kernels. With as
    # many clusters and iterations as the presets choose, the interpreter would take hours.
    presets = importlib.import_module(f"{ALIAS}.svg2_core.presets")
    few = {"q_clusters_per_sqrt_token": 0.22, "tokens_per_k_cluster": 45, "kmeans_init_iters": 2, "kmeans_iters": 1}
    presets.preset_config = lambda *names, whole=presets.preset_config: replace(whole(*names), **few)


@pytest.fixture(scope="session")
def host():
    """The real ComfyUI, importable as `comfy` from here on; its folder."""
    script = _load("svg2_host_script", ROOT / "scripts" / "host.py")
    path = script.find()
    script.activate(path, cpu=not torch.cuda.is_available())
    return path


@pytest.fixture(scope="module")
def host_base(host, tmp_path_factory):
    """A folder below which the host, in this process, writes and reads all its own, while a module's tests run."""
    import folder_paths

    base = tmp_path_factory.mktemp("host")
    places = ("output", "temp", "input", "user")
    before = {place: getattr(folder_paths, f"get_{place}_directory")() for place in places}
    for place in places:
        (base / place).mkdir()
        getattr(folder_paths, f"set_{place}_directory")(str(base / place))
    yield base
    for place, folder in before.items():
        getattr(folder_paths, f"set_{place}_directory")(folder)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN (or the largest integer), and an operation without a deterministic form raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_xdist_auto_num_workers(config) -> int:
    """One more than there are cores: tests of the editor and of servers wait most of their time."""
    return (os.cpu_count() or 1) + 1


def pytest_terminal_summary(terminalreporter, config):
    """With `-m models`: the table of families, one row per variant, of the tests that passed and of those that did not."""
    if config.option.markexpr != "models":
        return
    rows = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in report.user_properties:
                if name == "models" and report.when == "call":
                    rows.setdefault(value["variant"], {"agrees": True}).update(value)
                    rows[value["variant"]]["agrees"] &= outcome == "passed"
    columns = ("variant", "tokens", "sparse", "dense", "density = 1", "top_p = 1", "calls, off", "calls, centroid",
               "calls, first_order", "agrees")  # fmt: skip
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows.values())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    terminalreporter.section("models: tokens of video, calls, relative errors")
    for row in cells:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.0e}"
    if isinstance(value, dict):
        return ", ".join(f"{reason} {count}" for reason, count in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return "" if value is None else str(value)
