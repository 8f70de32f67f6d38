"""Who is let in by the cluster of a run."""

from __future__ import annotations

import datetime as dt
import ssl

import distributed
import pytest
from cryptography import x509

from slidecube.cluster.clusters import open_cluster
from slidecube.cluster.credentials import fresh_security
from slidecube.cluster.resources import Profile, Resources


def test_only_who_has_the_credentials_is_let_in():
    """Whoever else is on the machine could run what he likes as the user, and read the keys in his environment."""
    profile = Profile(name="d", runner="dask-local", workers=1, worker=Resources(cpus=1, mem_gb=1.0))
    opened = open_cluster(profile)
    try:
        address = opened.cluster.scheduler_address
        worker = next(iter(opened.client.scheduler_info()["workers"]))
        assert opened.client.submit(lambda: 7).result() == 7
        for at in (address, worker):
            assert at.startswith("tls://127.0.0.1:")
            port = at.rpartition(":")[2]
            for strange, security in ((f"tcp://127.0.0.1:{port}", None), (at, fresh_security())):
                with pytest.raises((OSError, TimeoutError)):
                    distributed.Client(strange, security=security, timeout=1, set_as_default=False)
    finally:
        opened.close(10)


def test_credentials_are_good_while_clocks_differ():
    """Also where a node's clock is behind, or is set back in the middle of a run."""
    security = fresh_security()
    made = x509.load_pem_x509_certificate(security.tls_ca_file.encode())
    now = dt.datetime.now(dt.UTC)
    assert made.not_valid_before_utc < now - dt.timedelta(days=1)
    assert made.not_valid_after_utc > now + dt.timedelta(days=365)
    for role in ("client", "scheduler", "worker"):
        context = security.get_connection_args(role)["ssl_context"]
        assert context.verify_mode == ssl.CERT_REQUIRED
