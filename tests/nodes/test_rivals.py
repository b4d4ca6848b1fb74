"""Another sparse attention on the same model, which puts its override back on top at each step as ComfyUI's own does: the one added
last serves the video, the other is told of, and neither is ever put upon the other twice."""

import logging

import pytest
from tiny_wan import conditioning, latent, sample

KEY = "optimized_attention_override"
VIDEO = 32  # tokens


class Rival:
    """Serves calls of `serves` tokens itself (densely, and counts them), hands the others on."""

    def __init__(self, serves=VIDEO):
        self.serves, self.installed, self.served, self.passed = serves, set(), 0, 0

    def install(self, options):
        current = options.get(KEY)
        if current in self.installed:
            return

        def rival_override(func, q, k, v, heads, **kwargs):
            if q.shape[1] == k.shape[1] == self.serves:
                self.served += 1
                return func(q, k, v, heads, **kwargs)
            self.passed += 1
            return func(q, k, v, heads, **kwargs) if current is None else current(func, q, k, v, heads, **kwargs)

        self.installed.add(rival_override)
        options[KEY] = rival_override

    def __call__(self, model):
        from comfy.patcher_extension import CallbacksMP

        model = model.clone()
        self.install(model.model_options["transformer_options"])

        def back_on_top(patcher, timestep, model_options=None):
            if model_options is not None:  # hosts before 0.21 do not hand them out
                self.install(model_options["transformer_options"])

        model.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "rival", back_on_top)
        return model


def chain(override) -> list:
    """The overrides that a call comes by, each of which holds the next."""
    found = []
    while override is not None and len(found) < 1000:
        found.append(override)
        if hasattr(override, "previous"):
            override = override.previous
        else:
            cells = [cell.cell_contents for cell in override.__closure__ or ()]
            override = next((x for x in cells if callable(x) and not isinstance(x, Rival)), None)
    return found


def watched(model, depths):
    from comfy.patcher_extension import WrappersMP

    model = model.clone()

    def watch(executor, *args, **kwargs):
        options = next(x for x in [*args, *kwargs.values()] if isinstance(x, dict) and KEY in x)
        depths.append(len(chain(options[KEY])))
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", watch)
    return model


@pytest.mark.parametrize("last", ["svg2", "rival"])
def test_who_was_added_last_serves_the_video(wan, svg2, caplog, last, steps=12):
    rival, depths = Rival(), []
    if last == "svg2":
        patched, stats = svg2(rival(wan), warmup_steps=0, dense_blocks="", q_clusters=2, k_clusters=3)
    else:
        patched, stats = svg2(wan, warmup_steps=0, dense_blocks="", q_clusters=2, k_clusters=3)
        patched = rival(patched)
    with caplog.at_level(logging.WARNING, logger="svg2"):
        sample(watched(patched, depths), steps=steps, shape=latent(2, 8, 8))
    report = stats.latest()
    assert depths == [2] * steps and len(rival.installed) == 1, "each is in the chain once"
    told = [notice for notice in report.notices if "test_rivals.Rival.install" in notice]
    assert len(told) == 1 and "keep one of the two" in told[0]
    assert sum("test_rivals.Rival.install" in record.message for record in caplog.records) == 1
    if last == "svg2":
        assert report.sparse_calls == 3 * steps and report.dense_calls == {}
        assert rival.served == 1, "the call that is made for comparison alone"
    else:
        assert report.sparse_calls == 0 and report.dense_calls == {"never_came": 3 * steps}
        assert rival.served == 3 * steps


def test_calls_that_a_rival_added_last_hands_on(wan, svg2):
    rival = Rival(serves=0)
    patched, stats = svg2(wan, warmup_steps=1, dense_blocks="")
    sample(rival(patched))
    report = stats.latest()
    assert report.sparse_calls == 9 and report.dense_calls == {"warmup": 3}
    assert next(iter(report.remarks)) == "override_above"


def test_context_windows(wan, svg2):
    """Each window of a step prepares the state anew."""
    import comfy.context_windows as windows

    rival, depths = Rival(serves=0), []
    model = rival(wan)
    model.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule("standard_static"), windows.get_matching_fuse_method("pyramid"),
        context_length=3, context_overlap=1, context_stride=1, closed_loop=False, dim=2)  # fmt: skip
    windows.create_prepare_sampling_wrapper(model)
    patched, stats = svg2(model, warmup_steps=0, dense_blocks="")
    sample(watched(patched, depths), steps=4, positive=conditioning())
    assert len(depths) > 4 and set(depths) == {2}
    assert stats.latest().sparse_calls == 3 * len(depths)


def test_the_model_is_as_it_was(wan, svg2):
    """What a run does to its options is its own."""
    rival = Rival()
    patched, _ = svg2(rival(wan), warmup_steps=0, dense_blocks="")
    before = dict(patched.model_options["transformer_options"])
    sample(patched, steps=2)
    assert patched.model_options["transformer_options"] == before
