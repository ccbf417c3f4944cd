from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any

import httpx
import pytest

from service.public_url import ForbiddenAddress, check_url, is_public, pinned_request


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fd00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)
def test_an_address_of_a_network_of_ones_own_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://example.org/", "https"),
        ("file:///etc/passwd", "https"),
        ("https://", "host"),
        ("nonsense", "https"),
        ("http://[::1", "no URL"),
        ("http://hooks..example.org/", "no URL"),
        (f"http://{'a' * 64}.org/", "no URL"),
        ("http://user:pass@example.org/", "password"),
        ("http://localhost/x", "not a public"),
        ("http://127.0.0.1:8000/", "not a public"),
        ("http://[::1]/", "not a public"),
        ("http://[::ffff:169.254.169.254]/", "not a public"),
        ("http://example.org/" + "x" * 2048, "2048"),
        ("http://exa\nmple.org/", "no URL"),
    ],
)
def test_a_url_that_will_not_be_called_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(ForbiddenAddress, match=reason):
        check_url(url, allow_private=False)


def test_private_addresses_can_be_allowed() -> None:
    assert check_url("http://localhost:8000/x", allow_private=True).port == 8000
    assert check_url("https://example.org/hook", allow_private=False).host == "example.org"


def _resolving_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Any name, in any form of it, means these addresses."""

    async def getaddrinfo(self: object, host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)


def _request(url: str, *, allow_private: bool = False) -> httpx.Request:
    async def work() -> httpx.Request:
        async with httpx.AsyncClient(trust_env=False) as client:
            return await pinned_request(client, url, content="{}", headers={}, allow_private=allow_private)

    return asyncio.run(work())


@pytest.mark.parametrize("addresses", [("127.0.0.1",), ("1.1.1.1", "10.0.0.1"), ("fe80::1%eth0",)])
def test_a_name_that_means_a_private_address_is_refused(
    monkeypatch: pytest.MonkeyPatch, addresses: tuple[str, ...]
) -> None:
    _resolving_to(monkeypatch, *addresses)
    with pytest.raises(ForbiddenAddress, match="not a public address"):
        _request("https://rebinding.example/")


def test_numbers_that_the_resolver_takes_for_an_address_are_looked_at_too() -> None:
    """2130706433 is 127.0.0.1 to getaddrinfo, and no address to a parser of URLs."""
    with pytest.raises((ForbiddenAddress, OSError)):
        _request("http://2130706433/")
    with pytest.raises((ForbiddenAddress, OSError)):
        _request("http://0x7f.1/")


def test_the_request_goes_to_the_address_that_was_looked_at_and_names_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    _resolving_to(monkeypatch, "1.1.1.1")
    request = _request("https://hooks.example:8443/a?b=c#d")
    assert str(request.url) == "https://1.1.1.1:8443/a?b=c"
    assert request.headers["host"] == "hooks.example:8443"
    assert request.extensions["sni_hostname"] == "hooks.example"
    _resolving_to(monkeypatch, "2606:4700:4700::1111")
    assert str(_request("https://bücher.example/").url) == "https://[2606:4700:4700::1111]/"
    assert _request("https://bücher.example/").headers["host"] == "xn--bcher-kva.example"
