"""Requests to URLs that a client of the service named: only to addresses that are public, whatever a name means.

Without that a webhook would be a way into the network of the service: its own ports, its neighbours, the metadata
service of a cloud. The name is resolved here, each address is looked at, and the request goes to the very address that
was looked at, so that a second answer of the name server changes nothing. Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Mapping

import httpx

MAX_LENGTH = 2048
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class ForbiddenAddress(Exception):
    """The URL will not be called; the message says why."""


def check_url(url: str, *, allow_private: bool) -> httpx.URL:
    """Without a look-up: names may turn out to be private when they are called. Raises ForbiddenAddress."""
    if len(url) > MAX_LENGTH:
        raise ForbiddenAddress(f"a URL has at most {MAX_LENGTH} characters")
    try:
        parsed = httpx.URL(url)
        host = parsed.host
        parsed.raw_host.decode("ascii").encode("idna")  # as a look-up does, which refuses labels of no or 64 letters
    except (httpx.InvalidURL, ValueError, UnicodeError) as error:
        raise ForbiddenAddress(f"{url!r:.200} is no URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not host:
        raise ForbiddenAddress(f"{url!r:.200}: a URL with https:// or http:// and a host is expected")
    if parsed.userinfo:
        raise ForbiddenAddress("a URL with a user and a password is not called; put a token into the path")
    address = _literal(host)
    if not allow_private and (host == "localhost" or (address is not None and not is_public(address))):
        raise ForbiddenAddress(f"{host} is not a public address")
    return parsed


async def pinned_request(
    client: httpx.AsyncClient, url: str, *, content: str, headers: Mapping[str, str], allow_private: bool
) -> httpx.Request:
    """A POST to the address that `url` means now. Certificates are still checked for its name.

    Raises ForbiddenAddress, and OSError for a name that means nothing.
    """
    parsed = check_url(url, allow_private=allow_private)
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    address = await _address(parsed.raw_host.decode("ascii"), port, allow_private=allow_private)
    return client.build_request(
        "POST",
        parsed.copy_with(host=str(address), fragment=None),
        content=content,
        headers={**headers, "host": parsed.netloc.decode("ascii")},
        extensions={"sni_hostname": parsed.raw_host.decode("ascii")},
    )


async def _address(host: str, port: int, *, allow_private: bool) -> Address:
    """One that the name means, where all that it means are allowed."""
    found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(entry[4][0]).split("%")[0]) for entry in found]
    for address in addresses:
        if not allow_private and not is_public(address):
            raise ForbiddenAddress(f"{host} is {address}, which is not a public address")
    return addresses[0]


def is_public(address: Address) -> bool:
    """Also of an IPv4 address inside of an IPv6 one."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
