"""The whole unsupervised chain of a 2048 px tile beside the script that one would write from the paper.

Both read the same stored layers (ten bands of uint16, slope, in 512 px chunks), make NDVI, slope and three MNF
components, encode, and assign to the same centres with the same weights; each in a fresh process, on the same number
of threads. The script: SPy's MNF, torch on batches of 10,000 patches, scikit-learn's `predict` over all pixels. MNF is
fitted once a run and not once a tile: its fit is timed apart, on either side. On a shared machine CPU seconds say more
than seconds. A few pixels fall to another cluster, because SPy takes the mean of a float32 image in float32.
Usage: make bench, or python tests/benchmarks/chain_2048.py
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDE_PX = 2048
BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")


def main() -> None:
    """Run each side in its own processes; print seconds, peak memory and their ratios."""
    with tempfile.TemporaryDirectory(prefix="slidecube-bench-") as name:
        folder = Path(name)
        run("prepare", 2, folder)  # apart: a process that a large one starts inherits its peak
        for threads in (1, 2):
            found = {side: run(side, threads, folder) for side in ("slidecube", "script")}
            for side, got in found.items():
                said = "  ".join(f"{key} {value:.2f}" for key, value in got.items())
                print(f"{threads} thread(s)  {side:>9}  {said}")
            said = "  ".join(
                f"{key} {found['script'][key] / value:.2f}" for key, value in found["slidecube"].items()
            )
            print(
                f"{threads} thread(s)  ratio      {said}  (pixels of the same cluster {agreement(folder):.4f})"
            )


def run(side: str, threads: int, folder: Path) -> dict[str, float]:
    """One side in a fresh process."""
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    said = subprocess.run(
        [sys.executable, __file__, side, str(threads), str(folder)],
        env={**os.environ, **limits},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return json.loads(said.splitlines()[-1])


def agreement(folder: Path) -> float:
    """Share of the pixels that both assign to the same cluster, borders of the tile apart."""
    import numpy as np

    ours, theirs = (np.load(folder / f"{side}.npy")[3:-3, 3:-3] for side in ("slidecube", "script"))
    return float((ours == theirs).mean())


def prepare(threads: int, folder: Path) -> dict[str, float]:
    """Stored layers of a made landscape, the fitted MNF, and a fitted model."""
    import numpy as np
    import scipy.ndimage
    import xarray as xr

    from slidecube.models.zoo import build_model

    rng = np.random.default_rng(0)
    latent = [
        scipy.ndimage.gaussian_filter(rng.normal(size=(SIDE_PX, SIDE_PX)).astype("f4"), s) * s * 3
        for s in (20, 8, 3)
    ]
    mixing = rng.normal(size=(len(BANDS), len(latent)))
    bands = np.empty((len(BANDS), SIDE_PX, SIDE_PX), np.uint16)
    for band, weights in zip(bands, mixing, strict=True):
        signal = sum(w * plane for w, plane in zip(weights, latent, strict=True))
        noise = 30 * rng.normal(size=(SIDE_PX, SIDE_PX))
        band[:] = np.clip(3500 + 300 * signal + noise, 1100, 12000)
    slope = np.clip(2500 + 900 * latent[0], 0, 8000).astype(np.uint16)
    layers = xr.Dataset(
        {name: (("y", "x"), plane) for name, plane in zip((*BANDS, "slope"), (*bands, slope), strict=True)}
    )
    layers.to_zarr(
        folder / "layers.zarr", encoding={name: {"chunks": (512, 512)} for name in layers}, consolidated=False
    )
    mnf, features = ours_features(folder)
    (folder / "mnf.json").write_text(mnf.to_json())
    stack = np.stack([features[name].values for name in features])
    y, x = rng.integers(3, SIDE_PX - 4, (2, 20_000))
    windows = np.lib.stride_tricks.sliding_window_view(stack, (7, 7), axis=(1, 2))
    model = build_model("cae-kmeans", parameters={"epochs": 5.0, "batch": 2000.0})
    model.fit(np.ascontiguousarray(windows[:, y - 3, x - 3].transpose(1, 0, 2, 3))).save(folder / "model")
    return {"threads": threads}


def ours_features(folder: Path, mnf=None):
    """The features of the model, lazily; fits the MNF where none is given."""
    import numpy as np
    import xarray as xr

    from slidecube.pipeline.composite import reflectance
    from slidecube.pipeline.indices import ndvi
    from slidecube.pipeline.mnf import fit_mnf, moments

    stored = xr.open_zarr(folder / "layers.zarr", consolidated=False)
    cube, slope = stored[list(BANDS)], stored["slope"]
    mnf = mnf or fit_mnf(moments(cube, nodata=0), bands=BANDS)
    features = mnf.transform(cube, suffix="post", nodata=0)
    features["ndvi_post"] = ndvi(reflectance(cube["B04"]), reflectance(cube["B08"]))
    features["slope_deg"] = slope.astype(np.float32) * np.float32(0.01)
    return mnf, features


def slidecube(threads: int, folder: Path) -> dict[str, float]:
    """What the tile program does."""
    import dask
    import numpy as np

    from slidecube.models.unsupervised import predict_clusters
    from slidecube.models.zoo import build_model
    from slidecube.pipeline.mnf import Mnf

    dask.config.set(scheduler="threads", num_workers=threads)
    model = build_model("cae-kmeans", parameters={"epochs": 5.0, "batch": 2000.0}).restore(folder / "model")
    start, start_cpu = time.perf_counter(), time.process_time()
    _, features = ours_features(folder, Mnf.from_json((folder / "mnf.json").read_text()))
    clusters = predict_clusters(model, features)["cluster"].values
    found = {
        "chain_s": time.perf_counter() - start,
        "cpu_s": time.process_time() - start_cpu,
        "peak_gb": peak(),
    }
    np.save(folder / "slidecube.npy", clusters)
    start = time.perf_counter()
    ours_features(folder)
    return {**found, "mnf_fit_s": time.perf_counter() - start}


def script(threads: int, folder: Path) -> dict[str, float]:
    """What one would write from the paper."""
    import numpy as np
    import spectral
    import torch
    import zarr
    from sklearn.cluster import MiniBatchKMeans

    from slidecube.models.zoo import build_model  # for the same weights and centres only
    from slidecube.pipeline.mnf import Mnf

    torch.set_num_threads(threads)
    fitted = (
        build_model("cae-kmeans", parameters={"epochs": 5.0, "batch": 2000.0})
        .restore(folder / "model")
        .fitted
    )
    ours = np.array(Mnf.from_json((folder / "mnf.json").read_text()).weights[:3])
    network, kmeans = published_encoder(fitted.network), MiniBatchKMeans(len(fitted.centres))
    kmeans.cluster_centers_, kmeans._n_threads = np.array(fitted.centres, np.float32), threads
    mean, std, spread = (np.array(v, np.float32) for v in (fitted.mean, fitted.std, fitted.spread))

    start, start_cpu = time.perf_counter(), time.process_time()
    layers = zarr.open_group(folder / "layers.zarr", mode="r")
    image = np.stack([layers[name][:] for name in BANDS], axis=-1).astype(np.float32)
    read_s, read_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    start = time.perf_counter()
    mnf = spectral.mnf(spectral.calc_stats(image), spectral.noise_from_diffs(image))
    mnf_fit_s = time.perf_counter() - start

    start, start_cpu = time.perf_counter(), time.process_time()
    transform = mnf.get_reduction_transform(num=3)
    components = transform(image)
    components *= np.sign((transform._A * ours).sum(axis=1))  # SPy leaves the sign open
    red, nir = ((image[:, :, BANDS.index(name)] - 1000) / 10000 for name in ("B04", "B08"))
    slope = layers["slope"][:] * 0.01
    stack = np.dstack([components, (nir - red) / (nir + red), slope]).astype(np.float32)
    stack = (stack - mean) / std
    padded = np.pad(stack, ((3, 3), (3, 3), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), axis=(0, 1))
    deep = np.empty((SIDE_PX**2, 12), np.float32)
    with torch.inference_mode():
        for first in range(0, len(deep), 10_000):
            y, x = np.divmod(np.arange(first, min(first + 10_000, len(deep))), SIDE_PX)
            batch = torch.from_numpy(windows[y, x]).contiguous(memory_format=torch.channels_last)
            deep[first : first + 10_000] = network(batch)[:, :, 0, 0].numpy()
    clusters = kmeans.predict(np.hstack([deep, stack.reshape(-1, 5)]) / spread)
    chain_s, cpu_s = read_s + time.perf_counter() - start, read_cpu + time.process_time() - start_cpu
    found = {"chain_s": chain_s, "cpu_s": cpu_s, "peak_gb": peak()}
    np.save(folder / "script.npy", clusters.reshape(SIDE_PX, SIDE_PX))
    return {**found, "mnf_fit_s": mnf_fit_s}


def published_encoder(weights: bytes):
    """The encoder for patches, in plain torch."""
    import safetensors.torch
    import torch
    from torch import nn

    network = nn.Sequential(
        nn.Conv2d(5, 8, 3), nn.PReLU(8), nn.Conv2d(8, 12, 3), nn.PReLU(12), nn.BatchNorm2d(12)
    )
    named = safetensors.torch.load(weights)
    network.load_state_dict(
        {k.removeprefix("features."): v for k, v in named.items() if k.startswith("features.")}
    )
    return nn.Sequential(network, nn.MaxPool2d(2)).to(memory_format=torch.channels_last).eval()


def peak() -> float:
    """Peak resident memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    if len(sys.argv) == 4:
        side = {"slidecube": slidecube, "script": script, "prepare": prepare}[sys.argv[1]]
        print(json.dumps(side(int(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main()
