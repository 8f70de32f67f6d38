"""MNF equals Spectral Python's on real scenes, one after another, without a mask."""

from __future__ import annotations

import numpy as np
import pytest
import spectral
import xarray as xr

from slidecube.pipeline.mnf import fit_mnf
from slidecube.pipeline.mnf_strata import fit_strata
from slidecube.pipeline.moments import moments

BANDS_10M, BANDS_20M = ("B02", "B03", "B04", "B08"), ("B05", "B06", "B07", "B8A", "B11", "B12")
SITE = "worldcereal_series/site_31UDS/S2_L2A_{}_00002806639B424A_32631_2017-08-01_2018-11-30.nc"


def slovenia(shared_data):
    """Five scenes of 13 bands, reflectance."""
    scenes = np.load(shared_data / "eolearn_slovenia" / "REFERENCE_SCENES.npy")
    for i, scene_yxb in enumerate(scenes):
        yield f"slovenia {i}", np.moveaxis(scene_yxb, -1, 0)


def flanders(shared_data):
    """Dates of ten bands, digital numbers, of which every pixel is there and less than a tenth is cloud or shadow."""
    ten, twenty = (
        xr.open_dataset(shared_data / SITE.format(resolution), mask_and_scale=False)
        for resolution in ("10m", "20m")
    )
    with ten, twenty:
        for t, date in enumerate(ten["timestamp"].dt.strftime("%Y-%m-%d").values):
            fine = [ten[band][t].values for band in BANDS_10M]
            coarse = [
                np.kron(twenty[band][t].values, np.ones((2, 2), twenty[band].dtype)) for band in BANDS_20M
            ]
            cloudy = np.isin(twenty["SCL"][t].values, (0, 1, 3, 8, 9, 10, 11)).mean()
            values = np.stack(fine + coarse)
            if cloudy < 0.1 and (values > 0).all() and (values < 30_000).all():
                yield date, values


def equal_to_spy(values_byx, name):
    names = [f"B{i}" for i in range(len(values_byx))]
    cube = xr.Dataset({n: (("y", "x"), v) for n, v in zip(names, values_byx, strict=True)})
    ours = fit_mnf(moments(cube), bands=names, components=len(names))
    scene_yxb = np.moveaxis(values_byx, 0, -1).astype(np.float64)
    theirs = spectral.mnf(spectral.calc_stats(scene_yxb), spectral.noise_from_diffs(scene_yxb))

    np.testing.assert_allclose(ours.eigenvalues, theirs.napc.eigenvalues, rtol=1e-6, err_msg=name)
    reduced = theirs.reduce(scene_yxb, num=len(names))
    for k, component in enumerate(ours.transform(cube).values()):
        expected = reduced[..., k] * np.sign((reduced[..., k] * component.values).sum())
        worst = np.abs(component.values - expected).max() / expected.std()
        assert worst < 1e-5, f"{name}: component {k + 1} differs by {worst} of its standard deviation"


@pytest.mark.parametrize("scenes", [slovenia, flanders])
def test_mnf_equals_spy_on_real_scenes(shared_data, scenes):
    compared = 0
    for name, values_byx in scenes(shared_data):
        equal_to_spy(values_byx, name)
        compared += 1

    assert compared >= 5


@pytest.mark.parametrize("scenes", [slovenia, flanders])
def test_mnf_of_each_stratum_equals_spy_s_under_its_mask(shared_data, scenes):
    """Strata cut by a slanting line through a scene; SPy takes a rectangle of differences, so its noise is masked."""
    for _, (name, values_byx) in zip(range(2), scenes(shared_data), strict=False):
        names = tuple(f"B{i}" for i in range(len(values_byx)))
        height, width = values_byx.shape[1:]
        row, col = np.mgrid[:height, :width]
        left = col * 3 < width + row
        scene_yxb = np.moveaxis(values_byx, 0, -1).astype(np.float64)
        cube = xr.Dataset(
            {n: (("y", "x"), v.astype(np.float64)) for n, v in zip(names, values_byx, strict=True)}
        )
        masks = {"left": left, "right": ~left}
        sums = {n: moments(cube.where(xr.DataArray(m, dims=("y", "x")))) for n, m in masks.items()}
        fits = fit_strata(moments(cube), sums, bands=names, components=len(names))
        for stratum, mask in masks.items():
            signal = spectral.calc_stats(scene_yxb, mask=mask.astype(int))
            pairs = mask[:-1, :-1] & mask[1:, 1:]
            differences = (scene_yxb[:-1, :-1] - scene_yxb[1:, 1:])[pairs]
            noise = spectral.GaussianStats(
                differences.mean(axis=0), np.cov(differences.T) / 2, nsamples=len(differences)
            )
            theirs = spectral.mnf(signal, noise)
            ours = fits.of(stratum)
            assert ours.pixels == mask.sum()
            np.testing.assert_allclose(ours.eigenvalues, theirs.napc.eigenvalues, rtol=1e-6, err_msg=name)
            reduced = theirs.reduce(scene_yxb, num=len(names))
            found = ours.transform(cube, components=len(names))
            for k, component in enumerate(found.values()):
                expected = reduced[..., k] * np.sign((reduced[..., k] * component.values)[mask].sum())
                worst = np.abs(component.values - expected)[mask].max() / expected[mask].std()
                assert worst < 1e-5, f"{name} {stratum}: component {k + 1} differs by {worst}"


def test_noise_is_spys_noise_and_signal_its_signal(shared_data):
    _, values_byx = next(slovenia(shared_data))
    cube = xr.Dataset({f"B{i}": (("y", "x"), v) for i, v in enumerate(values_byx)})
    found = moments(cube)
    scene_yxb = np.moveaxis(values_byx, 0, -1).astype(np.float64)
    signal, noise = spectral.calc_stats(scene_yxb), spectral.noise_from_diffs(scene_yxb)

    assert (found.pixels, found.pairs) == (signal.nsamples, noise.nsamples)
    np.testing.assert_allclose(found.mean, signal.mean, rtol=1e-13)
    np.testing.assert_allclose(found.covariance, signal.cov, rtol=1e-9, atol=1e-12 * signal.cov.max())
    np.testing.assert_allclose(found.noise_covariance, noise.cov, rtol=1e-9, atol=1e-12 * noise.cov.max())
