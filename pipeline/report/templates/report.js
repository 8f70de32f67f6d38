// What Bokeh does not do by itself: one scale on both axes, layers, renderings, and jumping to a place.
"use strict";
// Bokeh asks for images with CORS, which browsers refuse for file://; the pictures lie beside the page.
if (location.protocol === "file:") {
  Object.defineProperty(HTMLImageElement.prototype, "crossOrigin", { get: () => null, set: () => {} });
}

(() => {
  const PANELS = ["pre", "post", "observed"];
  const DOTS_UNTIL_M_PER_PX = 18;

  const model = (name) => {
    for (const doc of Bokeh.documents) {
      const found = doc.get_model_by_name(name);
      if (found) return found;
    }
    return null;
  };
  const panels = (prefix) => PANELS.map((p) => model(`${prefix}-${p}`)).filter((m) => m !== null);
  const numbers = (text) => text.split(",").map(Number);

  // Shows a box, grown along one axis so that a metre is as long upwards as sideways.
  const show = (prefix, box) => {
    const figure = panels(prefix)[0];
    const width = figure.inner_width || 400;
    const height = figure.inner_height || 400;
    const scale = Math.max((box[2] - box[0]) / width, (box[3] - box[1]) / height);
    const x = (box[0] + box[2]) / 2;
    const y = (box[1] + box[3]) / 2;
    figure.x_range.setv({ start: x - (scale * width) / 2, end: x + (scale * width) / 2 });
    figure.y_range.setv({ start: y - (scale * height) / 2, end: y + (scale * height) / 2 });
  };

  const checked = (prefix) =>
    [...document.querySelectorAll(`.controls[data-prefix="${prefix}"] [data-layer]`)];

  const layers = (prefix) => {
    const figure = panels(prefix)[0];
    const scale = (figure.x_range.end - figure.x_range.start) / (figure.inner_width || 400);
    for (const box of checked(prefix)) {
      for (const panel of PANELS) {
        const name = `${prefix}-${panel}-${box.dataset.layer}`;
        const shapes = model(name);
        const dots = model(`${name}-dots`);
        if (shapes) shapes.visible = box.checked;
        if (dots) dots.visible = box.checked && scale > DOTS_UNTIL_M_PER_PX;
      }
    }
  };

  const rendering = (prefix, index) => {
    for (const panel of ["pre", "post"]) {
      for (let i = 0; ; i += 1) {
        const image = model(`${prefix}-${panel}-image-${i}`);
        if (!image) break;
        image.visible = i === index;
      }
    }
  };

  const pressed = (button) => {
    for (const other of button.parentElement.querySelectorAll("button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
  };

  const control = (controls) => {
    const prefix = controls.dataset.prefix;
    const figure = panels(prefix)[0];
    const whole = [figure.x_range.start, figure.y_range.start, figure.x_range.end, figure.y_range.end];
    const focus = numbers(controls.dataset.focus);
    const views = { all: whole, focus };
    for (const box of checked(prefix)) box.addEventListener("change", () => layers(prefix));
    for (const button of controls.querySelectorAll("[data-image]")) {
      button.addEventListener("click", () => { rendering(prefix, Number(button.dataset.image)); pressed(button); });
    }
    for (const button of controls.querySelectorAll("[data-view]")) {
      button.addEventListener("click", () => show(prefix, views[button.dataset.view]));
    }
    let waiting = false;
    const later = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; layers(prefix); });
    };
    figure.x_range.change.connect(later);
    const settle = () => {
      const { x_range: x, y_range: y } = figure;
      show(prefix, [x.start, y.start, x.end, y.end]);
      layers(prefix);
    };
    show(prefix, whole);
    for (const range of [figure.x_range, figure.y_range]) {
      range.setv({ reset_start: range.start, reset_end: range.end });
    }
    layers(prefix);
    figure.properties.inner_width.change.connect(settle);
  };

  const start = () => {
    for (const controls of document.querySelectorAll(".controls")) control(controls);
    for (const table of document.querySelectorAll("table[data-prefix]")) {
      for (const button of table.querySelectorAll("[data-box]")) {
        button.addEventListener("click", () => {
          const [a, b, c, d] = numbers(button.dataset.box);
          const margin = Math.max(c - a, d - b, 300);
          show(table.dataset.prefix, [a - margin, b - margin, c + margin, d + margin]);
          document.getElementById(`${table.dataset.prefix}-map`).scrollIntoView({ behavior: "smooth" });
        });
      }
    }
    document.documentElement.dataset.ready = "true";
  };

  const wait = (left) => {
    const all = [...document.querySelectorAll(".controls")].every((c) => {
      const found = panels(c.dataset.prefix);
      return found.length === PANELS.length && found[0].inner_width > 0;
    });
    if (all) start();
    else if (left > 0) setTimeout(() => wait(left - 1), 50);
  };
  wait(400);
})();
