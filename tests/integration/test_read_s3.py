"""Scenes in buckets: a real S3 server on this machine, the standard chain of credentials, and who pays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import boto3
import numpy as np
import pytest
import rasterio
from odc.geo.geobox import GeoBox
from rasterio.transform import from_origin

from slidecube.catalog import read as read_module
from slidecube.catalog import sources as sources_module
from slidecube.catalog.errors import AssetReadError
from slidecube.catalog.read import Asset, Pixels, Place, read_asset
from slidecube.catalog.sources import SOURCES, s3_options

LEFT, TOP, SIDE = 491_520.0, 5_324_800.0, 512
PIXELS = Pixels(dtype="uint16", kernel="nearest", nodata=0, fill=0)
BOX = GeoBox((SIDE, SIDE), from_origin(LEFT, TOP, 10, 10), "EPSG:32633")
KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


@pytest.fixture(scope="module")
def bucket(s3_server, tmp_path_factory):
    """Host and port of the server, and the pixels of its one scene, in the bucket `scenes`."""
    values = np.random.default_rng(0).integers(1, 5000, (SIDE, SIDE)).astype("uint16")
    path = tmp_path_factory.mktemp("s3") / "B04.tif"
    profile = {
        "driver": "COG", "width": SIDE, "height": SIDE, "count": 1, "dtype": "uint16", "crs": "EPSG:32633",
        "transform": from_origin(LEFT, TOP, 10, 10), "nodata": 0, "blocksize": 256, "compress": "deflate",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        file.write(values, 1)
    client = boto3.client(
        "s3",
        endpoint_url=s3_server,
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
    )
    client.create_bucket(Bucket="scenes")
    client.upload_file(str(path), "scenes", "tiles/32/B04.tif", ExtraArgs={"ACL": "public-read"})
    return s3_server.removeprefix("http://"), values


@pytest.fixture
def endpoint(bucket, monkeypatch):
    """The server as GDAL is told of a site's own endpoint, and credentials in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_S3_ENDPOINT", bucket[0])
    monkeypatch.setenv("AWS_HTTPS", "NO")
    monkeypatch.setenv("AWS_VIRTUAL_HOSTING", "FALSE")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setattr(read_module, "_FIRST_WAIT_S", 0.001)
    return bucket


def read(href, source="catalogue.json"):
    return read_asset(
        Asset(item="S2A_X", asset="red", places=(Place(href=href, source=source),)), BOX, PIXELS, None
    )


def test_a_bucket_is_read_by_the_standard_chain(endpoint):
    np.testing.assert_array_equal(read("s3://scenes/tiles/32/B04.tif"), endpoint[1])


def test_the_endpoint_of_other_programs_is_ours_too(endpoint, monkeypatch):
    """But for no provider of the table: a site's own store says nothing of where theirs lie."""
    for name in ("AWS_S3_ENDPOINT", "AWS_HTTPS", "AWS_VIRTUAL_HOSTING"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint[0]}")
    np.testing.assert_array_equal(read("s3://scenes/tiles/32/B04.tif"), endpoint[1])
    for name in SOURCES:
        options = s3_options("s3://x/y.tif", name, {"AWS_ENDPOINT_URL": f"http://{endpoint[0]}"})
        assert endpoint[0] not in options.values()


def test_a_missing_object_is_no_passing_fault_and_tells_no_key(endpoint):
    with pytest.raises(AssetReadError) as caught:
        read("s3://scenes/tiles/32/B08.tif")
    assert caught.value.fault == "data"
    assert KEY not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_profile_is_as_good_as_the_environment(endpoint, tmp_path, monkeypatch):
    path = tmp_path / "credentials"
    path.write_text(f"[eodata]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_PROFILE", "eodata")
    np.testing.assert_array_equal(read("s3://scenes/tiles/32/B04.tif"), endpoint[1])


@pytest.mark.parametrize("signing", ["none", "aws-requester-pays", "cdse-s3"])
def test_each_kind_of_source_reads_as_its_provider_asks(endpoint, monkeypatch, signing):
    """What GDAL sends is seen by GDAL's own trace of the requests, of a process of its own."""
    known = SOURCES["earth-search/sentinel-2-l1c"]
    monkeypatch.setitem(SOURCES, "loopback/s2", replace(known, name="loopback/s2", signing=signing))
    if signing == "cdse-s3":  # the provider's own endpoint, which an environment's replaces
        assert s3_options("s3://eodata/x.tif", "loopback/s2", {}) == {
            "AWS_S3_ENDPOINT": "eodata.dataspace.copernicus.eu",
            "AWS_VIRTUAL_HOSTING": "FALSE",
        }
    program = f"""
import sys
from dataclasses import replace
from slidecube.catalog.sources import SOURCES
from slidecube.catalog.read import Place, with_opened
known = SOURCES["earth-search/sentinel-2-l1c"]
SOURCES["loopback/s2"] = replace(known, name="loopback/s2", signing={signing!r})
place = Place(href="s3://scenes/tiles/32/B04.tif", source="loopback/s2")
print(with_opened(place, lambda opened: int(opened.read(1).sum())))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CPL_CURL_VERBOSE": "YES"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == endpoint[1].sum()
    sent = {
        line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in done.stderr.splitlines()
    }
    assert ("authorization" in sent) == (signing != "none")
    assert sent.get("x-amz-request-payer") == ("requester" if signing == "aws-requester-pays" else None)


def test_the_table_is_read_as_its_rows_say():
    by_signing = {source.signing for source in SOURCES.values()}
    assert by_signing <= sources_module._S3_OPTIONS.keys()
    for name in SOURCES:
        assert s3_options("https://bucket.s3.amazonaws.com/x.tif", name, {}) == {}
    assert s3_options("s3://sentinel-s2-l1c/x.jp2", "earth-search/sentinel-2-l1c", {}) == {
        "AWS_REQUEST_PAYER": "requester"
    }
    assert s3_options("s3://private/x.tif", "/data/catalog.json", {}) == {}
    assert json.dumps(
        s3_options("s3://sentinel-cogs/x.tif", "earth-search/sentinel-2-l2a", {})
    ) == json.dumps({"AWS_NO_SIGN_REQUEST": "YES"})
