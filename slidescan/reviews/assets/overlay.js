/* What lies over the slide, on one canvas: what was not analysed, density, boxes, the item in question. */
import { PER_BOX } from "./boxes.js";

const MARK = "#0072b2"; // as in the overview picture
const BELOW = "#5a6b75"; // boxes below the threshold
const ITEM = "#009e73";
const DOT_PX = 4; // screen px: a box smaller than this is a dot, and of dots as near as this one is enough
const LEAST_SIDE_PX = 14; // screen px: the item in question is never drawn smaller
/* Coverage values; see slidescan.anomaly.Coverage. */
const STATES = { background: [0, 1], saturated: [3], failed: [4] };

/* A bitmap's pixels of some grey levels, opaque; the others are clear. */
function maskOf(pixels, states) {
  const canvas = new OffscreenCanvas(pixels.width, pixels.height);
  const mask = new ImageData(pixels.width, pixels.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    if (states.includes(pixels.data[i])) mask.data[i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(mask, 0, 0);
  return canvas;
}

export function masksOf(bitmap) {
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, bitmap.width, bitmap.height);
  return Object.fromEntries(Object.entries(STATES).map(([name, states]) => [name, maskOf(pixels, states)]));
}

/* Lines at 45°, `gap` px apart. */
function hatch(colour, gap, width) {
  const canvas = new OffscreenCanvas(gap, gap);
  const context = canvas.getContext("2d");
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.beginPath();
  for (const shift of [-gap, 0, gap]) {
    context.moveTo(shift - 1, gap + 1);
    context.lineTo(shift + gap + 1, -1);
  }
  context.stroke();
  return canvas;
}

export class Overlay {
  constructor() {
    this.canvas = document.createElement("canvas");
    this.canvas.className = "ss-overlay";
    this.context = this.canvas.getContext("2d");
    this.scratch = new OffscreenCanvas(1, 1);
    const pattern = (...how) => this.context.createPattern(hatch(...how), "repeat");
    this.fills = { background: pattern("rgb(70 74 84 / 45%)", 9, 1), saturated: "rgb(255 210 80 / 60%)",
      failed: pattern("rgb(120 20 20 / 90%)", 7, 3) };
  }

  /* view: {left, top} of the slide in css px, scale in css px per level-0 px, width, height of the canvas in css px. */
  paint(view, layers, shown) {
    const ratio = devicePixelRatio;
    const [width, height] = [Math.round(view.width * ratio), Math.round(view.height * ratio)];
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    const { context } = this;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, view.width, view.height);
    const cover = [view.left, view.top, layers.mapWh[0] * view.scale, layers.mapWh[1] * view.scale];
    // The map's last px may reach beyond the slide.
    context.save();
    context.beginPath();
    context.rect(view.left, view.top, layers.size[0] * view.scale, layers.size[1] * view.scale);
    context.clip();
    if (layers.masks && shown.coverage) this.#hatch(layers.masks, cover, width, height, ratio);
    if (layers.heat && shown.heat) {
      context.globalAlpha = shown.opacity;
      context.drawImage(layers.heat, ...cover);
      context.globalAlpha = 1;
    }
    context.restore();
    this.drawn = layers.index && shown.boxes ? this.#boxes(view, layers, shown.minScore) : 0;
    if (shown.item) this.#item(view, shown.item);
  }

  #hatch(masks, [x, y, w, h], width, height, ratio) {
    if (this.scratch.width !== width || this.scratch.height !== height) Object.assign(this.scratch, { width, height });
    const scratch = this.scratch.getContext("2d");
    for (const [name, mask] of Object.entries(masks)) {
      scratch.globalCompositeOperation = "copy";
      scratch.imageSmoothingEnabled = false;
      scratch.drawImage(mask, x * ratio, y * ratio, w * ratio, h * ratio);
      scratch.globalCompositeOperation = "source-in";
      scratch.fillStyle = this.fills[name];
      scratch.fillRect(0, 0, width, height);
      this.context.setTransform(1, 0, 0, 1, 0, 0);
      this.context.drawImage(this.scratch, 0, 0);
    }
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
  }

  /* Returns how many were drawn. */
  #boxes(view, { index, threshold }, minScore) {
    const { left, top, scale } = view;
    const { values } = index;
    const rectangle = [-left / scale, -top / scale, (view.width - left) / scale, (view.height - top) / scale];
    const found = new Path2D();
    const below = new Path2D();
    let drawn = 0;
    const path = (i) => {
      const score = values[i * PER_BOX + 4];
      if (score < minScore) return null; // never of a NaN, which a blinded review has
      drawn += 1;
      return score < threshold ? below : found;
    };
    const outline = (i) => {
      const at = i * PER_BOX;
      path(i)?.rect(values[at] * scale + left, values[at + 1] * scale + top,
        (values[at + 2] - values[at]) * scale, (values[at + 3] - values[at + 1]) * scale);
    };
    const dot = (i) => {
      const at = i * PER_BOX;
      const [x, y] = [(values[at] + values[at + 2]) / 2, (values[at + 1] + values[at + 3]) / 2];
      path(i)?.rect(x * scale + left - 1.5, y * scale + top - 1.5, 3, 3);
    };
    const dots = 2 * index.reach * scale < DOT_PX;
    if (!dots || !index.eachThinned(...rectangle, DOT_PX / scale, dot)) index.each(...rectangle, dots ? dot : outline);
    const { context } = this;
    context.lineWidth = 1.5;
    for (const [colour, boxes] of [[BELOW, below], [MARK, found]]) {
      context.fillStyle = context.strokeStyle = colour;
      if (dots) context.fill(boxes);
      else context.stroke(boxes);
    }
    return drawn;
  }

  #item({ left, top, scale }, { box_l0: [x0, y0, x1, y1], polygon_l0: polygon }) {
    const { context } = this;
    context.beginPath();
    if (polygon && Math.min(x1 - x0, y1 - y0) * scale >= LEAST_SIDE_PX) {
      polygon.forEach(([x, y], i) => context[i ? "lineTo" : "moveTo"](x * scale + left, y * scale + top));
      context.closePath();
    } else {
      const [w, h] = [x1 - x0, y1 - y0].map((side) => Math.max(side * scale, LEAST_SIDE_PX));
      context.rect(((x0 + x1) / 2) * scale + left - w / 2, ((y0 + y1) / 2) * scale + top - h / 2, w, h);
    }
    // White around the colour: it is seen on dark nuclei, too.
    for (const [colour, lineWidth] of [["rgb(255 255 255 / 85%)", 5], [ITEM, 2.5]]) {
      Object.assign(context, { strokeStyle: colour, lineWidth });
      context.stroke();
    }
  }
}
