"""`python gcs_emulator.py PORT`: the emulator of gcp-storage-emulator, with what it lacks of Google Cloud Storage.

Added: ifGenerationMatch when an object is written or deleted, ifGenerationNotMatch when it is read, the header
x-goog-generation, empty uploads, status 416, startOffset and endOffset of listings, a bucket `forbidden`, which
answers everything with 403, and buckets that vanish: while the file that GCS_VANISHES names is there, requests are
answered with 404 once as many have been carried out as stands in it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

BUCKET, FORBIDDEN = "runs", "forbidden"


def generation_of(request: Any, storage: Any, name: str) -> str:
    try:
        return str(storage.get_file_obj(request.params["bucket_name"], name)["generation"])
    except NotFound:
        return "0"


def refused(request: Any, response: Any, storage: Any, name: str) -> bool:
    """Whether a precondition of the request does not hold; the response says so then."""
    now = generation_of(request, storage, name)
    if request.query.get("ifGenerationMatch", [now])[0] != now:
        response.status = HTTPStatus.PRECONDITION_FAILED
    elif request.query.get("ifGenerationNotMatch", [None])[0] == now:
        response.status = HTTPStatus.NOT_MODIFIED
    return response.status != HTTPStatus.OK


def starts_behind(request: Any, storage: Any, name: str) -> bool:
    """Whether the range that is asked for begins at or behind the object's end."""
    wanted = re.match(r"bytes=(\d+)-", request.get_header("range", ""))
    if wanted is None or generation_of(request, storage, name) == "0":
        return False
    return int(wanted[1]) >= len(storage.get_file(request.params["bucket_name"], name))


def checked(handler: Any) -> Any:
    def handle(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> Any:
        name = request.params.get("object_id") or request.query["name"][0]
        if refused(request, response, storage, name):
            return None
        if handler is download:
            response["x-goog-generation"] = generation_of(request, storage, name)
            if starts_behind(request, storage, name):
                response.status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
                return None
        return handler(request, response, storage, *args, **kwargs)

    return handle


def list_between(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> None:
    """The listing from `startOffset` to before `endOffset`."""
    list_all(request, response, storage, *args, **kwargs)
    if response.status == HTTPStatus.OK:
        first, last = (request.query.get(name, [""])[0] for name in ("startOffset", "endOffset"))
        found = json.loads(response._content)
        found["items"] = [item for item in found.get("items", []) if first <= item["name"] and
                          (not last or item["name"] < last)]
        response.json(found)


list_all, download, read_data, handle = objects.ls, objects.download, server._read_data, server.Router.handle


def data_of(request_handler: Any, query: Any) -> Any:
    data = read_data(request_handler, query)
    return b"" if data is None and query.get("uploadType") == ["media"] else data


def has_vanished() -> bool:
    file = Path(os.environ.get("GCS_VANISHES", "/nowhere"))
    if not file.exists():
        return False
    left = int(file.read_text() or 0)
    file.write_text(str(max(0, left - 1)))
    return left <= 0


def handle_if_there(router: Any, method: str) -> None:
    if f"/b/{FORBIDDEN}" in router._request_handler.path:
        status, message = HTTPStatus.FORBIDDEN, "Forbidden"
    elif has_vanished():
        status, message = HTTPStatus.NOT_FOUND, "The specified bucket does not exist."
    else:
        return handle(router, method)
    response = server.Response(router._request_handler)
    response.status = status
    response.json({"error": {"code": status.value, "message": message}})
    return response.close()


def main(port: int) -> None:
    replaced = {objects.delete: checked(objects.delete), list_all: list_between}
    for _, handlers in server.HANDLERS:
        for method, handler in handlers.items():
            handlers[method] = replaced.get(handler, handler)
    objects.download = checked(download)
    objects._media_upload = checked(objects._media_upload)
    objects._create_resumable_upload = checked(objects._create_resumable_upload)
    server._read_data = data_of
    server.Router.handle = handle_if_there
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET).run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
