"""Estimates: what a run will read, hold and write, said before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from slidecube.catalog.grid import TileGrid
from slidecube.models.card import ModelCard
from slidecube.models.network_cost import NetworkCost
from slidecube.pipeline.composite import COMPILED, STRIP_PX
from slidecube.pipeline.config import Config, Cube
from slidecube.pipeline.features import required_variables
from slidecube.pipeline.series import SERIES_VARIABLES
from slidecube.pipeline.terrain import TERRAIN_ALWAYS
from slidecube.pipeline.visibility import SEEN_VARIABLES

BASE_GB = 0.35
"""Resident memory of a fresh worker with every import done, GDAL's caches included."""

_COMPRESSION = 2.2  # of stored layers by zstd, on composites
_SECONDS_PER_MPX_BAND_DATE = 0.028  # reading, masking and compositing on one core
_SECONDS_PER_MPX_DETECT = 0.6
_SECONDS_PER_MPX_SHIFT = 0.6  # of the blocks under a tile and around it
_SECONDS_PER_MPX_RANKED_DATE = 0.06  # put in order of NDVI
_SECONDS_PER_MPX_GEOMEDIAN = 0.013  # a band and date
_SECONDS_PER_MPX_MEDOID = 2.9e-4  # a band and pair of dates
_COMPILER_GB = 0.12  # numba, its compiler, and what it made
_SECONDS_PER_MPX_BAND_DATE_SLOPES = 0.02  # the line through a scene's light, and the correction by it
_SECONDS_PER_MPX_DATE_SHADOW = 0.5
_SECONDS_PER_MPX_HEIGHTS = 2.0
_SHADOW_GB = 0.05  # heights 10 km around a block, and lines through them
_DETECT_BYTES_PER_PX = 30  # masks, probabilities and their graph, beside layers and features
_NETWORK_GB = 0.5  # torch, once it is imported
_SECONDS_PER_MPX_NETWORK = 0.3  # of the dense encoder, units of the lattice included
_WINDOW_COPIES = 1.5  # of what one window's maps hold at once: what the kernels lay out beside them
_SECONDS_PER_PATCH_EPOCH = 7e-6
_PATCH_COPIES = 3.5  # as gathered, standardised, and one tile's beside them
_RADAR_VARIABLES = 8
_RADAR_STORED_BYTES = 14  # a pixel: six of two bytes, two of one
_RADAR_GEOMETRY_GB = 0.15  # heights of a block and its surroundings, and lines through them
_SECONDS_PER_MPX_RADAR_DATE = 0.16
_SECONDS_PER_MPX_GEOMETRY = 2.0
_RASTER_BYTES = 4  # a pixel of a layer of the TOML, as read; at most this as stored
_SECONDS_PER_MPX_RASTER = 0.2
_STRATA_BYTES_PER_PX = 64
_SECONDS_PER_MPX_CLASSIFY = 1.5
_EXTRA = len(SEEN_VARIABLES)  # what is said of the observations, beside the bands


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run costs, before it runs, as if nothing of it were done yet.

    tiles : of the plan; scenes : in the frozen list; scene_reads : scene and tile pairs; max_dates : most scenes of
    one tile and window; read_gb : pixels decoded, uncompressed; stored_gb, files : written
    peak_mem_gb : of the busiest worker at one thread a tile; thread_mem_gb : what each further thread adds
    fit_mem_gb : of the process that is started, while the model learns; 0 where it learns nothing
    cpu_hours : on one core
    """

    tiles: int
    scenes: int
    scene_reads: int
    max_dates: int
    read_gb: float
    stored_gb: float
    files: int
    peak_mem_gb: float
    thread_mem_gb: float
    fit_mem_gb: float
    cpu_hours: float

    def worker_mem_gb(self, threads: int) -> float:
        """Peak memory of a worker that runs a tile on so many threads."""
        return self.peak_mem_gb + (threads - 1) * self.thread_mem_gb


def estimate(
    config: Config,
    grid: TileGrid,
    *,
    card: ModelCard,
    tiles: int,
    scenes: int,
    dates: Mapping[str, Mapping[str, int]],
    radar_dates: Mapping[str, Mapping[str, int]] | None = None,
    rasters: Mapping[str, int] | None = None,
    network: NetworkCost | None = None,
) -> Estimate:
    """Estimate a run.

    network : what it costs, None for what has none of its own card
    card : of the model; tiles, scenes : how many; dates, radar_dates : layer -> tile -> number of scenes read
    rasters : layer of the TOML -> number of rasters that its tiles read, in all
    """
    each = [n for by in dates.values() for n in by.values()]
    reads, most = sum(each), max(each, default=0)
    radar = _radar_cost(grid, tiles, radar_dates or {})
    own, own_reads = len(rasters or {}), sum((rasters or {}).values())
    bands, epochs = len(config.cube.bands), len(config.epochs)
    opinions = 1 + (config.cube.mask.cloud_pct is not None)  # on what is cloud, a band each
    tile_mpx = grid.tile_px**2 / 1e6
    shapes = len(set(required_variables(card.inputs)["terrain"]) - set(TERRAIN_ALWAYS))
    kept = bands + _EXTRA + _of_series(card)
    stored = tiles * tile_mpx * (len(dates) * kept * 2 + 8 + 2 * shapes + epochs * 7) / _COMPRESSION
    seconds = tile_mpx * (
        reads * (bands + opinions) * _SECONDS_PER_MPX_BAND_DATE
        + tiles * epochs * (_SECONDS_PER_MPX_DETECT + _network_seconds(grid, card, network))
    )
    if config.land_cover is not None:
        seconds += tile_mpx * tiles * epochs * _SECONDS_PER_MPX_CLASSIFY
    stored += tiles * tile_mpx * own * _RASTER_BYTES / _COMPRESSION
    seconds += tile_mpx * own_reads * _SECONDS_PER_MPX_RASTER
    sun = config.cube.sun
    seconds += tile_mpx * (
        reads * bands * (sun.correction != "none") * _SECONDS_PER_MPX_BAND_DATE_SLOPES
        + reads * sun.cast_shadow * _SECONDS_PER_MPX_DATE_SHADOW
        + tiles * len(dates) * sun.reads_heights * _SECONDS_PER_MPX_HEIGHTS
    )
    if config.cube.coregistration.check and compares_images(card):
        around = (grid.tile_px / grid.block_px + 2) ** 2 * grid.block_px**2 / 1e6
        seconds += tiles * epochs * around * _SECONDS_PER_MPX_SHIFT
    seconds += tile_mpx * _composite_seconds(config.cube, each, bands=bands)
    seconds += epochs * card.sample_patches * card.parameters.get("epochs", 0.0) * _SECONDS_PER_PATCH_EPOCH
    block = block_mem_gb(block_px=grid.block_px, dates=most, bands=bands)
    if sun.correction != "none":  # each band corrected, and the light of each date
        block += grid.block_px**2 * most * (bands * 2 + 4) / 1e9
    block = max(block + sun.cast_shadow * _SHADOW_GB, radar.block_gb)
    window = _WINDOW_COPIES * network.window_gb if network else 0.0
    return Estimate(
        tiles=tiles,
        scenes=scenes,
        scene_reads=reads + radar.reads + own_reads,
        max_dates=max(most, radar.most),
        read_gb=round(
            reads * tile_mpx * (bands * 2 + opinions) / 1e3
            + own_reads * tile_mpx * _RASTER_BYTES / 1e3
            + radar.read_gb,
            3,
        ),
        stored_gb=round(stored / 1e3 + radar.stored_gb, 3),
        files=tiles * (len(dates) * (kept + 1) + 4 + shapes + epochs * 6 + own * 2) + radar.files,
        peak_mem_gb=round(
            BASE_GB
            + (config.cube.composite in COMPILED) * _COMPILER_GB
            + max(
                tile_mem_gb(grid.tile_px, bands=kept - _EXTRA, dates=most) + block,
                detect_mem_gb(grid.tile_px, card, network) + strata_mem_gb(config) + max(block, window),
                radar.tile_gb + block,
                judge_mem_gb(grid.tile_px, block_px=grid.block_px, dates=most),
            ),
            2,
        ),
        thread_mem_gb=round(max(block, window), 2),
        fit_mem_gb=round(fit_mem_gb(card), 2),
        cpu_hours=round((seconds + radar.seconds) / 3600, 3),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _RadarCost:
    """What the radar layers of a run cost; all zero where there are none."""

    reads: int
    most: int
    read_gb: float
    stored_gb: float
    files: int
    tile_gb: float
    block_gb: float
    seconds: float


def _radar_cost(grid: TileGrid, tiles: int, dates: Mapping[str, Mapping[str, int]]) -> _RadarCost:
    reads = sum(n for by in dates.values() for n in by.values())
    most = max((n for by in dates.values() for n in by.values()), default=0)
    mpx, layers = grid.tile_px**2 / 1e6, len(dates)
    return _RadarCost(
        reads=reads,
        most=most,
        read_gb=reads * mpx * 8 / 1e3,
        stored_gb=layers * tiles * mpx * _RADAR_STORED_BYTES / _COMPRESSION / 1e3,
        files=layers * tiles * (_RADAR_VARIABLES + 1),
        tile_gb=bool(layers) * radar_tile_mem_gb(grid.tile_px),
        block_gb=bool(layers) * radar_block_mem_gb(block_px=grid.block_px, dates=most),
        seconds=mpx * (reads * _SECONDS_PER_MPX_RADAR_DATE + layers * tiles * _SECONDS_PER_MPX_GEOMETRY),
    )


def compares_images(card: ModelCard) -> bool:
    """Tell whether a model compares an optical image before the event with the one after it."""
    needed = required_variables(card.inputs)
    return bool(needed["pre"] and needed["post"])


def _of_series(card: ModelCard) -> int:
    needed = required_variables(card.inputs)
    return 2 * bool({*needed["pre"], *needed["post"]} & set(SERIES_VARIABLES))


def block_mem_gb(*, block_px: int, dates: int, bands: int) -> float:
    """Working set of one lattice block: its dates as read, one band of them twice, masks, and a strip at work."""
    strip = min(STRIP_PX, block_px**2) * dates * (bands * 2 * 3 + 40)
    return (block_px**2 * dates * (bands * 2 + 2 + 4) + strip) / 1e9


def _composite_seconds(cube: Cube, dates: Iterable[int], *, bands: int) -> float:
    """Seconds a megapixel of all tiles, beside what every method takes; dates : of each tile."""
    if cube.composite == "greenest" and cube.greenest_of:
        return _SECONDS_PER_MPX_RANKED_DATE * sum(dates)
    if cube.composite == "geomedian":
        return _SECONDS_PER_MPX_GEOMEDIAN * bands * sum(dates)
    if cube.composite == "medoid":
        return _SECONDS_PER_MPX_MEDOID * bands * sum(n * (n - 1) // 2 for n in dates)
    return 0.0


def judge_mem_gb(tile_px: int, *, block_px: int, dates: int) -> float:
    """Working set of one tile's masks: the classification of its blocks and those around, a block's, and the codes."""
    return dates * (tile_px**2 + (tile_px + 2 * block_px) ** 2 + 2 * (3 * block_px) ** 2) / 1e9


def tile_mem_gb(tile_px: int, *, bands: int, dates: int) -> float:
    """Working set of one tile's composite: its finished variables and the mask of each date."""
    return tile_px**2 * ((bands + _EXTRA) * 2 * 1.5 + dates) / 1e9


def radar_tile_mem_gb(tile_px: int) -> float:
    """Working set of one tile's radar composite: its finished variables."""
    return tile_px**2 * _RADAR_STORED_BYTES * 1.5 / 1e9


def radar_block_mem_gb(*, block_px: int, dates: int) -> float:
    """Working set of one lattice block of radar: its dates, masks, and the geometry of its tracks."""
    # both bands as read, one as power of its overpasses, in float64 on its way to the stored scale, and masks
    return block_px**2 * dates * (2 * 4 + 4 + 2 * 8 + 2) / 1e9 + _RADAR_GEOMETRY_GB


def detect_mem_gb(tile_px: int, card: ModelCard, network: NetworkCost | None = None) -> float:
    """Working set of one tile's detection: the stored variables that are read, and the features, twice.

    Of a network, with its context around the tile: features and their standardised copy; and its weights.
    """
    stored = sum(len(names) + 1 for names in required_variables(card.inputs).values() if names)
    per_px = stored * 2 + len(card.inputs.names) * 4 * 2 + _DETECT_BYTES_PER_PX
    if network is None:
        return tile_px**2 * per_px / 1e9 + (card.window_px > 1) * _NETWORK_GB
    side_px = tile_px + card.window_px - 1
    if network.views > 1:  # logits and probabilities of each view, and the means of both in float64
        per_px += network.views * 2 * 4 + 2 * 8
    return side_px**2 * (per_px + network.channels * 4) / 1e9 + _NETWORK_GB + network.weights_gb


def _network_seconds(grid: TileGrid, card: ModelCard, network: NetworkCost | None) -> float:
    """Seconds that a network takes for a megapixel of tiles, those of windows that reach over their edges included."""
    if network is None:
        return (card.window_px > 1) * _SECONDS_PER_MPX_NETWORK
    # a window that crosses an edge is computed for both tiles: half its side on either
    return network.seconds_per_mpx * (1 + card.window_px / 2 / grid.tile_px) ** 2


def strata_mem_gb(config: Config) -> float:
    """Working set of the weights of strata on one tile: codes, distances on both sides, and three strata's weights."""
    if config.fit.strata is None:
        return 0.0
    side = config.cube.tile_px + 2 * config.fit.strata_blend_m / config.area.resolution_m
    return side**2 * _STRATA_BYTES_PER_PX / 1e9


def fit_mem_gb(card: ModelCard) -> float:
    """Memory of the process in which a model learns from its patches; 0 where it does not."""
    if not card.sample_patches:
        return 0.0
    patches = card.sample_patches * len(card.inputs.names) * card.window_px**2 * 4 / 1e9
    return BASE_GB + _PATCH_COPIES * patches + (card.window_px > 1) * _NETWORK_GB
