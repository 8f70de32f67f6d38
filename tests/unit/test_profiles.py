"""Profiles as they are read."""

from __future__ import annotations

import pytest

from slidecube.cluster.errors import ClusterError
from slidecube.cluster.resources import load_profile


def written(tmp_path, text: str) -> str:
    path = tmp_path / "site.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "address",
    ["tcp://10.0.0.5:8786", "node-1.example.org:8786", "tls://[fe80::1]:8786", "ucx://ib0_node:8786"],
)
def test_addresses_of_schedulers(tmp_path, address):
    profile = load_profile(written(tmp_path, f'runner = "dask-address"\naddress = "{address}"\n'))
    assert profile.options["address"] == address


@pytest.mark.parametrize(
    "address",
    ["scheduler", "tcp://10.0.0.5", "http://10.0.0.5:8786", "tcp://node:port", "tcp//node:8786", " "],
)
def test_an_address_that_is_none_is_refused_before_anything_is_asked(tmp_path, address):
    with pytest.raises(
        ClusterError, match=r"address: .*allowed: tcp://host:port, such as .*, got '"
    ) as refused:
        load_profile(written(tmp_path, f'runner = "dask-address"\naddress = "{address}"\n'))
    assert repr(address) in str(refused.value)
