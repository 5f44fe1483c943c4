"""Downloads over https, from hosts that the operator lists and from no other place.

A user names the URL and this service asks for it from inside the operator's network, so (server-side request
forgery, OWASP A10:2021): the host must be listed; its name is resolved once and the connection goes to the
very address that was checked, so that a second answer of the name server cannot lead elsewhere (DNS
rebinding); an address that is not of the public internet must be listed too; a redirect may change the path,
never the host; what comes is bounded in bytes and time. Proxies of the environment are not used: a proxy
would resolve the name by itself.
"""

import contextlib
import ipaddress
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote, urljoin, urlsplit

import httpx

from peft_service.errors import InvalidRequest, NotPermitted, PeftServiceError, TooLarge

REDIRECTS = 5
SECONDS = 1800
"""For a whole download."""
SILENCE_SECONDS = 30
"""Between two bytes of it."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class SourceUnavailable(PeftServiceError):
    """Where the data is does not answer. Worth a retry."""

    status = 503
    default_code = "source_unavailable"


@dataclass(frozen=True)
class Place:
    """Where a URL leads, after it was found good."""

    url: str
    host: str
    port: int
    path: str
    """With the query."""
    address: str
    """The one that is connected to."""

    @property
    def name(self) -> str:
        """The last segment of the path: a file name, or empty."""
        return unquote(urlsplit(self.path).path.rpartition("/")[2])


@dataclass(frozen=True)
class Head:
    """What the server says of the object before its bytes."""

    name: str
    bytes: int | None
    version: str
    """Its ETag, or when it was changed; empty: the server tells neither."""


def place_of(url: str, hosts: tuple[str, ...], param: str = "uri") -> Place:
    """Check a URL and resolve its host.

    Args:
        hosts: entries of PEFT_SERVICE_DATA_HOSTS: `host`, `host:port`, an address, or a network.

    Raises:
        InvalidRequest: it is no https URL, or its host has no address.
        NotPermitted: the host is not listed, or its address is private and not listed.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower().rstrip("."), parts.port or 443
    except ValueError as error:
        raise InvalidRequest(f"{url[:200]!r} is no URL: {error}", param=param) from None
    if parts.scheme != "https" or not host:
        raise InvalidRequest(f"{url[:200]!r} is no https://host/path", param=param)
    if parts.username is not None or parts.password is not None:
        raise InvalidRequest(
            f"{param}: a URL must not hold a password: it would be stored and shown", param=param
        )
    if not url.isascii() or any(character <= " " for character in url):
        raise InvalidRequest(f"{url[:200]!r} has characters that must be written as %XX", param=param)
    listed = {entry.lower().rstrip(".") for entry in hosts}
    if f"{host}:{port}" not in listed and not (port == 443 and host in listed):
        known = ", ".join(entry for entry in hosts if "/" not in entry)
        raise NotPermitted(
            f"{param}: data may not be brought from {host}{'' if port == 443 else f':{port}'}; "
            + (f"allowed are {known}" if known else "no host is listed in PEFT_SERVICE_DATA_HOSTS"),
            code="host_not_allowed",
            param=param,
        )
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Place(url, host, port, path, _address(host, port, hosts, param))


@contextmanager
def opened(
    url: str, hosts: tuple[str, ...], *, most: int, seconds: float = SECONDS, param: str = "uri"
) -> Iterator[tuple[Head, Iterator[bytes]]]:
    """What is at `url`: its head, and its bytes as they come.

    Raises:
        InvalidRequest: see `place_of`; the server refuses, or leads to another host.
        NotPermitted: see `place_of`.
        TooLarge: more than `most` bytes, announced or real.
        SourceUnavailable: it does not answer, or not in time.
    """
    deadline, place = time.monotonic() + seconds, place_of(url, hosts, param)
    context = httpx.create_ssl_context()
    timeout = httpx.Timeout(SILENCE_SECONDS, connect=10)
    try:
        with httpx.Client(verify=context, timeout=timeout, trust_env=False, follow_redirects=False) as client:
            for _ in range(REDIRECTS + 1):
                response = client.send(_request(client, place), stream=True)
                with contextlib.closing(response):
                    if response.status_code not in (301, 302, 303, 307, 308):
                        head = _head(place, response, most, param)
                        yield head, _bytes(response, most, deadline, place, param)
                        return
                    place = _next(place, response.headers.get("location", ""), hosts, param)
        raise InvalidRequest(f"{url[:200]} redirects more than {REDIRECTS} times", param=param)
    except httpx.TransportError as error:
        raise SourceUnavailable(
            f"{place.host}:{place.port} does not answer ({str(error) or type(error).__name__})", param=param
        ) from error


def _address(host: str, port: int, hosts: tuple[str, ...], param: str) -> str:
    """The first address of the host, if every one it has may be asked."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InvalidRequest(f"{param}: {host[:100]} has no address ({error})", param=param) from None
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    for text in addresses:
        address = ipaddress.ip_address(text)
        if not all(is_public(inner) for inner in _inside(address)) and not _listed(address, hosts):
            raise NotPermitted(
                f"{param}: {host} is {address}, which is no address of the public internet; an operator who "
                "wants that lists the address itself in PEFT_SERVICE_DATA_HOSTS",
                code="address_not_allowed",
                param=param,
            )
    return addresses[0]


def is_public(address: Address) -> bool:
    """Whether it is a host of the public internet: not private, loopback, link-local (clouds give out
    credentials there), multicast or reserved."""
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _inside(address: Address) -> list[Address]:
    """The address, and those of version 4 that one of version 6 stands for (mapped, 6to4, Teredo, NAT64)."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    inner: list[Address] = [address]
    if address.sixtofour is not None:
        inner.append(address.sixtofour)
    if address.teredo is not None:
        inner.append(address.teredo[1])
    if address in ipaddress.IPv6Network("64:ff9b::/96"):
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    return inner


def _listed(address: Address, hosts: tuple[str, ...]) -> bool:
    for entry in hosts:
        try:
            if address in ipaddress.ip_network(entry.strip("[]"), strict=False):
                return True
        except ValueError:
            continue  # a name
    return False


def _request(client: httpx.Client, place: Place) -> httpx.Request:
    host = f"[{place.address}]" if ":" in place.address else place.address
    named = f"[{place.host}]" if ":" in place.host else place.host
    return client.build_request(
        "GET",
        f"https://{host}:{place.port}{place.path}",
        headers={
            "host": named if place.port == 443 else f"{named}:{place.port}",
            "user-agent": "peft-service",
            # The bytes of the file and no encoding of them: they are what is counted and hashed.
            "accept-encoding": "identity",
        },
        # What the certificate is checked against, although the URL names the address.
        extensions={"sni_hostname": place.host},
    )


def _next(place: Place, location: str, hosts: tuple[str, ...], param: str) -> Place:
    url = urljoin(place.url, location)
    try:
        there = urlsplit(url)
        same = (there.scheme, (there.hostname or "").lower().rstrip("."), there.port or 443)
    except ValueError:
        same = ("", "", 0)
    if same != ("https", place.host, place.port):
        raise InvalidRequest(
            f"{place.url[:200]} redirects to another host ({url[:200]}): name that one, if it is allowed",
            code="redirect_refused",
            param=param,
        )
    return place_of(url, hosts, param)


def _head(place: Place, response: httpx.Response, most: int, param: str) -> Head:
    code = response.status_code
    if code >= 500 or code in (408, 425, 429):
        raise SourceUnavailable(f"{place.url[:200]} answered {code}", param=param)
    if code != 200:
        raise InvalidRequest(
            f"{place.url[:200]} answered {code}; it must be readable without a login",
            code="source_not_found" if code in (404, 410) else "source_refused",
            param=param,
        )
    announced = response.headers.get("content-length", "")
    size = int(announced) if announced.isascii() and announced.isdigit() and len(announced) < 19 else None
    if size is not None and size > most:
        raise _too_large(place, most, param)
    version = response.headers.get("etag") or response.headers.get("last-modified", "")
    return Head(place.name, size, version[:256])


def _bytes(response: httpx.Response, most: int, deadline: float, place: Place, param: str) -> Iterator[bytes]:
    size = 0
    for chunk in response.iter_raw():  # as it comes: whoever drips must not hide from the clock
        size += len(chunk)
        if size > most:
            raise _too_large(place, most, param)
        if time.monotonic() > deadline:
            raise SourceUnavailable(f"{place.url[:200]} took too long", code="source_too_slow", param=param)
        yield chunk


def _too_large(place: Place, most: int, param: str) -> TooLarge:
    return TooLarge(
        f"{place.url[:200]} has more than the {most:,} bytes of PEFT_SERVICE_MAX_SOURCE_BYTES", param=param
    )
