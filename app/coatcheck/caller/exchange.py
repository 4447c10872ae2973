"""One exchange of an API key for a token: what is asked, of whom, and what came of it.

Source: RFC 6749 §4.4.2 (client credentials), §2.3.1 (credentials in the form), RFC 8707 §2.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from coatcheck import http
from coatcheck.caller.answer import Answer, Fetched, read
from coatcheck.caller.errors import IssuerUnavailable
from coatcheck.caller.origin import require_safe

ISSUER_VARIABLE: Final = "COATCHECK_ISSUER"
MAX_ANSWER_BYTES: Final = 16 * 1024

#: Sends a form to a URL.  Raises FetchFailed: there is no usable answer.
Post = Callable[[str, Mapping[str, str]], Answer]


@dataclass(frozen=True, slots=True)
class Exchange:
    """Everything about it but the API key.

    Attributes:
        issuer: from `issuer_url`.
        scope: what to ask for; None: all that the API key has.
        resource: the API that tokens are for; None: the issuer's usual one.
        client_id: the API key's id; None: the issuer finds it.
    """

    issuer: str
    scope: str | None
    resource: str | None
    client_id: str | None
    post: Post
    clock: Callable[[], float] = time.time

    def run(self, api_key: str) -> Fetched:
        """A token for this API key.

        Raises:
            CallerError: there is none.
        """
        form = {"grant_type": "client_credentials", "client_secret": api_key}
        asked = {"client_id": self.client_id, "scope": self.scope, "resource": self.resource}
        form |= {name: value for name, value in asked.items() if value}
        url = f"{self.issuer}/oauth/token"
        try:
            answer = self.post(url, form)
        except http.FetchFailed as error:
            raise IssuerUnavailable(
                f"no answer from {url} ({error.kind}): check the issuer's URL and whether the"
                " service runs",
                "issuer_unavailable",
            ) from None
        return read(answer, api_key, now=self.clock())


def exchange(
    issuer: str | None = None,
    *,
    scope: str | Sequence[str] | None = None,
    resource: str | None = None,
    client_id: str | None = None,
    timeout_s: float,
    trust_env: bool = False,
    unsafe_plain_http: bool = False,
    environ: Mapping[str, str] | None = None,
    send: Post | None = None,
    clock: Callable[[], float] = time.time,
) -> Exchange:
    """An exchange whose settings were looked at.

    Raises:
        ValueError: nobody has said which issuer, or its URL is not safe.
    """
    environ = os.environ if environ is None else environ
    issuer = (issuer or environ.get(ISSUER_VARIABLE) or "").rstrip("/")
    if not issuer:
        raise ValueError(f"which issuer?  Say its URL, or set {ISSUER_VARIABLE}")
    try:
        require_safe(issuer, unsafe_plain_http=unsafe_plain_http)
    except ValueError as error:
        raise ValueError(f"issuer: {error}") from None
    if "?" in issuer or "#" in issuer:
        raise ValueError("issuer: a URL without query and fragment")
    if scope is not None and not isinstance(scope, str):
        scope = " ".join(scope)
    send = send or partial(post, timeout_s=timeout_s, trust_env=trust_env)
    return Exchange(issuer, scope, resource, client_id, send, clock)


def post(url: str, form: Mapping[str, str], *, timeout_s: float, trust_env: bool = False) -> Answer:
    """The answer to a form, whatever its status.

    A connection is made for each exchange: there is one in ten minutes.

    Args:
        timeout_s: for everything together, the last byte included.
        trust_env: whether proxies and certificates named in the environment (HTTPS_PROXY,
            SSL_CERT_FILE, …) count.

    Raises:
        FetchFailed: none in time, or one that is too long.
    """
    told = http.post(
        url, form, max_bytes=MAX_ANSWER_BYTES, timeout_s=timeout_s, trust_env=trust_env
    )
    return Answer(told.status, told.body, told.headers.get("retry-after"))
