"""Fetch an image from a host that the settings allow: every address is checked, and the checked one is connected to.

A name is resolved once per request, all of its addresses must be public, and the connection goes to one of these, so a
name that resolves to another address a moment later gains nothing. Redirects are followed here, with the same checks.
"""

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse
from collections.abc import Sequence

from unimm.errors import UserError, shown

SECONDS = 20.0
MOST_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_CHUNK = 1 << 16


def fetch(url: str, hosts: Sequence[str], most_bytes: int) -> bytes:
    """Return the bytes at an http(s) URL.

    Args:
        hosts: names of the hosts that are allowed, with ":port" if it is not the scheme's own.
        most_bytes: longest answer.

    Raises:
        UserError: if a host on the way is not allowed or has an address that is not public, or the fetch fails.
    """
    until = time.monotonic() + SECONDS
    for _ in range(MOST_REDIRECTS + 1):
        scheme, host, port, path = _parts(url, hosts)
        address = public_address(host, port)
        try:
            found = _get(scheme, host, port, address, path, most_bytes, until)
        except UserError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(f"The image {shown(url)} cannot be fetched: {type(error).__name__}.") from None
        if isinstance(found, bytes):
            return found
        url = urllib.parse.urljoin(url, found)
    raise UserError(f"The image's address redirects more than {MOST_REDIRECTS} times: give the final one.")


def _parts(url: str, hosts: Sequence[str]) -> tuple[str, str, int, str]:
    """Return scheme, host, port and path of an allowed URL."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise UserError(f"{shown(url)} is no address of an image.") from None
    if parts.scheme not in _PORTS or parts.username is not None or not host.isascii() or not url.isprintable():
        raise UserError(f"{shown(url)} is no address of an image: give http:// or https:// and a host.")
    named = host if port in (None, _PORTS[parts.scheme]) else f"{host}:{port}"
    if named not in hosts:
        raise UserError(f"Images of the host {shown(named)} are not fetched here: send the image as a data URL.")
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    return parts.scheme, host, port or _PORTS[parts.scheme], f"{path}?{query}" if query else path


def public_address(host: str, port: int) -> str:
    """Return an address of the host; all that it has must be public.

    Raises:
        UserError: if the name is unknown, or an address is private, local or otherwise not public.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise UserError(f"The host {shown(host)} is unknown.") from None
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise UserError(f"The host {shown(host)} is not a public one: send the image as a data URL.")
    return addresses[0]


def is_public(address: str) -> bool:
    """Return whether an IP address is reachable by everyone: neither private, loopback, link-local nor reserved, also
    not inside IPv6."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if inner is None and parsed in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return parsed.is_global and not parsed.is_multicast


def _get(scheme: str, host: str, port: int, address: str, path: str, most_bytes: int, until: float) -> bytes | str:
    """Return the body of a GET, or the address that it redirects to."""
    connection = http.client.HTTPConnection(host, port, timeout=_left(until))
    connection.sock = socket.create_connection((address, port), timeout=_left(until))
    try:
        if scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "unimm"})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308) and (target := answer.headers.get("Location")):
            return target
        if answer.status != 200:
            raise UserError(f"The image at {shown(host)} cannot be fetched: the answer is {answer.status}.")
        data = bytearray()
        while chunk := answer.read(_CHUNK):
            data += chunk
            if len(data) > most_bytes:
                raise UserError(f"The image at {shown(host)} has more than {most_bytes} bytes: give a smaller one.")
            _left(until)
        return bytes(data)
    finally:
        connection.close()


def _left(until: float) -> float:
    """Return the seconds left; raise TimeoutError if there are none."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
