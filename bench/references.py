"""The two references, under uvicorn as Coatcheck is: what anybody would write, and the least.

R: a Starlette route with `request.form()`, one PyJWT signature and a JSONResponse; no key check.
F: a bare ASGI callable that parses the form, checks the key by SHA-256 in a dict, and signs once
over a serialized header and prefix of claims.  It refuses nothing beyond that.

Run as a process: `python -m bench.references R PORT KEYS`, where KEYS is a file of JSON lines.
"""

import hashlib
import json
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl

import jwt
import uvicorn
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from jwt.utils import base64url_encode
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

PATH: Final = "/oauth/token"
_LIFETIME_S: Final = 600
_ISSUER: Final = "http://127.0.0.1:8000"
_SCOPE: Final = "widgets:read widgets:write"
_ORGANIZATION: Final = "org_0FvQ2uWwXk3sT1bL9cZp4E"
_KID: Final = "a" * 43

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


def reference_r() -> Starlette:
    """R."""
    private = ec.generate_private_key(ec.SECP256R1())

    async def token(request: Request) -> Response:
        form = await request.form()
        now = int(time.time())
        claims = {
            "iss": _ISSUER,
            "sub": form["client_id"],
            "client_id": form["client_id"],
            "iat": now,
            "jti": secrets.token_urlsafe(16),
            "org_id": _ORGANIZATION,
            "as_of": 1,
            "env": "live",
            "aud": _ISSUER,
            "scope": _SCOPE,
            "exp": now + _LIFETIME_S,
        }
        signed = jwt.encode(
            claims, private, algorithm="ES256", headers={"kid": _KID, "typ": "at+jwt"}
        )
        body = {
            "access_token": signed,
            "token_type": "Bearer",
            "expires_in": _LIFETIME_S,
            "scope": _SCOPE,
        }
        return JSONResponse(body, headers={"Cache-Control": "no-store"})

    return Starlette(routes=[Route(PATH, token, methods=["POST"])])


def reference_f(keys: Path) -> Callable[..., Awaitable[None]]:
    """F, which knows the keys of this file."""
    id_of = {}
    with keys.open(encoding="utf-8") as lines:
        for made in map(json.loads, lines):
            id_of[hashlib.sha256(made["key"].encode()).digest()] = made["id"]
    private = ec.generate_private_key(ec.SECP256R1())
    ecdsa = ec.ECDSA(hashes.SHA256())
    header = base64url_encode(
        json.dumps({"alg": "ES256", "kid": _KID, "typ": "at+jwt"}, separators=(",", ":")).encode()
    )
    claims = (
        f'{{"iss":"{_ISSUER}","aud":"{_ISSUER}","scope":"{_SCOPE}","org_id":"{_ORGANIZATION}",'
        '"env":"live","as_of":1,"sub":"%s","client_id":"%s","iat":%d,"exp":%d,"jti":"%s"}'
    )
    answer = (
        b'{"access_token":"%b.%b","token_type":"Bearer","expires_in":600,"scope":"'
        + _SCOPE.encode()
        + b'"}'
    )
    refused = b'{"error":"invalid_client"}'
    always = (
        (b"content-type", b"application/json"),
        (b"cache-control", b"no-store"),
        (b"pragma", b"no-cache"),
    )

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        message = await receive()
        form = dict(parse_qsl(message["body"].decode()))
        digest = hashlib.sha256(form["client_secret"].encode()).digest()
        api_key_id = id_of.get(digest)
        if api_key_id is None or api_key_id != form["client_id"]:
            status, body = 400, refused
        else:
            now = int(time.time())
            jti = base64url_encode(secrets.token_bytes(16)).decode()
            payload = claims % (api_key_id, api_key_id, now, now + _LIFETIME_S, jti)
            signing_input = header + b"." + base64url_encode(payload.encode())
            r, s = decode_dss_signature(private.sign(signing_input, ecdsa))
            signature = base64url_encode(r.to_bytes(32, "big") + s.to_bytes(32, "big"))
            status, body = 200, answer % (signing_input, signature)
        headers = [*always, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def serve(name: str, port: int, keys: Path) -> None:
    """Serve one of the two until it is told to stop, with uvicorn set as Coatcheck sets it."""
    app: Any = reference_r() if name == "R" else reference_f(keys)
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        log_level="warning",
    )


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
