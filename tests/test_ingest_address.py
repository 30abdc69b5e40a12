"""Which addresses cameras and downloads may have."""

import pytest

from ingest.address import (
    AddressPolicy,
    BadUrl,
    UnknownHost,
    check_camera_url,
    check_download_url,
    public_url,
)
from ingest.settings import IngestSettings

PUBLIC = AddressPolicy()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "10.1.2.3",
        "192.168.1.10",
        "172.16.0.9",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "localhost",
        "[::1]",
        "[::]",
        "[fe80::1]",
        "[fd00::1]",
        "[fec0::1]",
        "[ff02::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:10.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "2130706433",
        "0x7f.1",
    ],
)
async def test_addresses_that_are_not_public_are_refused(host):
    with pytest.raises(BadUrl, match="TOKENLINE_INGEST__ALLOWED_NETWORKS"):
        await check_camera_url(f"rtsp://{host}/cam", PUBLIC)
    with pytest.raises(BadUrl):
        await check_download_url(f"http://{host}/clip.mp4", PUBLIC)


@pytest.mark.parametrize("host", ["8.8.8.8", "[2606:4700::1111]"])
async def test_public_addresses_are_fine(host):
    await check_camera_url(f"rtsp://{host}:8554/cam?channel=1", PUBLIC)
    await check_download_url(f"https://{host}/clip.mp4", PUBLIC)


async def test_allowed_networks_open_exactly_themselves():
    policy = AddressPolicy(("192.168.0.0/16", "::1/128"))
    await check_camera_url("rtsp://192.168.3.4/cam", policy)
    await check_camera_url("rtsps://[::1]/cam", policy)
    with pytest.raises(BadUrl):
        await check_camera_url("rtsp://10.0.0.1/cam", policy)


@pytest.mark.parametrize(
    "url",
    [
        "http://8.8.8.8/cam",
        "file:///etc/passwd",
        "concat:a|b",
        "tcp://8.8.8.8:80?listen=1",
        "/etc/passwd",
        "",
        "rtsp://",
        "rtsp:///cam",
        "rtsp://8.8.8.8:99999/cam",
        "rtsp://8.8.8.8:0/cam",
        "rtsp://8.8.8.8:x/cam",
        "rtsp://[::1/cam",
        "rtsp://8.8.8.8/a b",
        "rtsp://8.8.8.8/a\r\nHost: b",
        "rtsp://8.8.8.8/\x00",
        "rtsp://8.8.8.8\\@127.0.0.1/",
        "rtsp://8.8.8.8/" + "a" * 3000,
    ],
)
async def test_what_is_no_camera_url_is_refused(url):
    with pytest.raises(BadUrl):
        await check_camera_url(url, PUBLIC)


async def test_credentials_inside_the_url_are_refused_without_repeating_them():
    with pytest.raises(BadUrl, match="fields username and password") as caught:
        await check_camera_url("rtsp://admin:s3cret@8.8.8.8/cam", PUBLIC)
    assert "s3cret" not in str(caught.value)


async def test_a_host_that_does_not_resolve_is_named():
    with pytest.raises(UnknownHost, match=r"no-such-camera\.invalid"):
        await check_camera_url("rtsp://no-such-camera.invalid/cam", PUBLIC)


def test_a_public_url_has_neither_credentials_nor_query():
    assert public_url("rtsp://u:p@host:1/a?token=x#y") == "rtsp://host:1/a"
    assert public_url("rtsp://[::1/a") == "(unreadable URL)"


def test_settings_refuse_networks_that_do_not_parse():
    with pytest.raises(ValueError, match="allowed_networks"):
        IngestSettings(allowed_networks=("everything",))


def test_settings_refuse_leases_shorter_than_their_renewal():
    with pytest.raises(ValueError, match="must be shorter"):
        IngestSettings(lease_s=2, renew_s=5)
