"""Landslides without a label: mini-batch k-means on the deep features of an auto-encoder, or on its inputs alone.

Axes: n patch or pixel, f input feature, c feature that is clustered, k cluster, y row, x column.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors.numpy
import xarray as xr

from slidecube.models.card import FeatureSpec, ModelCard, merged_parameters
from slidecube.models.devices import Device, require_device
from slidecube.models.errors import ModelError
from slidecube.models.predict import Progress, on_lattice
from slidecube.models.weights import read_file, tensors_of, write_whole

UNKNOWN_CLUSTER = 255
"""Cluster of a pixel that is not known."""
WEIGHTS_FILE, MODEL_FILE = "weights.safetensors", "model.json"

POST_INPUTS = ("mnf1_post", "mnf2_post", "mnf3_post", "ndvi_post", "slope_deg")
"""Of the single image after the event: the published method."""
CHANGE_INPUTS = ("mnf1_change", "mnf2_change", "mnf3_change", "dndvi", "slope_deg")
"""The same of the change between two images."""
_VEGETATION = {"ndvi_post", "dndvi"}

KMEANS_DEFAULTS: Mapping[str, float] = {
    # "the best result with five classes" for the inputs alone (section 4.3 of the paper)
    "k": 5.0,
    # Patches that it learns from: 100 epochs take minutes and not half an hour
    "sample": 200_000.0,
    "seed": 0.0,
}
"""Parameters of `kmeans` and `kmeans-change`."""

CAE_DEFAULTS: Mapping[str, float] = {
    # "the best results ... with four classes using deep features" for two sites of three (section 4.3)
    "k": 4.0,
    # 1 = cluster the inputs beside the deep features, 0 = the deep features alone. The paper says both, and pictures
    # the first (Figures 12 to 14); alone, their clusters differed wholly from seed to seed on a made hillside
    "deep_and_inputs": 1.0,
    "sample": 200_000.0,
    # Optimum of the paper's search (section 4.2)
    "epochs": 100.0,
    "batch": 10_000.0,
    "learning_rate": 0.1,
    "seed": 0.0,
}
"""Parameters of `cae-kmeans` and `cae-kmeans-change`."""

_LIMITS: Mapping[str, tuple[float, float]] = {
    "k": (2, 5),
    "deep_and_inputs": (0, 1),
    "sample": (2, 100_000_000),
    "epochs": (1, 100_000),
    "batch": (2, 10_000_000),
    "seed": (0, 2**32 - 1),
}

# scikit-learn 1.0, which the paper used, started three times
_BATCH, _INIT_SIZE, _STARTS = 150, 500, 3
_EXTREME = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What `fit` learned. Plain values: equal when every bit is, and small in a pickle.

    mean, std : of the inputs at the patches' centres, in their units; std is 1 where an input is constant
    spread : what the clustered features are divided by
    centres : of the clusters, in canonical order, in the space that is clustered
    shares : of the sample that each cluster holds
    network : weights of the auto-encoder as safetensors, b"" without one; losses : its mean Huber loss in each epoch
    patches : that it learned from
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    spread: tuple[float, ...]
    centres: tuple[tuple[float, ...], ...]
    shares: tuple[float, ...]
    network: bytes
    losses: tuple[float, ...]
    patches: int

    def content(self) -> bytes:
        """All numbers as one safetensors file."""
        network = safetensors.numpy.load(self.network) if self.network else {}
        tensors = {f"network.{name}": tensor for name, tensor in network.items()}
        for name in ("mean", "std", "spread", "shares"):
            tensors[name] = np.array(getattr(self, name))
        tensors["centres"] = np.array(self.centres, np.float32)
        return safetensors.numpy.save(tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kmeans:
    """Mini-batch k-means on the standardised inputs of a pixel: the baseline of the paper's Table 4.

    Clusters are numbered by the mean of their vegetation index (or of its change) in the sample, ascending: cluster 0
    is the barest, or that of the greatest loss. `with_landslide` tells which are landslides; until then none is.

    A pixel of which an input is unknown is NaN. Inputs further than 100 standard deviations from the mean count as 100.
    """

    card: ModelCard
    fitted: Fitted | None = None
    landslide: tuple[int, ...] = ()
    device: Device = "cpu"

    def reading(self, features: tuple[str, ...]) -> Self:
        """Return it with other inputs, of which one must order the clusters; classes count as the numbers they are.

        Raises ModelError where none does.
        """
        if not _VEGETATION & set(features):
            raise ModelError(
                f"Model {self.card.address} orders its clusters by vegetation; name {' or '.join(sorted(_VEGETATION))} "
                "among its features"
            )
        return replace(self, card=replace(self.card, inputs=FeatureSpec(names=features)))

    def on(self, device: Device) -> Self:
        """Return it with its network, where it has one, on a device; see `Detector.on`."""
        if self.fitted is None or not self.fitted.network:
            return self
        require_device(device)
        return replace(self, device=device)

    def fit(
        self,
        patches_nfyx: np.ndarray,
        *,
        checkpoint: Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learn the standardisation, the network where there is one, and the clusters; see `Detector.fit`.

        The landslide clusters of another fit are forgotten.
        Raises ModelError for patches of another shape, fewer than clusters, unknown in a centre, or all equal.
        """
        _require_patches(self.card, patches_nfyx)
        middle = self.card.window_px // 2
        centre_nf = patches_nfyx[:, :, middle, middle].astype(np.float64)
        mean, std = _moments(self.card, centre_nf)
        x_nfyx = _standardised(patches_nfyx, mean, std, axis=1)
        network, losses = self._learn(x_nfyx, checkpoint, progress)
        features_nc = self._finite(self._sample_features(x_nfyx, network))
        spread = self._spread(features_nc)
        features_nc /= spread.astype(np.float32)
        seed, k = int(self.card.parameters["seed"]), int(self.card.parameters["k"])
        vegetation_n = centre_nf[:, next(i for i, n in enumerate(self.card.inputs.names) if n in _VEGETATION)]
        centres_kc, shares = _ordered(_centres(features_nc, k, seed), features_nc, vegetation_n)
        fitted = Fitted(
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            spread=tuple(spread.tolist()),
            centres=tuple(tuple(row) for row in centres_kc.tolist()),
            shares=shares,
            network=network,
            losses=tuple(losses),
            patches=len(patches_nfyx),
        )
        return self._with(fitted, fitted.content())

    def _finite(self, features_nc: np.ndarray) -> np.ndarray:
        if not np.isfinite(features_nc).all():
            raise ModelError(
                f"Model {self.card.address} learned no finite features: its training diverged; lower learning_rate, "
                f"now {self.card.parameters.get('learning_rate', 0):g}"
            )
        return features_nc

    def _with(self, fitted: Fitted, content: bytes) -> Self:
        card = replace(self.card, weights_sha256=hashlib.sha256(content).hexdigest())
        return replace(self, card=card, fitted=fitted, landslide=())

    def with_landslide(self, clusters: Sequence[int]) -> Self:
        """Say which clusters are landslides; none is allowed. Nothing that was learnt changes."""
        k = len(self._known.centres)
        if any(cluster not in range(k) for cluster in clusters):
            raise ModelError(
                f"Model {self.card.address} has the clusters 0 to {k - 1}; got {', '.join(map(str, clusters))}"
            )
        return replace(self, landslide=tuple(sorted({int(cluster) for cluster in clusters})))

    def clusters_block(self, features_fyx: np.ndarray) -> np.ndarray:
        """Clusters of one block: (feature, y + 2 c, x + 2 c) -> (y, x) uint8, 255 = unknown."""
        distances_kyx, unknown_yx = self._distances(features_fyx)
        clusters_yx: np.ndarray = distances_kyx.argmin(axis=0).astype(np.uint8)
        clusters_yx[unknown_yx] = UNKNOWN_CLUSTER
        return clusters_yx

    def predict_block(self, features_fyx: np.ndarray) -> np.ndarray:
        """Probability of one block; see `Detector.predict_block`.

        p = d_other^2 / (d_landslide^2 + d_other^2), with the distances to the nearest centre of either kind: at least
        .5 exactly where k-means assigns a landslide cluster.
        """
        distances_kyx, unknown_yx = self._distances(features_fyx)
        probability_yx = _membership(distances_kyx, self.landslide)
        probability_yx[unknown_yx] = np.nan
        return probability_yx

    def save(self, folder: Path) -> None:
        """Write what was learnt: the numbers, and a JSON for people that vouches for them. The JSON comes last."""
        fitted, content = self._known, self._known.content()
        about = {
            "model": self.card.address,
            "inputs": list(self.card.inputs.names),
            "inputs_version": self.card.inputs.version,
            "parameters": dict(self.card.parameters),
            "patches": fitted.patches,
            "shares": fitted.shares,
            "loss_per_epoch": fitted.losses,
            "weights_sha256": hashlib.sha256(content).hexdigest(),
        }
        write_whole(folder / WEIGHTS_FILE, content)
        write_whole(folder / MODEL_FILE, (json.dumps(about, indent=1) + "\n").encode())

    def restore(self, folder: Path) -> Self:
        """Take what `save` wrote; landslide clusters are not a part of it.

        Raises ModelError for what is missing, damaged, of another model or of other parameters.
        """
        content = read_file(folder / WEIGHTS_FILE, f"Weights of model {self.card.address}")
        about = _read_about(folder / MODEL_FILE, self.card)
        if hashlib.sha256(content).hexdigest() != about["weights_sha256"]:
            raise ModelError(
                f"{folder / WEIGHTS_FILE} is not what {MODEL_FILE} beside it vouches for; fit again"
            )
        inputs, k = len(self.card.inputs.names), int(self.card.parameters["k"])
        network = self._network_shapes()
        own = {
            "mean": (inputs,),
            "std": (inputs,),
            "spread": (self._clustered(),),
            "shares": (k,),
            "centres": (k, self._clustered()),
        }
        tensors = tensors_of(content, str(folder / WEIGHTS_FILE), own | network)
        fitted = Fitted(
            mean=tuple(tensors["mean"].tolist()),
            std=tuple(tensors["std"].tolist()),
            spread=tuple(tensors["spread"].tolist()),
            centres=tuple(tuple(row) for row in tensors["centres"].tolist()),
            shares=tuple(tensors["shares"].tolist()),
            network=safetensors.numpy.save({n.removeprefix("network."): tensors[n] for n in network})
            if network
            else b"",
            losses=tuple(about["loss_per_epoch"]),
            patches=about["patches"],
        )
        return self._with(fitted, content)

    @property
    def _known(self) -> Fitted:
        if self.fitted is None:
            raise ModelError(f"Model {self.card.address} has learnt nothing yet; fit or restore it first")
        return self.fitted

    def _distances(self, features_fyx: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances to the centres, (k, y, x) float32, and which pixels are unknown, (y, x) bool."""
        fitted, context = self._known, self.card.window_px // 2
        height, width = (size - 2 * context for size in features_fyx.shape[1:])
        core_fyx = features_fyx[:, context : context + height, context : context + width]
        x_fyx = _standardised(features_fyx, np.array(fitted.mean), np.array(fitted.std), axis=0)
        features_cyx = self._features(x_fyx, fitted.network)
        features_cyx /= np.array(fitted.spread, np.float32)[:, None, None]
        distances_kyx = squared_distances(features_cyx, np.array(fitted.centres, np.float32))
        return distances_kyx, np.isnan(core_fyx).any(axis=0)

    # What `CaeKmeans` does otherwise

    def _learn(
        self, x_nfyx: np.ndarray, checkpoint: Path | None, progress: Progress | None
    ) -> tuple[bytes, list[float]]:
        """Train a network on standardised patches: its weights and losses."""
        del x_nfyx, checkpoint, progress
        return b"", []

    def _sample_features(self, x_nfyx: np.ndarray, network: bytes) -> np.ndarray:
        """What is clustered of standardised patches: (n, c)."""
        del network
        return np.ascontiguousarray(x_nfyx[:, :, 0, 0])

    def _features(self, x_fyx: np.ndarray, network: bytes) -> np.ndarray:
        """What is clustered of a standardised block with its context: (c, y, x)."""
        del network
        return x_fyx

    def _spread(self, features_nc: np.ndarray) -> np.ndarray:
        """What the features that are clustered are divided by."""
        return np.ones(features_nc.shape[1])

    def _clustered(self) -> int:
        """How many features are clustered."""
        return len(self.card.inputs.names)

    def _network_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensors of the network."""
        return {}


class CaeKmeans(Kmeans):
    """Mini-batch k-means on the deep features of a convolutional auto-encoder: the paper's method.

    What is unknown in a pixel's context counts as the mean (0 when standardised), in training as in detection.
    Alone, deep features are clustered as the network gives them: no standardisation is published. Beside the
    standardised inputs (`deep_and_inputs`) they are divided by their standard deviation, because their own scale is an
    accident of training, a tenth or so: undivided, they would hardly count.

    Source: Shahabi et al. 2021, sections 3.4 and 3.5.
    """

    __slots__ = ()

    def _learn(
        self, x_nfyx: np.ndarray, checkpoint: Path | None, progress: Progress | None
    ) -> tuple[bytes, list[float]]:
        from slidecube.models.nets import cae  # noqa: PLC0415  torch takes seconds, which a plan need not spend

        p = self.card.parameters
        training = cae.Training(
            epochs=int(p["epochs"]),
            batch=int(p["batch"]),
            learning_rate=p["learning_rate"],
            seed=int(p["seed"]),
        )
        return cae.train(x_nfyx, training, checkpoint=checkpoint, progress=progress)

    def _sample_features(self, x_nfyx: np.ndarray, network: bytes) -> np.ndarray:
        from slidecube.models.nets import cae  # noqa: PLC0415

        deep_nc = cae.encode(network, x_nfyx)
        middle = self.card.window_px // 2
        return np.hstack([deep_nc, x_nfyx[:, :, middle, middle]]) if self._with_inputs else deep_nc

    def _features(self, x_fyx: np.ndarray, network: bytes) -> np.ndarray:
        from slidecube.models.nets import cae  # noqa: PLC0415

        deep_cyx = cae.encode_dense(network, x_fyx, device=self.device)
        c = self.card.window_px // 2
        return np.concatenate([deep_cyx, x_fyx[:, c:-c, c:-c]]) if self._with_inputs else deep_cyx

    def _spread(self, features_nc: np.ndarray) -> np.ndarray:
        from slidecube.models.nets import cae  # noqa: PLC0415

        spread_c = np.ones(features_nc.shape[1])
        if self._with_inputs:
            deep_nc = features_nc[:, : cae.DEEP].astype(np.float64)
            varies = deep_nc.max(axis=0) > deep_nc.min(axis=0)
            spread_c[: cae.DEEP] = np.where(varies, deep_nc.std(axis=0), 1.0)
        return spread_c

    @property
    def _with_inputs(self) -> bool:
        return self.card.parameters["deep_and_inputs"] == 1

    def _clustered(self) -> int:
        from slidecube.models.nets import cae  # noqa: PLC0415

        return cae.DEEP + (len(self.card.inputs.names) if self._with_inputs else 0)

    def _network_shapes(self) -> dict[str, tuple[int, ...]]:
        from slidecube.models.nets import cae  # noqa: PLC0415

        return {f"network.{name}": shape for name, shape in cae.shapes(len(self.card.inputs.names)).items()}


def predict_clusters(
    detector: Kmeans, features: xr.Dataset, *, origin_px: tuple[int, int] = (0, 0)
) -> xr.Dataset:
    """Apply a detector's clusters to a cube of features, as `predict` does its probability.

    Returns `cluster` (y, x) uint8, 255 = unknown.
    """
    found = on_lattice(
        detector.clusters_block,
        features,
        card=detector.card,
        origin_px=origin_px,
        unknown=np.uint8(UNKNOWN_CLUSTER),
    )
    found.attrs.update(long_name="cluster, ascending by vegetation", units="1")
    return xr.Dataset({"cluster": found})


def squared_distances(features_cyx: np.ndarray, centres_kc: np.ndarray) -> np.ndarray:
    """Squared distances to centres, (c, y, x) and (k, c) -> (k, y, x) float32.

    Differences are squared and summed feature by feature: no pixel's bits depend on where it lies in the block, and
    near a centre nothing cancels, as it does in the expanded square.
    """
    out_kyx = np.zeros((len(centres_kc), *features_cyx.shape[1:]), np.float32)
    term_yx = np.empty(features_cyx.shape[1:], np.float32)
    for sum_yx, centre_c in zip(out_kyx, centres_kc, strict=True):
        for plane_yx, value in zip(features_cyx, centre_c, strict=True):
            np.subtract(plane_yx, value, out=term_yx)
            np.multiply(term_yx, term_yx, out=term_yx)
            np.add(sum_yx, term_yx, out=sum_yx)
    return out_kyx


def _membership(distances_kyx: np.ndarray, landslide: tuple[int, ...]) -> np.ndarray:
    """Probability of a landslide from the squared distances to all centres."""
    is_landslide = np.isin(np.arange(len(distances_kyx)), landslide)
    if is_landslide.all() or not is_landslide.any():
        return np.full(distances_kyx.shape[1:], is_landslide.all(), np.float32)
    landslide_yx, other_yx = distances_kyx[is_landslide].min(axis=0), distances_kyx[~is_landslide].min(axis=0)
    total_yx = landslide_yx + other_yx
    half = np.float32(0.5)
    p_yx: np.ndarray = np.divide(other_yx, total_yx, out=np.full_like(total_yx, half), where=total_yx > 0)
    # the nearest centre decides, also where rounding or a tie would not
    assigned_yx = is_landslide[distances_kyx.argmin(axis=0)]
    below = np.nextafter(half, np.float32(0))
    agreeing_yx: np.ndarray = np.where(assigned_yx, np.maximum(p_yx, half), np.minimum(p_yx, below))
    return agreeing_yx


def _standardised(values: np.ndarray, mean: np.ndarray, std: np.ndarray, *, axis: int) -> np.ndarray:
    """(values - mean) / std along an axis of features, float32; unknown ones at the mean."""
    out = np.empty(values.shape, np.float32)
    for source, target, m, s in zip(
        np.moveaxis(values, axis, 0), np.moveaxis(out, axis, 0), mean, std, strict=True
    ):
        with np.errstate(over="ignore"):
            np.subtract(source, np.float32(m), out=target)
            np.divide(target, np.float32(s), out=target)
        np.clip(target, -_EXTREME, _EXTREME, out=target)
        target[np.isnan(target)] = 0
    return out


def _moments(card: ModelCard, centre_nf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    constant = centre_nf.min(axis=0) == centre_nf.max(axis=0)
    if constant.all():
        raise ModelError(
            f"Model {card.address} cannot learn: all {len(centre_nf)} sampled pixels are equal; is the area observed?"
        )
    return centre_nf.mean(axis=0), np.where(constant, 1.0, centre_nf.std(axis=0))


def _require_patches(card: ModelCard, patches_nfyx: np.ndarray) -> None:
    shape = (len(card.inputs.names), card.window_px, card.window_px)
    if patches_nfyx.ndim != 4 or patches_nfyx.shape[1:] != shape:
        raise ModelError(
            f"Model {card.address} learns from patches of shape (n, {shape}); got {patches_nfyx.shape}"
        )
    k = int(card.parameters["k"])
    if len(patches_nfyx) < k:
        raise ModelError(
            f"Model {card.address} learns {k} clusters from {k} patches or more; got {len(patches_nfyx)}"
        )
    middle = card.window_px // 2
    bad = ~np.isfinite(patches_nfyx[:, :, middle, middle]).all(axis=1)
    if bad.any():
        raise ModelError(
            f"Model {card.address} learns from patches with known centres; "
            f"{bad.sum()} of {len(bad)} are not, the first is number {int(bad.argmax())}"
        )


def _centres(features_nc: np.ndarray, k: int, seed: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans  # noqa: PLC0415  takes a second, which a plan need not spend
    from threadpoolctl import threadpool_limits  # noqa: PLC0415

    kmeans = MiniBatchKMeans(
        n_clusters=k, batch_size=_BATCH, init_size=_INIT_SIZE, n_init=_STARTS, random_state=seed
    )
    with threadpool_limits(1):
        kmeans.fit(features_nc)
    centres_kc: np.ndarray = kmeans.cluster_centers_.astype(np.float32)
    return centres_kc


def _ordered(
    centres_kc: np.ndarray, features_nc: np.ndarray, vegetation_n: np.ndarray
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Centres in canonical order, and the share of the sample that each holds.

    By mean vegetation, empty clusters last; equal ones by their coordinates.
    """
    labels_n = squared_distances(features_nc.T[:, None], centres_kc)[:, 0].argmin(axis=0)
    k = len(centres_kc)
    counts = np.bincount(labels_n, minlength=k)
    with np.errstate(invalid="ignore"):
        means = np.bincount(labels_n, weights=vegetation_n, minlength=k) / counts
    order = sorted(range(k), key=lambda i: (not counts[i], means[i] if counts[i] else 0, *centres_kc[i]))
    return centres_kc[order], tuple((counts[order] / len(labels_n)).tolist())


def _read_about(path: Path, card: ModelCard) -> dict[str, Any]:
    """What `save` wrote about a model; raises ModelError unless it is this one."""
    kinds = {"weights_sha256": str, "patches": int, "loss_per_epoch": list}
    try:
        about = json.loads(read_file(path, f"Model {card.address}"))
        whole = isinstance(about, dict) and all(
            isinstance(about.get(key), kind) for key, kind in kinds.items()
        )
    except ValueError:
        whole = False
    if not whole:
        raise ModelError(f"{path} is not what a fitted model leaves, or damaged; fit again")
    wants = {
        "model": card.address,
        "inputs": list(card.inputs.names),
        "inputs_version": card.inputs.version,
        "parameters": dict(card.parameters),
    }
    for what, want in wants.items():
        if about.get(what) != want:
            raise ModelError(f"{path} is of another fit: {what} is {about.get(what)} and not {want}")
    return dict(about)


def _builder(
    name: str, detector: type[Kmeans], inputs: tuple[str, ...], defaults: Mapping[str, float]
) -> Callable[..., Kmeans]:
    deep = detector is CaeKmeans

    def build(
        *, threshold: float | None, min_area_m2: float | None, parameters: Mapping[str, float]
    ) -> Kmeans:
        """Build the detector; unknown parameters are refused with the list of known ones."""
        merged = merged_parameters(name, defaults, parameters)
        _require_numbers(name, merged)
        card = ModelCard(
            name=name,
            version=1,
            architecture="convolutional auto-encoder and mini-batch k-means"
            if deep
            else "mini-batch k-means",
            inputs=FeatureSpec(names=inputs),
            window_px=7 if deep else 1,
            threshold=0.5 if threshold is None else threshold,
            min_area_m2=500.0 if min_area_m2 is None else min_area_m2,
            sample_patches=int(merged["sample"]),
            parameters=merged,
            training="unsupervised, on a sample of the very area",
            metrics="published F1 of single images years after the event: "
            + (".83, .79, .79" if deep else ".41, .38, .63"),
            source="Shahabi et al. 2021, doi:10.3390/rs13224698",
        )
        return detector(card=card)

    return build


def _require_numbers(name: str, parameters: Mapping[str, float]) -> None:
    for key, value in parameters.items():
        if key in _LIMITS:
            low, high = _LIMITS[key]
            if not (low <= value <= high and value == int(value)):
                raise ModelError(
                    f"Parameter {key}={value} of model {name!r} must be a whole number from {low} to {high}"
                )
        elif not (np.isfinite(value) and value > 0):
            raise ModelError(f"Parameter {key}={value} of model {name!r} must be finite and above 0")


cae_kmeans = _builder("cae-kmeans", CaeKmeans, POST_INPUTS, CAE_DEFAULTS)
cae_kmeans_change = _builder("cae-kmeans-change", CaeKmeans, CHANGE_INPUTS, CAE_DEFAULTS)
kmeans = _builder("kmeans", Kmeans, POST_INPUTS, KMEANS_DEFAULTS)
kmeans_change = _builder("kmeans-change", Kmeans, CHANGE_INPUTS, KMEANS_DEFAULTS)
