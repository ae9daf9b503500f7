"""Lambda's REST API, as little of it as is used.

Requests are limited to one a second; a refused one (429) is repeated after what the answer says.
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from accel_gpt2.errors import UserError

LAMBDA_URL = "https://cloud.lambda.ai"
KEY_VARIABLE = "LAMBDA_API_KEY"
KEY_FILE = "~/.lambda_cloud/lambda_keys"  # SkyPilot's: a line `api_key = ...`

_NO_SUCH_OBJECT = "global/object-does-not-exist"
_KEYS_PAGE = "https://cloud.lambda.ai/api-keys"
_LONGEST_ANSWER_BYTES = 10_000_000
_BACKOFF_SECONDS = (1.0, 4.0, 12.0)
_LONGEST_BACKOFF_SECONDS = 60.0


def find_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """Lambda's API key: `LAMBDA_API_KEY`, or what SkyPilot's key file has; None without either.

    Raises:
        UserError: when what is there is no key; the text does not hold it.
    """
    path = Path(KEY_FILE).expanduser()
    place, key = f"The variable {KEY_VARIABLE}", environment.get(KEY_VARIABLE, "").strip()
    if not key:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeError):
            raise UserError(f"{path} cannot be read: make it readable, with a new key.") from None
        found = re.search(r"^\s*api_key\s*=\s*(\S*)", text, re.MULTILINE)
        place, key = f"The file {path}", found[1] if found else ""
    # Anything else could end up in an error of the HTTP library, which quotes headers.
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise UserError(f"{place} holds no API key of Lambda: make one at {_KEYS_PAGE}.")
    return key


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def instance_types(
    key: str,
    *,
    base_url: str = LAMBDA_URL,
    timeout_seconds: float = 20.0,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, dict[str, Any]]:
    """All instance types by name, as `GET /api/v1/instance-types` describes them.

    Raises:
        UserError: when Lambda cannot be reached, refuses the key, or answers something else.
    """
    data = _ask(
        f"{base_url}/api/v1/instance-types", key, timeout_seconds=timeout_seconds, sleep=sleep
    )
    if not isinstance(data, dict) or not all(isinstance(x, dict) for x in data.values()):
        raise UserError(f"{base_url} answered something that is no list of instance types.")
    return data


def instances(
    key: str,
    *,
    base_url: str = LAMBDA_URL,
    timeout_seconds: float = 20.0,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, str]:
    """The names of all machines that exist and are not being terminated, by their ids.

    Raises:
        UserError: when Lambda cannot be reached, refuses the key, or answers something else.
    """
    data = _ask(f"{base_url}/api/v1/instances", key, timeout_seconds=timeout_seconds, sleep=sleep)
    try:
        return {
            str(machine["id"]): str(machine.get("name", ""))
            for machine in data  # type: ignore[attr-defined]  # whatever it is not
            if machine["status"] not in {"terminated", "terminating"}
        }
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{base_url} answered something that is no list of instances.") from None


def terminate(
    key: str,
    ids: Sequence[str],
    *,
    base_url: str = LAMBDA_URL,
    timeout_seconds: float = 60.0,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Terminate machines; those that exist no more are no failure.

    Raises:
        UserError: when Lambda does not say that all of them are on their way out.
    """
    for id_ in ids:  # one by one: an unknown one among several would have none terminated
        try:
            data = _ask(
                f"{base_url}/api/v1/instance-operations/terminate",
                key,
                {"instance_ids": [id_]},
                timeout_seconds=timeout_seconds,
                sleep=sleep,
            )
        except _DoesNotExist:
            continue
        try:
            ended = {str(x["id"]) for x in data["terminated_instances"]}  # type: ignore[index]
        except (TypeError, KeyError):
            ended = set()
        if id_ not in ended:
            raise UserError(
                f"{base_url} did not say that {id_} is terminated: look at "
                "https://cloud.lambda.ai/instances."
            )


class _DoesNotExist(UserError):
    """What was asked for is not there, by the API's own code."""


def _ask(
    url: str,
    key: str,
    body: Mapping[str, object] | None = None,
    *,
    timeout_seconds: float,
    sleep: Callable[[float], None],
) -> object:
    """The `data` of an answer, of a GET, or of a POST where there is a body."""
    host = urlsplit(url).netloc
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {key}",
            "Accept": "application/json",
            "Content-Type": "application/json",
        },
    )
    opener = urllib.request.build_opener(_NoRedirects)
    for pause in (*_BACKOFF_SECONDS, None):
        try:
            deadline = time.monotonic() + timeout_seconds
            with opener.open(request, timeout=timeout_seconds) as response:
                answer = json.loads(_body(response, deadline))
                return answer.get("data") if isinstance(answer, dict) else None
        except urllib.error.HTTPError as error:
            if error.code == 429 and pause is not None:
                sleep(max(pause, _asked_pause(error)))
                continue
            raise _refusal(host, error) from None
        except TimeoutError:
            raise UserError(f"{host} did not answer within {timeout_seconds:g} s.") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                reason = f"no connection within {timeout_seconds:g} s"
            raise UserError(f"{host} cannot be reached: {reason}.") from None
        except ValueError:  # also of bytes that are no text
            raise UserError(f"{host} answered something that is no JSON.") from None
    raise AssertionError("the last attempt ends in an answer or an error")


def _body(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """All of an answer; a time-out of the socket alone would let one trickle in for ever."""
    parts: list[bytes] = []
    while part := response.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError
        if sum(map(len, parts)) > _LONGEST_ANSWER_BYTES:
            raise ValueError("an answer of this size is not what was asked for")
    return b"".join(parts)


def _asked_pause(error: urllib.error.HTTPError) -> float:
    """The seconds that the answer asks to wait, where it does."""
    asked = error.headers.get("Retry-After", "")
    return min(float(asked), _LONGEST_BACKOFF_SECONDS) if re.fullmatch(r"\d{1,9}", asked) else 0.0


def _refusal(host: str, error: urllib.error.HTTPError) -> UserError:
    """A sentence for an error that the API describes by its `code`."""
    try:
        code = json.loads(error.read(1 << 16))["error"]["code"]
    except (OSError, ValueError, TypeError, KeyError, http.client.HTTPException):
        code = error.reason
    if error.code in {401, 403}:
        return UserError(
            f"{host} refuses the API key of {KEY_VARIABLE} or {KEY_FILE} ({code}): make a new one "
            f"at {_KEYS_PAGE}."
        )
    if error.code == 429:
        return UserError(f"{host} refuses more requests for now (429): try again in a minute.")
    if code == _NO_SUCH_OBJECT:
        return _DoesNotExist(f"{host} knows no such machine.")
    return UserError(f"{host} answered {error.code} ({code}): try again later.")
