"""Which addresses may be read: schemes, credentials and networks, checked before anything connects."""

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import SplitResult, urlsplit

ALLOWED_NETWORKS_SETTING = "TOKENLINE_INGEST__ALLOWED_NETWORKS"
CAMERA_PORTS = {"rtsp": 554, "rtsps": 322}
DOWNLOAD_PORTS = {"http": 80, "https": 443}
MAX_URL_LENGTH = 2048

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Not public though `is_global` says so: carrier-grade NAT, and the private networks that IPv6 had before fd00::/8.
_INSIDE = (ipaddress.ip_network("100.64.0.0/10"), ipaddress.ip_network("fec0::/10"))


class BadUrl(ValueError):
    """The URL may not be used; the message says why and what to do, and holds no credentials."""


class UnknownHost(BadUrl):
    """The host name does not resolve (now)."""


@dataclass(frozen=True)
class AddressPolicy:
    """Public addresses are fine; any other must lie inside one of `allowed_networks` (CIDR).

    Raises ValueError for a network that does not parse.
    """

    allowed_networks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _ = self._networks()

    def _networks(self) -> Sequence[IPv4Network | IPv6Network]:
        return [ipaddress.ip_network(network) for network in self.allowed_networks]

    def permits(self, address: str) -> bool:
        """Tell whether a numeric address may be connected to."""
        ip = _plain(ipaddress.ip_address(address.partition("%")[0]))
        if any(ip.version == network.version and ip in network for network in self._networks()):
            return True
        inside = any(ip.version == network.version and ip in network for network in _INSIDE)
        return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or inside)


async def check_camera_url(url: str, policy: AddressPolicy) -> None:
    """Check scheme, form and every address of an RTSP URL. Raises BadUrl."""
    await asyncio.to_thread(resolve_camera, url, policy)


async def check_download_url(url: str, policy: AddressPolicy) -> None:
    """Check scheme, form and every address of an HTTP URL. Raises BadUrl."""
    await asyncio.to_thread(resolve_download, url, policy)


def resolve_camera(url: str, policy: AddressPolicy) -> str:
    """Return the checked numeric address of an RTSP URL's host; blocks on the resolver. Raises BadUrl."""
    return _resolve(url, CAMERA_PORTS, policy)


def resolve_download(url: str, policy: AddressPolicy) -> str:
    """Return the checked numeric address of an HTTP URL's host; blocks on the resolver. Raises BadUrl."""
    return _resolve(url, DOWNLOAD_PORTS, policy)


def public_url(url: str) -> str:
    """Return the URL without credentials, query and fragment, fit for logs and messages."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(unreadable URL)"
    place = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=place, query="", fragment="").geturl()


def _resolve(url: str, ports: dict[str, int], policy: AddressPolicy) -> str:
    parts, port = _parse(url, ports)
    host = parts.hostname or ""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise UnknownHost(f"the host {host!r} does not resolve: check its spelling and the name service") from None
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not policy.permits(address):
            raise BadUrl(
                f"the host {host!r} has the address {address}, which is not public: "
                f"add its network to {ALLOWED_NETWORKS_SETTING} to allow it"
            )
    return addresses[0]


def _parse(url: str, ports: dict[str, int]) -> tuple[SplitResult, int]:
    """Split a URL; every message here must do without the URL, which may hold a password."""
    if len(url) > MAX_URL_LENGTH:
        raise BadUrl(f"the URL has {len(url)} characters; at most {MAX_URL_LENGTH} are allowed")
    if any(character.isspace() or not character.isprintable() for character in url):
        raise BadUrl("the URL holds spaces or control characters: percent-encode them")
    schemes = " or ".join(f"{scheme}://" for scheme in ports)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise BadUrl(f"the URL cannot be read: write it as {schemes}host[:port]/path") from None
    if parts.scheme not in ports:
        raise BadUrl(f"the URL must start with {schemes}")
    if "@" in parts.netloc:
        raise BadUrl("the URL holds credentials: give them in the fields username and password instead")
    if not parts.hostname or "\\" in url:
        raise BadUrl(f"the URL names no host: write it as {schemes}host[:port]/path")
    if port == 0:
        raise BadUrl("the URL has port 0: name the port of the server")
    return parts, port or ports[parts.scheme]


def _plain(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Return the IPv4 address inside an IPv6 one that leads to it (mapped, 6to4, NAT64), else the address."""
    if isinstance(ip, IPv4Address):
        return ip
    inner = ip.ipv4_mapped or ip.sixtofour
    if inner is None and ip in _NAT64:
        inner = IPv4Address(int(ip) & 0xFFFFFFFF)
    return inner or ip
