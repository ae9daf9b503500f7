"""Lambda's API in this process: machines that can be launched, listed and terminated."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jsonschema

from tests.cloud.price_servers import ERROR_SCHEMA, INSTANCE_TYPES_SCHEMA, instance_type

# What the API's description 1.8.3 requires of an instance, and the states that it may be in.
_INSTANCE = {
    "type": "object",
    "required": [
        "id",
        "status",
        "ssh_key_names",
        "file_system_names",
        "region",
        "instance_type",
        "actions",
    ],
    "properties": {
        "id": {"type": "string"},
        "name": {"type": "string", "maxLength": 64},
        "status": {
            "enum": ["booting", "active", "unhealthy", "terminated", "terminating", "preempted"]
        },
        "ssh_key_names": {"type": "array", "items": {"type": "string"}},
        "file_system_names": {"type": "array", "items": {"type": "string"}},
        "region": {"type": "object", "required": ["name", "description"]},
        "instance_type": {"type": "object", "required": ["name", "price_cents_per_hour", "specs"]},
        "actions": {"type": "object"},
    },
}


def _data(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["data"],
        "properties": {"data": schema},
    }


def _ids(name: str, items: dict[str, Any]) -> dict[str, Any]:
    array = {"type": "array", "items": items}
    return {"type": "object", "required": [name], "properties": {name: array}}


_LAUNCH_REQUEST = {
    "type": "object",
    "required": ["region_name", "instance_type_name", "ssh_key_names"],
    "properties": {"name": {"type": "string", "maxLength": 64}},
}
_TERMINATE_REQUEST = _ids("instance_ids", {"type": "string"})

RESPONSES = {
    "instance-types": INSTANCE_TYPES_SCHEMA,
    "instances": _data({"type": "array", "items": _INSTANCE}),
    "instance-operations/launch": _data(_ids("instance_ids", {"type": "string"})),
    "instance-operations/terminate": _data(_ids("terminated_instances", _INSTANCE)),
}


class LambdaCloud:
    """The state of the fake: who is free, what runs, and answers that are to come first.

    `bad_answers` are (status, body) pairs, sent in place of the next answers; a body of None keeps
    the connection open and says nothing. `requests` are (method, path) pairs.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.free = True
        self.machines: dict[str, dict[str, Any]] = {}
        self.bad_answers: list[tuple[int, bytes | None]] = []
        self.requests: list[tuple[str, str]] = []
        self.over = threading.Event()
        self.url = ""

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """The API's own answer, held to its description."""
        status, document = self._answer(path, body)
        jsonschema.validate(document, RESPONSES[path] if status == 200 else ERROR_SCHEMA)
        return status, document

    def _answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "instance-types":
            offer: Any = instance_type("gpu_1x_a100_sxm4", "A100 (40 GB SXM4)", 189, 1)
            other: Any = instance_type("gpu_1x_a10", "A10 (24 GB PCIe)", 129, 1)
            if not self.free:
                offer["regions_with_capacity_available"] = []
            return 200, {"data": {x["instance_type"]["name"]: x for x in (offer, other)}}
        if path == "instances":
            return 200, {"data": list(self.machines.values())}
        if path == "instance-operations/launch":
            jsonschema.validate(body, _LAUNCH_REQUEST)
            if not self.free:
                return 400, _error("instance-operations/launch/insufficient-capacity")
            id_ = f"{len(self.machines):032x}"
            offer = instance_type(body["instance_type_name"], "A100 (40 GB SXM4)", 189, 1)
            self.machines[id_] = {
                "id": id_,
                "name": body.get("name", ""),
                "status": "active",
                "ssh_key_names": body["ssh_key_names"],
                "file_system_names": [],
                "region": {"name": body["region_name"], "description": "Somewhere"},
                "instance_type": offer["instance_type"],
                "actions": {},
            }
            return 200, {"data": {"instance_ids": [id_]}}
        jsonschema.validate(body, _TERMINATE_REQUEST)
        if not set(body["instance_ids"]) <= set(self.machines):
            return 404, _error("global/object-does-not-exist")
        ended = [self.machines[id_] for id_ in body["instance_ids"]]
        for machine in ended:
            machine["status"] = "terminating"
        return 200, {"data": {"terminated_instances": ended}}


def _error(code: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": "In words."}}


@contextlib.contextmanager
def lambda_cloud(key: str) -> Iterator[LambdaCloud]:
    """A cloud that takes this key."""
    cloud = LambdaCloud(key)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._reply(json.loads(body))

        def _reply(self, body: Any) -> None:
            path = self.path.removeprefix("/api/v1/")
            cloud.requests.append((self.command, path))
            if self.headers["Authorization"] != f"Bearer {cloud.key}":
                self._send(401, json.dumps(_error("global/invalid-api-key")).encode())
            elif cloud.bad_answers:
                status, text = cloud.bad_answers.pop(0)
                if text is None:
                    cloud.over.wait(20)
                else:
                    self._send(status, text)
            else:
                status, document = cloud.answer(path, body)
                self._send(status, json.dumps(document).encode())

        def _send(self, status: int, text: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    cloud.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield cloud
    finally:
        cloud.over.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
