"""The report: a folder that opens from `file://` in any browser, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import bokeh
import geopandas as gpd
import jinja2
import numpy as np
import pandas as pd
import pyproj
import xarray as xr
from bokeh.embed import components
from odc.geo.geobox import GeoBox

from slidecube.pipeline import styles
from slidecube.pipeline.disk import naming_a_full_disk
from slidecube.pipeline.evaluate import size_label
from slidecube.pipeline.inventory import REASONS, geobox_of
from slidecube.pipeline.lineage import Lineage, sourcing_lines
from slidecube.pipeline.quality import SIDES, Edge, Quality
from slidecube.pipeline.report import maps
from slidecube.pipeline.report.numbers import densest_box, largest, observed_parts, size_rows
from slidecube.pipeline.report.pictures import (
    LAYER_COLOURS,
    Bounds,
    EpochView,
    focus_of,
    layer_label,
    save_crops,
    save_observability,
    save_overlay,
    visible_layers,
)
from slidecube.pipeline.report.quality import save_counts, save_edges
from slidecube.pipeline.report.static import render_picture
from slidecube.pipeline.storage import Place, relative_href, replaced

N_GALLERY = 12
N_TABLE = 20
FOCUS_PX = 512
COARSEST = 4


def write_report(
    out_dir: Place,
    *,
    inventory: xr.Dataset,
    objects: gpd.GeoDataFrame,
    views: Sequence[EpochView],
    lineage: Lineage,
    products: Mapping[str, Place] | None = None,
    quality: Quality | None = None,
) -> Place:
    """Write the report of an inventory; what was there is replaced when the new one is whole.

    inventory : (epoch, y, x), opened decoded or as stored; objects : by `polygons.SCHEMA`, of all epochs
    views : one an epoch: its pictures, and its evaluation when there is a reference
    products : label -> file to link to; quality : written beside the page as JSON and CSV, too
    Returns the path of index.html.
    """
    with replaced(out_dir) as partial, naming_a_full_disk(partial):
        page = _Page(folder=partial, inventory=inventory, objects=objects, lineage=lineage)
        _fill(page, views, _links(products or {}, out_dir), quality)
    return out_dir / "index.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Page:
    """What every part of the page is made of."""

    folder: Path
    inventory: xr.Dataset
    objects: gpd.GeoDataFrame
    lineage: Lineage


def _fill(
    of: _Page, views: Sequence[EpochView], links: list[dict[str, str]], quality: Quality | None
) -> None:
    folder = of.folder
    (folder / "img").mkdir(parents=True)
    sections, figures = [], {}
    for i, view in enumerate(views):
        section, panels = _epoch(of, f"e{i}", view)
        sections.append(section)
        figures.update(panels)
    script, divs = components(figures, wrap_script=False)
    for section in sections:
        section["div"] = {key: divs[f"{section['prefix']}-{key}"] for key in (*maps.PANELS, "sizes")}
    context = _context(of, sections, links) | {"quality": _quality(folder, quality) if quality else None}
    _copy_assets(folder, script)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("slidecube.pipeline.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, area=area_text)
    environment.globals.update(size_label=size_label)
    page = environment.get_template("index.html.j2").render(context)
    (folder / "index.html").write_text(page, encoding="utf-8")


def _epoch(of: _Page, prefix: str, view: EpochView) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything of one epoch: its numbers for the template, and its figures."""
    folder, inventory, objects, lineage = of.folder, of.inventory, of.objects, of.lineage
    geobox = geobox_of(inventory)
    observed = observed_parts(inventory, geobox, epoch=view.index)
    bounds = observed.bounds
    own = objects[objects["epoch"] == view.name]
    layers = visible_layers(own, view.evaluation)
    panels = maps.linked_maps(
        prefix=prefix,
        bounds=bounds,
        images=_overlays(folder, prefix, inventory, view),
        layers=layers,
        titles={"pre": "Before", "post": "After", "observed": "What could be observed"},
    )
    areas = {"mapped": own["area_m2"].to_numpy(dtype=np.float64)}
    if view.evaluation is not None:
        areas["simulated truth" if lineage.simulated else "reference"] = view.evaluation.truth[
            "area_m2"
        ].to_numpy()
    palette = dict(zip(areas, (styles.FOUND, styles.FALSE_NEGATIVE), strict=False))
    render_picture(
        folder / "img" / f"{prefix}-overview.png",
        inventory=inventory,
        objects=objects,
        view=view,
        title=f"{lineage.name}: {view.name}",
        simulated=lineage.simulated,
    )
    section = {
        "prefix": prefix,
        "name": view.name,
        "windows": next((e for e in lineage.epochs if e.name == view.name), None),
        "n": len(own),
        "area_m2": float(own["area_m2"].sum()),
        "largest": _table(own, bounds),
        "sizes": size_rows(own["area_m2"].to_numpy(dtype=np.float64)),
        "observed": observed,
        "layers": [
            {
                "key": key,
                "label": layer_label(key, len(layer), simulated=lineage.simulated),
                "colour": LAYER_COLOURS[key],
                "drawn": min(len(layer), maps.MOST_DRAWN),
                "n": len(layer),
            }
            for key, layer in layers.items()
        ],
        "renderings": list(dict.fromkeys([*view.pre, *view.post])),
        "evaluation": view.evaluation,
        "score": None if view.evaluation is None else view.evaluation.to_dict(),
        "gallery": _gallery(folder, prefix, layers, view, abs(geobox.affine.a)),
        "focus": _local(densest_box(focus_of(own, view), bounds, FOCUS_PX * abs(geobox.affine.a)), bounds),
        "has_probability": bool(own["probability"].notna().any()),
    }
    figures = {f"{prefix}-{panel}": fig for panel, fig in panels.items()}
    return section, {**figures, f"{prefix}-sizes": maps.size_plot(areas, palette)}


def _quality(folder: Path, quality: Quality) -> dict[str, Any]:
    """Write the quality as JSON, CSV and pictures; returns what the page shows of it."""
    (folder / "quality.json").write_text(quality.to_json(), encoding="utf-8")
    (folder / "quality.csv").write_text(quality.to_csv(), encoding="utf-8")
    for row in quality.epochs:
        save_counts(folder / "img" / f"quality-{row['epoch']}.png", quality, row["epoch"])
    lined = [edge for edge in quality.edges if edge.line]
    if lined:
        save_edges(folder / "img" / "quality-edges.png", lined, quality.outline)
    worst = sorted(quality.edges, key=lambda edge: -edge.measured.score)[:N_TABLE]
    tiles = sorted(
        quality.tiles, key=lambda row: (row["observed_px"] / max(row["expected_px"], 1), row["tile"])
    )
    return {
        "epochs": quality.epochs,
        "tiles": tiles[:N_TABLE],
        "n_tiles": len(tiles),
        "reasons": {f"reason_{i:d}_px": text for i, text in REASONS.items() if i},
        "edges": [{**edge.row(), "between": between(edge), "unit": unit_of(edge)} for edge in worst],
        "n_edges": len(quality.edges),
        "n_seams": len(quality.seams()),
        "drawn": bool(lined),
        "sensors": quality.sensors(),
        "gaps": quality.gaps,
        "omissions": quality.omissions,
        "sides": [(side, count, SIDE_TITLES[side]) for side, count in SIDES.items()],
    }


SIDE_TITLES = {
    "pre": "before",
    "post": "after",
    "radar_pre": "radar before",
    "radar_post": "radar after",
}


def between(edge: Edge) -> str:
    """Say what meets at an edge: of two sets of overpasses or sensors only those that are on one side alone."""
    first, second = (side.split(" + ") for side in (edge.first, edge.second))
    alone = [[name for name in one if name not in other] for one, other in ((first, second), (second, first))]
    if all(alone):
        return " and ".join(", ".join(names) for names in alone)
    side, names = ("second", alone[1]) if alone[1] else ("first", alone[0])
    return f"{', '.join(names)} on the {side} side only"


def unit_of(edge: Edge) -> str:
    """Unit of an edge's step."""
    return "dB" if edge.variable in ("VV", "VH") else "reflectance"


def _overlays(
    folder: Path, prefix: str, inventory: xr.Dataset, view: EpochView
) -> dict[str, list[maps.Overlay]]:
    overlays: dict[str, list[maps.Overlay]] = {"pre": [], "post": [], "observed": []}
    for panel, pictures in (("pre", view.pre), ("post", view.post)):
        for i, picture in enumerate(pictures.values()):
            href = f"img/{prefix}-{panel}-{i}.png"
            save_overlay(folder / href, picture)
            overlays[panel].append(maps.Overlay(href=href, bounds=picture.bounds))
    href = f"img/{prefix}-observed.png"
    save_observability(folder / href, inventory, epoch=view.index)
    overlays["observed"].append(maps.Overlay(href=href, bounds=geobox_of(inventory).boundingbox.bbox))
    return overlays


def _gallery(
    folder: Path, prefix: str, layers: Mapping[str, gpd.GeoDataFrame], view: EpochView, resolution_m: float
) -> list[dict[str, Any]]:
    """The largest objects before and after, each a small picture; what was missed is among them."""
    if not view.pre or not view.post:
        return []
    pair = (next(iter(view.pre.values())), next(iter(view.post.values())))
    if max(abs(p.geobox.affine.a) for p in pair) > COARSEST * resolution_m:
        return []  # a nation's overview shows nothing of one slide
    shown = [k for k in ("found", "tp", "fn", "fp") if k in layers]
    each = N_GALLERY // max(len(shown), 1)
    cards: list[dict[str, Any]] = []
    row: Any
    for key in shown:
        layer = layers[key].assign(id=maps._ids(layers[key]))  # noqa: SLF001
        for row in largest(layer, each).itertuples():
            href = f"img/{prefix}-object-{len(cards)}.png"
            if save_crops(folder / href, pair, row.geometry, LAYER_COLOURS[key]):
                cards.append({"href": href, "id": row.id, "area_m2": row.area_m2, "key": key})
    return cards


def _table(own: gpd.GeoDataFrame, bounds: Bounds) -> list[dict[str, Any]]:
    left, _, _, top = bounds
    rows = []
    row: Any
    for row in largest(own, N_TABLE).itertuples():
        xmin, ymin, xmax, ymax = row.geometry.bounds
        rows.append(
            {
                "id": row.id,
                "area_m2": row.area_m2,
                "probability": None if np.isnan(row.probability) else row.probability,
                "slope_deg": None if np.isnan(row.slope_deg) else row.slope_deg,
                "elevation": None
                if np.isnan(row.elevation_min_m)
                else (row.elevation_min_m, row.elevation_max_m),
                "before": None if pd.isna(row.pre_date) else str(row.pre_date)[:10],
                "after": None if pd.isna(row.post_date) else str(row.post_date)[:10],
                "box": [xmin - left, ymin - top, xmax - left, ymax - top],
            }
        )
    return rows


def _context(of: _Page, sections: list[dict[str, Any]], links: list[dict[str, str]]) -> dict[str, Any]:
    geobox, lineage = geobox_of(of.inventory), of.lineage
    return {
        "lineage": lineage,
        "sourcing": sourcing_lines(lineage.sources),
        "epochs": sections,
        "n_objects": len(of.objects),
        "links": links,
        "images": sum(scene.image for scene in lineage.scenes),
        "scenes": [
            {
                "id": s.id,
                "use": s.use,
                "day": s.datetime.date().isoformat() if s.datetime else "",
                "source": s.source,
                "href": s.href if s.href.startswith(("https://", "http://")) else "",
            }
            for s in sorted(lineage.scenes, key=lambda s: (s.use, str(s.datetime), s.id))
        ],
        "crs": _crs_text(geobox),
        "resolution_m": abs(geobox.affine.a),
        "shape": geobox.shape,
        "ramp": styles.PROBABILITY_RAMP,
        "colour": {
            "observed": styles.OBSERVABILITY,
            "reasons": styles.REASONS,
            "layers": LAYER_COLOURS,
        },
        "reasons": REASONS,
        "most_drawn": maps.MOST_DRAWN,
        "bokeh_version": bokeh.__version__,
    }


def _crs_text(geobox: GeoBox) -> str:
    """The CRS as people write it: its EPSG code and name, else its definition in PROJ's words."""
    crs = pyproj.CRS.from_user_input(str(geobox.crs))
    code = crs.to_epsg()
    if code is not None:
        return f"EPSG:{code}, {crs.name}"
    method = crs.coordinate_operation
    if method is None:
        return crs.name
    terms = ", ".join(f"{p.name.lower()} {p.value:g}" for p in method.params if p.value)
    return f"{method.method_name} ({terms}), {crs.ellipsoid.name if crs.ellipsoid else crs.name}"


def _copy_assets(folder: Path, script: str) -> None:
    js = folder / "js"
    js.mkdir()
    source = Path(bokeh.__file__).parent / "server" / "static" / "js" / "bokeh.min.js"
    shutil.copyfile(source, js / "bokeh.min.js")
    (js / "figures.js").write_text(script, encoding="utf-8")
    templates = files("slidecube.pipeline.report") / "templates"
    (js / "report.js").write_text((templates / "report.js").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "report.css").write_text(
        (templates / "report.css").read_text(encoding="utf-8"), encoding="utf-8"
    )


def _links(products: Mapping[str, Place], out_dir: Place) -> list[dict[str, str]]:
    from urllib.parse import quote  # noqa: PLC0415

    return [
        {
            "label": label,
            "href": quote(relative_href(path, out_dir)),
            "name": path.name,
            "size": _size(path),
        }
        for label, path in products.items()
        if path.exists()
    ]


def _size(path: Place) -> str:
    if path.is_dir():
        return "folder"
    n = float(path.stat().st_size)
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def _local(box: Bounds, bounds: Bounds) -> list[float]:
    return [box[0] - bounds[0], box[1] - bounds[3], box[2] - bounds[0], box[3] - bounds[3]]


def percent(share: float | None) -> str:
    """A share as a percentage that keeps small ones visible; None is a dash."""
    if share is None:
        return "-"
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    if share > 0.999:
        return "over 99.9 %"
    digits = 1 if share >= 0.01 else 2 if share >= 0.001 else 3
    return f"{100 * share:.{digits}f} %"


def area_text(m2: float) -> str:
    """An area in the unit that people use for its size."""
    if m2 < 10_000:
        return f"{m2:,.0f} m²"
    if m2 < 1_000_000:
        return f"{m2 / 10_000:,.1f} ha"
    return f"{m2 / 1_000_000:,.2f} km²"
