"""The table and the picture of a spectrum, on the published eigenvalues of three sites."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from slidecube.pipeline.mnf import Mnf
from slidecube.pipeline.report.spectrum import markdown_table, spectrum, write_spectrum

# CAE (Shahabi 2021), Table 3: eigenvalues and what they cumulate to, as printed
PUBLISHED = {
    "India": (
        (91.78, 70.41, 13.59, 12.85, 11.25, 5.69, 4.15, 2.81, 2.23, 1.80, 1.51),
        (0.42, 0.74, 0.81, 0.87, 0.92, 0.94, 0.96, 0.97, 0.98, 0.99, 1.00),
    ),
    "China": (
        (88.53, 72.10, 12.04, 11.05, 9.68, 6.89, 3.57, 2.42, 1.92, 1.55, 1.30),
        (0.42, 0.76, 0.82, 0.87, 0.92, 0.95, 0.96, 0.98, 0.99, 0.99, 1.00),
    ),
    "Taiwan": (
        (95.76, 78.10, 15.33, 9.85, 8.41, 6.02, 4.01, 2.72, 2.16, 1.74, 1.46),
        (0.42, 0.77, 0.84, 0.89, 0.92, 0.95, 0.96, 0.98, 0.99, 0.99, 1.00),
    ),
}


def fitted(eigenvalues, components=3):
    n = len(eigenvalues)
    eye = tuple(tuple(row) for row in np.eye(n).tolist())
    return Mnf(
        bands=tuple(f"b{i}" for i in range(n)), mean=(0.0,) * n, eigenvalues=eigenvalues, weights=eye,
        inverse_weights=eye, components=components, pixels=2_500_000,
    )  # fmt: skip


@pytest.mark.parametrize("site", PUBLISHED)
def test_shares_are_the_paper_s(site):
    eigenvalues, cumulated = PUBLISHED[site]
    rows = spectrum(fitted(eigenvalues))

    assert [row.component for row in rows] == list(range(1, 12))
    # the paper rounds, in places downwards
    np.testing.assert_allclose([row.cumulated for row in rows], cumulated, atol=0.0101)
    assert rows[2].cumulated > 0.8


def test_files_hold_the_rows(tmp_path):
    mnf = fitted(PUBLISHED["India"][0])
    paths = write_spectrum(mnf, tmp_path / "deep" / "folder")
    with paths["csv"].open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))

    assert [float(row["eigenvalue"]) for row in read] == list(mnf.eigenvalues)
    assert [float(row["cumulated"]) for row in read] == [row.cumulated for row in spectrum(mnf)]
    assert paths["markdown"].read_text(encoding="utf-8") == markdown_table(mnf)
    assert "| 1 | 91.78 | 0.421 | 0.421 |" in markdown_table(mnf)
    assert "| 3 | 13.59 | 0.062 | 0.806 |" in markdown_table(mnf)
    with Image.open(paths["picture"]) as picture:
        assert picture.size == (704, 396)
        assert len(picture.convert("RGB").getcolors(100_000)) > 20
    assert paths["picture"].stat().st_size < 60_000


def test_the_same_transform_gives_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        write_spectrum(fitted((5.0, 1.0), components=2), tmp_path / folder)
    for name in ("mnf.csv", "mnf.md", "mnf.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
