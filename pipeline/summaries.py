"""What the command line prints: a plan, a run, a workspace and a cleaning, each as text for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import shapely

from slidecube.catalog.scenes import footprints
from slidecube.catalog.search import Newest, scenes_by_tile
from slidecube.catalog.sources import SOURCES
from slidecube.cluster.resources import Profile, ProfileFile
from slidecube.pipeline.lineage import sourcing_lines
from slidecube.pipeline.omissions import not_looked_for
from slidecube.pipeline.plan_dem import dem_facts
from slidecube.pipeline.radar_layer import track_of

if TYPE_CHECKING:  # who asks for a status need not import what runs
    from slidecube.pipeline.probe import Found
    from slidecube.pipeline.run import RunReport
    from slidecube.pipeline.run_plan import RunPlan
    from slidecube.pipeline.storage import Place

_WHOLE = 0.995  # of the area: what a DEM's rim leaves out is no news
_SHOWN = 10
"""Failures that are listed one by one; `status --json` has all."""


def plan_summary(made: RunPlan, *, newest: str) -> str:
    """Describe a plan: its scenes by tile and window, how fresh the provider is, and what a run would cost.

    newest : one line on the provider's newest scene
    """
    grid, cost = made.grid, made.estimate
    tiles = f"{_count(len(made.tiles), 'tile')} of {grid.tile_px} px at {grid.resolution_m:g} m"
    lines = [
        f"plan        {made.run}"
        + (" (scene list of an earlier plan, nothing searched)" * made.reused_scenes),
        f"area        {made.aoi.name}: {tiles} in {grid.crs}",
        f"inventory   {made.inventory}",
        *_network_line(made),
        f"scenes      {len(made.scenes)}, newest of the provider: {newest}",
        *(f"sources     {line}" for line in sourcing_lines(made.scenes.sourcing)),
        *["warning     `slidecube plan --refresh` asks again"]
        * any(entry.unsearched for entry in made.scenes.sourcing),
        *_table(("  window", "tile", "scenes", "first", "last", "cloud"), _scene_rows(made)),
        f"dem         {dem_facts(made.config, made.scenes.role('dem'))}",
        *_uncovered(made),
        *_radar_lines(made),
        *_layer_lines(made),
        *(f"not sought  {line}" for line in not_looked_for(made.config)),
        *_charged(made),
        f"reads       {_count(cost.scene_reads, 'scene')} times tile, {cost.read_gb:.1f} GB of pixels",
        f"writes      {cost.stored_gb:.1f} GB in {_count(cost.files, 'file')}",
        f"needs       {cost.peak_mem_gb:.1f} GB of memory a worker, {cost.cpu_hours:.1f} hours of one core"
        + (f"; the fit {cost.fit_mem_gb:.1f} GB where it is started" if cost.fit_mem_gb else ""),
    ]
    return "\n".join(lines)


def _network_line(made: RunPlan) -> list[str]:
    """Say which network was adopted; a rule says nothing."""
    card = made.network
    if card is None:
        return []
    said = f", {card.metrics}" if card.metrics else ""
    return [f"network     {card.address}, {card.content_sha256[:12]}: {card.architecture}{said}"]


def _uncovered(made: RunPlan) -> list[str]:
    """Warn of a DEM that leaves out a part of the area: there is no slope, and nothing can be judged."""
    area = made.aoi.to_crs("EPSG:4326")
    covered = (
        shapely.union_all(footprints(made.scenes.role("dem").scenes)).intersection(area).area / area.area
    )
    if covered > _WHOLE:
        return []
    return [f"warning     the DEM covers {covered:.0%} of the area; the rest cannot be judged (no terrain)"]


def _radar_lines(made: RunPlan) -> list[str]:
    """Describe the radar scenes: direction, tracks, and how many each window has."""
    scenes = made.scenes.role("radar")
    if not len(scenes):
        return []
    tracks = ", ".join(str(n) for n in sorted({track_of(scene).relative_orbit for scene in scenes}))
    windows = {w: f"{e.name} {side}" for e in made.config.epochs for side, w in e.windows.items()}
    counts = ", ".join(f"{name} {len(scenes.within(w))}" for w, name in windows.items())
    return [f"radar       {made.config.cube.radar.orbit}, relative orbits {tracks}; scenes: {counts}"]


def _layer_lines(made: RunPlan) -> list[str]:
    """Describe the layers of the TOML and the points of the land cover."""
    lines = []
    for layer in made.config.layers:
        n = sum(layer.name in scene.bands for scene in made.scenes.role("layer"))
        year = f" of {layer.year}" if layer.year else ""
        lines.append(f"layer       {layer.name}: {layer.kind}{year}, {layer.kernel}, {_count(n, 'raster')}")
    if made.points is not None:
        held = ", ".join(f"{name} {n}" for name, n in made.points.counts.items())
        lines.append(f"land cover  from points: {held}")
    return lines


def _charged(made: RunPlan) -> list[str]:
    """Say which sources charge whoever reads them."""
    used = sorted({scene.source for scene in made.scenes})
    paying = [name for name in used if name in SOURCES and SOURCES[name].reader_pays]
    return [f"charged     reading {name} is charged to your account (requester pays)" for name in paying]


def newest_line(newest: Newest | None) -> str:
    """Describe the provider's newest scene and its age."""
    if newest is None:
        return "none over this area"
    return f"{newest.id}, {newest.datetime.date().isoformat()}, {newest.age_days:.0f} days old"


def run_summary(report: RunReport) -> str:
    """Describe what a run did."""
    done = ", ".join(f"{stage} {n}" for stage, n in report.done.items()) or "nothing was due"
    lines = [f"run         {report.run}", f"done        {done}", f"scene reads {report.scene_reads}"]
    lines += [f"land cover  {line}" for line in report.land_cover]
    lines += [line for fit in report.statistics for line in fit_lines(fit)]
    if report.products is not None:
        lines.append(f"products    {report.products}")
        page = report.products / "report" / "index.html"
        if page.exists():
            lines.append(f"report      {page}")
    return "\n".join(lines)


def fit_lines(fit: dict[str, Any]) -> list[str]:
    """Describe what was fitted for an epoch, as `fit_state` has it."""
    if not fit["frozen"]:
        return [f"statistics  {fit['epoch']}: {fit['key']}, not fitted yet"]
    lines = [f"statistics  {fit['epoch']}: {fit['key']}, frozen"]
    if fit["named_by"]:
        names = ", ".join(map(str, fit["clusters"])) or "none"
        lines.append(f"clusters    {fit['epoch']}: landslide = {names} (named by {fit['named_by']})")
    for image, strata in fit["strata"].items():
        lines.append(
            f"strata      {fit['epoch']}: {len(strata['fitted'])} with an MNF of {image} of their own"
        )
        lines += [
            f"            {name} takes the whole's: {why}" for name, why in strata["take the whole"].items()
        ]
    if fit["sheet"]:
        lines.append(f"sheet       {fit['sheet']}")
    if fit["repaired_tiles"]:
        n = _count(len(fit["repaired_tiles"]), "tile")
        lines.append(f"            {n} made or mended after the freeze took no part in it")
    return lines


def failure_line(report: RunReport, workspace: Place) -> str:
    """Describe in one line why a run is incomplete."""
    failed = _count(len({what.split()[-1] for what, _ in report.reasons}), "tile")
    first = f", first {': '.join(report.reasons[0])}" if report.reasons else ""
    return f"incomplete: {failed} failed{first}; `slidecube status {workspace}` lists all, the same command tries again"


def status_summary(state: dict[str, Any]) -> str:
    """Describe what `status` found: a line a stage, what was read, what could be seen, what failed and why."""
    columns = ("done", "due", "running", "failed")
    rows = [(stage, *(str(counts[name]) for name in columns)) for stage, counts in state["tiles"].items()]
    lines = [f"run         {state['run']}", *_table(("stage", *columns), rows)]
    lines += _watched(state)
    lines += [_job_line(job, state["run"]) for job in state["jobs"]]
    lines.append(f"scene reads {state['scene_reads']}")
    lines += [f"land cover  {line}" for line in state["land_cover"]]
    lines += [line for fit in state["statistics"] for line in fit_lines(fit)]
    lines += _shares("pixels", state["observability"])
    lines += _shares("not observable", state["not_observable"])
    lines += _shift_lines(state["shifts"])
    lines += _listed("failed", (f"{f['stage']} {f['tile']}: {f['reason']}" for f in state["failures"]))
    lines += _listed("unreadable", (f"{f['scene']} {f['asset']}: {f['reason']}" for f in state["lost"]))
    lines += _listed(
        "read elsewhere",
        (f"{f['scene']} {f['asset']}: from {f['source']}, {f['reason']}" for f in state["substituted"]),
    )
    lines.append("complete" if state["complete"] else "incomplete: run the same command to go on")
    return "\n".join(lines)


def _shift_lines(shifts: dict[str, Any]) -> list[str]:
    """Describe how far the images before and after lie from each other."""
    if not shifts or not any(shifts["blocks"].values()):
        return []
    blocks = shifts["blocks"]
    measured = sum(blocks.values()) - blocks["unmeasured"]
    where = f"in {measured} of {_count(sum(blocks.values()), 'block')}"
    if not measured:
        return [f"shift       of the image before against the one after: measured {where}"]
    size = f"median {shifts['median_px']:.2f} px, largest {shifts['largest_px']:.2f} px"
    lines = [f"shift       of the image before against the one after: {size}, measured {where}"]
    if blocks["warned"] or blocks["excluded"]:
        warned = f"{_count(blocks['warned'], 'block')} shifted by more than {shifts['warn_px']:g} px"
        gone = f"{blocks['excluded']} by more than {shifts['exclude_px']:g} px, not observable"
        lines.append(f"warning     {warned}, {gone}: see shifts.parquet")
    return lines


def _watched(state: dict[str, Any]) -> list[str]:
    """Describe how fast it goes, and what it took against what was predicted."""
    lines = []
    if state["running"]:
        speed = ", ".join(f"{stage} {n:g} tiles a minute" for stage, n in state["pace"].items())
        left = state["minutes_left"]
        when = f"; {_duration(left)} left" if left is not None else ""
        lines.append(f"running     {_count(state['drivers'], 'driver')}: {speed or 'no tile done yet'}{when}")
    lines += [f"dashboard   {address}" for address in state["dashboards"]]
    for lock in state["silent"]:
        who = f"shard {lock['shard']}" if lock["shard"] else "the driver"
        lines.append(
            f"silent      {who} of run {lock['run']!r} on {lock['host']}, for {_duration(lock['silent_s'] / 60)}: "
            "taken for dead, and its work for due"
        )
    used, predicted = state["used"], state["predicted"]
    if used["task_hours"]:
        lines.append(
            f"used        {used['task_hours']:.2f} hours of tiles, {used['bytes'] / 1e9:.2f} GB stored, "
            f"{used['peak_mem_gb']:.1f} GB of memory (predicted {predicted['cpu_hours']:.2f} hours of one core, "
            f"{predicted['bytes'] / 1e9:.2f} GB, {predicted['peak_mem_gb']:.1f} GB)"
        )
    return lines


def _duration(minutes: float) -> str:
    if minutes < 1.5:
        return f"{60 * minutes:.0f} seconds"
    if minutes < 90:
        return f"{minutes:.0f} minutes"
    return f"{minutes / 60:.1f} hours" if minutes < 60 * 48 else f"{minutes / 60 / 24:.1f} days"


def prometheus_text(state: dict[str, Any]) -> str:
    """Describe what `status` found in Prometheus' text format, for the textfile collector of a node exporter."""
    run = f'run="{state["run"]}"'
    gauges: list[tuple[str, str, str, float]] = [
        ("tiles", "Tiles by stage and state.", f'{run},stage="{stage}",state="{name}"', n)
        for stage, counts in state["tiles"].items()
        for name, n in counts.items()
    ]
    gauges += [
        ("tiles_per_minute", "Tiles a minute.", f'{run},stage="{stage}"', n)
        for stage, n in state["pace"].items()
    ]
    gauges += [
        ("scene_reads", "Scenes read.", run, state["scene_reads"]),
        ("drivers", "Drivers and shards at work.", run, state["drivers"]),
        ("stored_bytes", "Bytes stored.", run, state["used"]["bytes"]),
        ("task_hours", "Hours that tiles took.", run, state["used"]["task_hours"]),
        ("peak_memory_gigabytes", "Largest memory of a worker.", run, state["used"]["peak_mem_gb"]),
        ("complete", "1 when nothing is left to do.", run, int(state["complete"])),
    ]
    lines, told = [], set()
    for name, about, labels, value in gauges:
        if name not in told:
            told.add(name)
            lines += [f"# HELP slidecube_{name} {about}", f"# TYPE slidecube_{name} gauge"]
        lines.append(f"slidecube_{name}{{{labels}}} {value:g}")
    return "\n".join(lines) + "\n"


def worker_line(found: Found) -> str:
    """Describe a worker that answered a probe."""
    gpus = f", GPU {found.gpus}" if found.gpus else ""
    return (
        f"{found.host} process {found.pid}: {_count(found.cores, 'core')}, {found.memory_gb:g} GB in all{gpus}, "
        f"slidecube {found.slidecube}, a block of 512 px in {found.seconds:.2f} s"
    )


def worker_share(profile: Profile) -> str:
    """Describe what one worker of a profile may use."""
    worker = profile.worker
    gpus = f" and {_count(worker.gpus, 'GPU')}" if worker.gpus else ""
    return f"{_count(worker.cpus, 'thread')}, {worker.mem_gb:g} GB{gpus}"


def profile_summary(profile: Profile, file: ProfileFile) -> str:
    """Describe a profile: what it is here, and every setting of its own table."""
    rows = [
        ("runner", profile.runner),
        ("workers", str(profile.workers)),
        ("each", worker_share(profile)),
        ("deadline", f"{profile.deadline_min:g} min a tile" if profile.deadline_min else "none"),
    ]
    if file.array is not None:
        rows = rows[:1]
        for stage in ("cube", "fit", "detect", "mosaic"):
            asked = getattr(file.array, stage)
            shards = _count(asked.shards, "job")
            gpus = f", {_count(asked.gpus, 'GPU')}" if asked.gpus else ""
            where = f" in {asked.partition}" if asked.partition else ""
            share = f"each {_count(asked.cpus, 'CPU')}, {asked.mem_gb:g} GB{gpus}, {asked.time_min} min"
            rows.append((stage, f"{shards}{where}, {share}"))
    else:
        rows += [
            (name, _setting(value)) for name, value in profile.options.items() if value not in ("", (), {})
        ]
    width = max(12, *(len(name) + 2 for name, _ in rows))
    return "\n".join(f"{name:<{width}}{text}" for name, text in rows)


def _setting(value: Any) -> str:
    """Write a value of a profile for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {_setting(part)}" for key, part in value.items())
    if isinstance(value, tuple):
        return ", ".join(map(_setting, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _job_line(job: dict[str, Any], run: str) -> str:
    counts = ", ".join(
        f"{job[name]} {name}" for name in ("running", "pending", "failed", "done") if job[name]
    )
    reasons = f" ({', '.join(job['reasons'])})" if job["reasons"] else ""
    nothing = "not known to the queue any more" if job["asked"] else "the queue does not answer"
    other = f" of run {job['run']!r}" * (job["run"] != run)
    return f"{'job ' + job['stage']:<11} {job['id'] or 'without an id'}{other}: {counts or nothing}{reasons}"


def clean_summary(removed: Sequence[tuple[Place, int]], *, dry_run: bool) -> str:
    """Describe what was removed, or would be."""
    if not removed:
        return "nothing is superseded"
    verb = "would remove" if dry_run else "removed"
    total_gb = sum(size for _, size in removed) / 1e9
    return "\n".join([*(f"{verb} {path}" for path, _ in removed), f"{verb} {total_gb:.3f} GB"])


def _scene_rows(made: RunPlan) -> list[tuple[str, ...]]:
    windows = {w: f"{e.name} {side}" for e in made.config.epochs for side, w in e.windows.items()}
    return [
        (
            f"  {windows[group.window]}",
            group.mgrs_tile,
            str(group.count),
            group.first.isoformat(),
            group.last.isoformat(),
            "unknown" if group.cloud_pct is None else f"{group.cloud_pct:.0f} %",
        )
        for group in scenes_by_tile(made.scenes.scenes, tuple(windows))
    ]


def _shares(title: str, counts: dict[str, int]) -> list[str]:
    total = sum(counts.values())
    named = [f"{name.replace('_', ' ')} {100 * n / total:.1f} %" for name, n in counts.items() if n]
    return [f"{title}: {', '.join(named)}"] if named else []


def _listed(title: str, items: Iterable[str]) -> list[str]:
    found = list(items)
    more = [f"{title}: and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return [f"{title}: {item}" for item in found[:_SHOWN]] + more


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lay out rows under a head; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (head, *rows)
    ]


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
