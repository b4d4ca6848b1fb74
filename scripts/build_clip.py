"""Make the README's clip of what the demo wrote: `python scripts/demo.py`, then `python scripts/build_clip.py`."""

import sys

import environment
import host

SOURCE, TARGET = host.ROOT / "output/demo/side_by_side.mp4", host.ROOT / "web/docs/img/demo.webp"


def main() -> int:
    environment.ensure()
    import av

    if not SOURCE.exists():
        raise host.SetupError(f"There is no {SOURCE}: run `python scripts/demo.py` first.")
    with av.open(str(SOURCE)) as container:
        rate = container.streams.video[0].average_rate
        frames = [frame.to_image() for frame in container.decode(video=0)]
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(TARGET, save_all=True, append_images=frames[1:], duration=round(1000 / rate), loop=0, quality=85, method=6)
    print(f"{TARGET.relative_to(host.ROOT)}: {len(frames)} frames, {TARGET.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(host.guarded(main))
