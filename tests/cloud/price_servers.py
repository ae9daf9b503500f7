"""In-process servers that answer as Lambda, the Hugging Face hub and dstack's price lists do."""

import contextlib
import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jsonschema

# What Lambda's API 1.8.3 says of GET /api/v1/instance-types, as far as it is read here.
INSTANCE_TYPES_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["data"],
    "properties": {
        "data": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["instance_type", "regions_with_capacity_available"],
                "properties": {
                    "instance_type": {
                        "type": "object",
                        "required": [
                            "name",
                            "description",
                            "gpu_description",
                            "price_cents_per_hour",
                            "specs",
                        ],
                        "properties": {
                            "name": {"type": "string"},
                            "description": {"type": "string"},
                            "gpu_description": {"type": "string"},
                            "price_cents_per_hour": {"type": "integer"},
                            "specs": {
                                "type": "object",
                                "required": ["vcpus", "memory_gib", "storage_gib", "gpus"],
                                "additionalProperties": {"type": "integer"},
                            },
                        },
                    },
                    "regions_with_capacity_available": {
                        "type": "array",
                        "items": {"type": "object", "required": ["name", "description"]},
                    },
                },
            },
        }
    },
}

ERROR_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "string", "pattern": "^[a-z-]+/[a-z/-]+$"},
                "message": {"type": "string"},
                "suggestion": {"type": "string"},
            },
        }
    },
}


@dataclass
class Answer:
    """One answer; `trickle` sends it byte by byte and `silent` never, until the test is over."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    silent: bool = False
    trickle: bool = False


@dataclass
class Server:
    """Where it listens, and the requests that came: path and headers."""

    url: str
    requests: list[tuple[str, dict[str, str]]]


@contextlib.contextmanager
def serving(answer: Callable[[str, int], Answer]) -> Iterator[Server]:
    """A server whose `answer` gets the path and the number of the request, from 0."""
    over = threading.Event()
    requests: list[tuple[str, dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
            given = answer(self.path, len(requests) - 1)
            if given.silent:
                over.wait(20)
                return
            self.send_response(given.status)
            for name, value in given.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(given.body)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the other side has given up
                for byte in given.body if given.trickle else ():
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    if over.wait(0.05):
                        return
                if not given.trickle:
                    self.wfile.write(given.body)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Server(url=f"http://127.0.0.1:{server.server_port}", requests=requests)
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def instance_type(name: str, gpu: str, cents: int, gpus: int) -> dict[str, object]:
    """One instance type as Lambda describes it."""
    return {
        "instance_type": {
            "name": name,
            "description": f"{gpus}x {gpu}",
            "gpu_description": gpu,
            "price_cents_per_hour": cents,
            "specs": {"vcpus": 30, "memory_gib": 200, "storage_gib": 512, "gpus": gpus},
        },
        "regions_with_capacity_available": [
            {"name": "us-west-1", "description": "California, USA"}
        ],
    }


def lambda_answer(*types: dict[str, object]) -> Answer:
    """A list of instance types, which the API's description allows."""
    document = {"data": {x["instance_type"]["name"]: x for x in types}}  # type: ignore[index]
    jsonschema.validate(document, INSTANCE_TYPES_SCHEMA)
    return Answer(body=json.dumps(document).encode())


def lambda_error(status: int, code: str, headers: Mapping[str, str] | None = None) -> Answer:
    """An error, which the API's description allows."""
    document = {"error": {"code": code, "message": "In words.", "suggestion": "In more words."}}
    jsonschema.validate(document, ERROR_SCHEMA)
    return Answer(body=json.dumps(document).encode(), status=status, headers=headers or {})


def flavor(name: str, model: str, vram: str, usd_per_minute: float, quantity: str = "1") -> object:
    """One flavor of Hugging Face Jobs, as /api/jobs/hardware lists it."""
    return {
        "name": name,
        "prettyName": f"Nvidia {model}",
        "cpu": "8 vCPU",
        "ram": "30 GB",
        "accelerator": {
            "type": "gpu",
            "model": model,
            "quantity": quantity,
            "vram": vram,
            "manufacturer": "Nvidia",
        },
        "unitCostMicroUSD": round(usd_per_minute * 1e6),
        "unitCostUSD": usd_per_minute,
        "unitLabel": "minute",
    }


_COLUMNS = (
    "instance_name",
    "location",
    "price",
    "cpu",
    "memory",
    "gpu_count",
    "gpu_name",
    "gpu_memory",
    "spot",
    "disk_size",
    "gpu_vendor",
    "flags",
    "cpu_arch",
    "provider_data",
)


def gpuhunt_list(rows: list[dict[str, object]]) -> dict[str, bytes]:
    """dstack's published lists with these rows, some empty: what is at each path."""
    rest = {"cpu": 8, "memory": 30.0, "gpu_count": 1, "spot": False, "gpu_vendor": "nvidia"}
    files = {}
    others = ("lambdalabs", "nebius", "oci", "cloudrift")  # that gpuhunt fetches as well
    for provider in dict.fromkeys([*(str(row["provider"]) for row in rows), *others]):
        lines = [",".join(_COLUMNS)]
        for row in rows:
            if row["provider"] == provider:
                whole = {**rest, "cpu_arch": "x86", "provider_data": "{}", **row}
                lines.append(",".join(str(whole.get(column, "")) for column in _COLUMNS))
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr(f"{provider}.csv", "\n".join(lines) + "\n")
        files[f"/{provider}/version"] = b"20261123-1"
        files[f"/{provider}/20261123-1/catalog.zip"] = packed.getvalue()
    return files
