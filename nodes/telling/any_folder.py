"""Scripts, help pages and templates also from a folder of any name.

ComfyUI cannot serve them where the name has a space or a letter outside ASCII (its routes are quoted, but aiohttp looks
paths up unquoted), or a dot or an @ (the front end asks for help pages under what comes before it). GitHub's and browsers'
archives unpack into such folders.
"""

import re
from pathlib import Path

from aiohttp import web

from .live import running_server

PACK = Path(__file__).parents[2]  # not resolved: the folder in custom_nodes may be a link


def serve() -> None:
    """Add the routes that this pack's folder needs, if any. Where ComfyUI has a route of its own, that one answers."""
    name, server = PACK.name, running_server()
    if server is None or re.fullmatch("[A-Za-z0-9_-]+", name) or set("{}") & set(name):
        return
    names = "|".join(map(re.escape, (name, name.split(".")[0].split("@")[0])))
    for prefix, folder in (("/extensions", "web"), ("/api/workflow_templates", "workflows")):
        server.app.router.add_get(f"{prefix}/{{folder:{names}}}/{{file:.+}}", _files(PACK.resolve() / folder))


def _files(folder: Path):
    async def file(request: web.Request) -> web.FileResponse:
        path = (folder / request.match_info["file"]).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path)

    return file
