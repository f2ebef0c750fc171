"""Pictures that strangers send: data URLs, and web addresses if they are allowed, but never our own network's."""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import ipaddress
import socket
import ssl
import string
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence

from eyespot.serving.limits import Limits
from eyespot.serving.refusals import Refusal

MAX_REDIRECTS = 3
FETCH_TIMEOUT_S = 10.0
CHUNK_BYTES = 65_536
SHOWN_CHARACTERS = 80
REDIRECTS = (301, 302, 303, 307, 308)
# IPv4 addresses are reached through these too. Source: https://www.rfc-editor.org/rfc/rfc6052#section-2.1
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# All that the world is reached by. Source: https://www.iana.org/assignments/ipv6-address-space
GLOBAL = ipaddress.ip_network("2000::/3")
# The protocols' own, which some versions of Python call global
PROTOCOLS = ipaddress.ip_network("192.0.0.0/24")


def picture_files(urls: Sequence[str], limits: Limits, allow_urls: bool) -> list[bytes]:
    """The files behind the ``image_url`` of a request; web servers have no longer for many than for one.

    Raises:
        Refusal: too many; no data URL of a picture (nor an address that may be asked), too large, or not to be had.
    """
    limits.check_images(len(urls))
    deadline = time.monotonic() + FETCH_TIMEOUT_S
    return [_file(url, limits, deadline if allow_urls else None) for url in urls]


def _file(url: str, limits: Limits, fetch_until: float | None) -> bytes:
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        return _from_data_url(url, limits)
    if scheme not in ("http", "https"):
        raise _refused(url, "is neither a data URL nor a web address; send data:image/png;base64,...")
    if fetch_until is None:
        raise _refused(url, "is a web address, which this server does not fetch; send data:image/png;base64,...")
    return _fetch(url, limits, fetch_until)


def _from_data_url(url: str, limits: Limits) -> bytes:
    """Source: https://www.rfc-editor.org/rfc/rfc2397"""
    head, comma, data = url.partition(",")
    kind, *parameters = head[len("data:") :].lower().split(";")
    if not comma or not kind.startswith("image/") or parameters[-1:] != ["base64"]:
        raise _refused(url, "is not a data URL of a picture; it begins with data:image/png;base64, or another image/")
    if len(data) * 3 / 4 > limits.max_image_bytes + 2 * len("=="):
        raise _too_large(len(data) * 3 // 4, limits)
    try:
        decoded = base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(url, f"is not base64 ({error}); encode the file's bytes again") from None
    if len(decoded) > limits.max_image_bytes:
        raise _too_large(len(decoded), limits)
    return decoded


def _fetch(url: str, limits: Limits, deadline: float) -> bytes:
    """Every address on the way is looked at, and it is the one that was looked at that is asked."""
    place = url
    for _ in range(MAX_REDIRECTS + 1):
        try:
            status, found = _ask(place, deadline, limits)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _refused(url, f"could not be fetched ({_line(error)}); check it or send a data URL") from None
        if status == 200:
            return found
        if status not in REDIRECTS:
            raise _refused(url, f"could not be fetched (its server answered {status}); check it or send a data URL")
        place = urllib.parse.urljoin(place, found.decode("latin-1"))
    raise _refused(url, f"leads to more than {MAX_REDIRECTS} other addresses; send the last one")


def _ask(url: str, deadline: float, limits: Limits) -> tuple[int, bytes]:
    """Status and body of one address; of a redirection the address that it leads to."""
    parts = urllib.parse.urlsplit(urllib.parse.quote(url, safe=string.punctuation))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it leads to something else than http and https")
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    with _connection(parts, deadline) as connection:
        connection.request("GET", target, headers={"User-Agent": "eyespot", "Accept": "image/*"})
        with connection.getresponse() as response:
            if response.status in REDIRECTS:
                return response.status, response.headers.get("Location", "").encode("latin-1")
            return response.status, _body(response, deadline, limits) if response.status == 200 else b""


def _body(response: http.client.HTTPResponse, deadline: float, limits: Limits) -> bytes:
    body = bytearray()
    while chunk := response.read1(CHUNK_BYTES):
        body += chunk
        if len(body) > limits.max_image_bytes:
            raise _too_large(len(body), limits)
    _left(deadline)  # else it may have been cut
    return bytes(body)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"it took more than {FETCH_TIMEOUT_S:g} seconds")
    return left


@contextlib.contextmanager
def _connection(parts: urllib.parse.SplitResult, deadline: float) -> Iterator[http.client.HTTPConnection]:
    """A connection that is cut at the deadline, also if its other end sends a byte now and then."""
    secure, host = parts.scheme == "https", str(parts.hostname)
    port = parts.port or (http.client.HTTPS_PORT if secure else http.client.HTTP_PORT)
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, port)
    with _public_socket(host, port, _left(deadline)) as plain, plain.dup() as other:
        alarm = threading.Timer(_left(deadline), _cut, [other])
        alarm.start()
        try:
            secured = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
            connection.sock = secured
            yield connection
        finally:
            alarm.cancel()
            connection.close()


def _cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        connected.shutdown(socket.SHUT_RDWR)


def _public_socket(host: str, port: int, timeout_s: float) -> socket.socket:
    """A connection to the address that a name stands for, if all its addresses belong to the public internet.

    The name is looked up once: a second look-up could give another address.
    """
    addresses = [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(map(is_public, addresses)):
        raise OSError("it is an address of a private network")
    return socket.create_connection((addresses[0], port), timeout_s)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, and so does an IPv4 address that is wrapped in it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF))
        if not all(is_public(str(wrapped)) for wrapped in inner if wrapped is not None):
            return False
        if ip.ipv4_mapped is not None or ip in NAT64:
            return True
        return ip in GLOBAL and ip.is_global
    return ip.is_global and not ip.is_multicast and ip not in PROTOCOLS


def _refused(url: str, why: str) -> Refusal:
    shown = url if len(url) <= SHOWN_CHARACTERS else url[:SHOWN_CHARACTERS] + "…"
    return Refusal(f"image_url {shown!r} {why}", param="messages", code="invalid_image_url")


def _too_large(size: int, limits: Limits) -> Refusal:
    return Refusal(
        f"a picture has {size} bytes or more, the limit is {limits.max_image_bytes}; make it smaller",
        413,
        param="messages",
        code="image_too_large",
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
