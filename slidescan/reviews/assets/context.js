/* The whole slide, from all of it down to single px, around the item in question. */
import { BoxIndex } from "./boxes.js";
import { Overlay, masksOf } from "./overlay.js";
import { barLength, counted, element, lengthText } from "./elements.js";

const AROUND_UM = 400; // field of view on opening: a high-power field is about 500 µm wide
const MOST_ENLARGED = 4; // screen px a slide's px
const PAN = 0.2; // share of the view that a key moves
const ZOOM = 1.5; // a key's factor
const MOST_TILES = 150; // tiles, of 1 MB each
const REACH = 10; // screen px around an item that a click still means
const MOST_LOADING = 4; // tiles at once: a browser asks one server for six things, and a decision is not to wait

export class SlideView {
  constructor(transport, OpenSeadragon, { say, blinded, onPlace }) {
    Object.assign(this, { transport, OpenSeadragon, say, onPlace });
    this.overlay = new Overlay();
    this.shown = { heat: !blinded, boxes: true, coverage: true, opacity: 0.35, minScore: 0, item: null };
    this.slide = null;
    this.layers = null;
    this.stage = element("div", { className: "ss-stage" });
    this.bar = element("div", { className: "ss-bar" }, element("span"));
    this.legend = element("p", { className: "ss-legend" });
    const check = (name, text) => element("label", {}, element("input", {
      type: "checkbox", checked: this.shown[name], onchange: (event) => this.set(name, event.target.checked),
    }), ` ${text}`);
    const range = (name, text, max) => element("label", {}, `${text} `, element("input", {
      type: "range", min: 0, max, step: 0.01, value: this.shown[name],
      oninput: (event) => this.set(name, Number(event.target.value)),
    }));
    this.controls = element("div", { className: "ss-layers", role: "group", aria: { label: "What is shown" } },
      ...(blinded ? [] : [check("heat", "Heat map"), range("opacity", "Opacity", 1)]),
      check("boxes", "Boxes"), check("coverage", "Not analysed"),
      ...(blinded ? [] : [range("minScore", "Least score", 1)]));
    this.least = this.controls.querySelector("label:last-child input");
    this.heatBox = blinded ? null : this.controls.querySelector("input");
    this.boxesBox = [...this.controls.querySelectorAll("input[type=checkbox]")].at(-2);
    this.frame = element("div", { className: "ss-frame" }, this.stage, this.bar);
    this.root = element("section", { className: "ss-context", hidden: true, aria: { label: "Slide" } },
      this.controls, this.frame, this.legend);
    this.blinded = blinded;
  }

  set(name, value) {
    this.shown[name] = value;
    if (name === "heat" && this.heatBox) this.heatBox.checked = value;
    if (name === "boxes") this.boxesBox.checked = value;
    this.paint();
  }

  /* Show an item on its slide; the slide is opened where it is not. With `stay` the view is left where it is. */
  async show(item, { stay = false } = {}) {
    this.shown.item = item;
    this.wanted = item.slide;
    if (this.slide !== item.slide) {
      if (this.opening !== item.slide) await this.#open(item.slide);
      else return;
    }
    if (this.wanted !== this.slide || !this.image) return;
    if (!stay) this.lookAt(this.shown.item);
    this.paint();
  }

  async #open(slide) {
    this.opening = slide;
    this.slide = this.layers = this.image = null;
    delete this.root.dataset.layers;
    this.viewer?.close();
    try {
      const told = await this.transport.request("slide", { slide });
      if (this.wanted !== slide) return;
      this.#start();
      await this.#tiles(slide, told);
      if (this.wanted !== slide) return;
      this.slide = slide;
      this.layers = { size: told.size_wh, mapWh: told.map_wh_l0, threshold: told.threshold };
      this.told = told;
      if (!this.blinded) {
        this.set("minScore", told.threshold);
        this.least.value = told.threshold;
      }
      this.#load(slide, this.layers);
    } catch (error) {
      if (this.wanted === slide) this.say(error.message, { wrong: true });
    } finally {
      if (this.opening === slide) this.opening = null;
    }
  }

  #start() {
    if (this.viewer) return;
    this.viewer = new this.OpenSeadragon.Viewer({
      element: this.stage, showNavigationControl: false, drawer: "canvas", animationTime: 0.5, springStiffness: 10,
      maxZoomPixelRatio: MOST_ENLARGED, visibilityRatio: 0.3, imageLoaderLimit: MOST_LOADING, maxImageCacheCount: MOST_TILES,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true }, tabIndex: 0, preload: false,
      tileRetryMax: 3, tileRetryDelay: 2000, // a laptop that slept, a tunnel that broke
    });
    // The page has keys of its own; OpenSeadragon's would turn and flip the slide.
    this.viewer.addHandler("canvas-key", (event) => { event.preventDefaultAction = true; });
    this.viewer.addHandler("canvas-click", (event) => { if (event.quick) this.#clicked(event.position); });
    for (const name of ["update-viewport", "resize"]) this.viewer.addHandler(name, () => this.paint());
    this.stage.append(this.overlay.canvas);
    const { canvas } = this.viewer; // the stop of the Tab key
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", "Slide: + and − zoom, Shift and the arrows move, 0 shows all of it");
  }

  #clicked({ x, y }) {
    if (!this.layers || !this.image) return;
    const { left, top, scale } = this.view();
    const [width, height] = this.layers.size;
    const inside = (place, size) => Math.max(0, Math.min(size, place / scale));
    this.onPlace({ slide: this.slide, x_l0: inside(x - left, width), y_l0: inside(y - top, height),
      reach_l0: Math.min(REACH / scale, width, height) });
  }

  #tiles(slide, told) {
    const source = new this.OpenSeadragon.TileSource({
      width: told.size_wh[0], height: told.size_wh[1], tileSize: told.tile_px, tileOverlap: 0,
      minLevel: told.least, maxLevel: told.most,
    });
    // A name, not an address: tiles come over the transport.
    source.getTileUrl = (level, x, y) => `${slide}/${level}/${x}/${y}`;
    source.downloadTileStart = (job) => {
      const [, level, x, y] = job.src.split("/").map(Number);
      const ending = new AbortController();
      job.userData.ending = ending;
      this.transport.request("tile", { slide, level, x, y }, ending.signal)
        .then((blob) => createImageBitmap(blob))
        .then((bitmap) => {
          const canvas = Object.assign(document.createElement("canvas"), { width: bitmap.width, height: bitmap.height });
          const context = canvas.getContext("2d");
          context.drawImage(bitmap, 0, 0);
          bitmap.close();
          job.finish(context, null, "context2d");
        })
        .catch((error) => {
          job.fail(error.message, null);
          if (!ending.signal.aborted) this.say(error.message, { wrong: true });
        });
    };
    source.downloadTileAbort = (job) => job.userData.ending?.abort();
    return new Promise((resolve, reject) => {
      this.viewer.addOnceHandler("open", () => {
        this.image = this.viewer.world.getItemAt(0);
        resolve();
      });
      this.viewer.addOnceHandler("open-failed", (event) => reject(new Error(event.message)));
      this.viewer.open(source);
    });
  }

  async #load(slide, layers) {
    const bitmap = (kind) => this.transport.request(kind, { slide }).then((blob) => createImageBitmap(blob));
    const parts = [
      bitmap("coverage").then((made) => { layers.masks = masksOf(made); }),
      this.transport.request("boxes", { slide }).then((blob) => blob.arrayBuffer())
        .then((buffer) => { layers.index = new BoxIndex(new Float32Array(buffer), layers.size); }),
    ];
    if (!this.blinded) parts.push(bitmap("heat").then((made) => { layers.heat = made; }));
    for (const part of parts) part.then(() => this.paint(), (error) => this.say(error.message, { wrong: true }));
    await Promise.allSettled(parts);
    if (this.slide === slide) this.root.dataset.layers = this.told.name;
  }

  lookAt(item) {
    const [x0, y0, x1, y1] = item.box_l0;
    const side = Math.max(AROUND_UM / item.mpp, 1.5 * Math.max(x1 - x0, y1 - y0));
    const [x, y] = [(x0 + x1) / 2, (y0 + y1) / 2];
    const bounds = this.image.imageToViewportRectangle(x - side / 2, y - side / 2, side, side);
    this.viewer.viewport.fitBounds(bounds, !this.looked);
    this.looked = true;
  }

  zoom(nearer) {
    this.viewer?.viewport.zoomBy(nearer ? ZOOM : 1 / ZOOM);
    this.viewer?.viewport.applyConstraints();
  }

  pan(key) {
    const bounds = this.viewer?.viewport.getBounds();
    if (!bounds) return;
    const [x, y] = { ArrowLeft: [-PAN, 0], ArrowRight: [PAN, 0], ArrowUp: [0, -PAN], ArrowDown: [0, PAN] }[key];
    this.viewer.viewport.panBy(new this.OpenSeadragon.Point(x * bounds.width, y * bounds.height));
    this.viewer.viewport.applyConstraints();
  }

  whole() {
    this.viewer?.viewport.goHome();
  }

  /* The view as numbers: {left, top, scale, width, height} in css px. */
  view() {
    const point = (x, y) => this.image.imageToViewerElementCoordinates(new this.OpenSeadragon.Point(x, y));
    const [start, end] = [point(0, 0), point(this.layers.size[0], 0)];
    const { x: width, y: height } = this.viewer.viewport.getContainerSize();
    return { left: start.x, top: start.y, scale: (end.x - start.x) / this.layers.size[0], width, height };
  }

  paint() {
    if (!this.layers || !this.image || this.root.hidden) return;
    const started = performance.now();
    const view = this.view();
    this.overlay.paint(view, this.layers, this.shown);
    this.paintMs = performance.now() - started;
    const umPerPx = this.told.mpp / view.scale;
    const um = barLength(view.width * umPerPx, 0.25);
    this.bar.style.width = `${um / umPerPx}px`;
    this.bar.firstChild.textContent = lengthText(um);
    const boxes = this.layers.index ? `${counted(this.layers.index.n)} boxes on ${this.told.name}` : "loading boxes";
    const heat = this.blinded ? "" : `heat: red is ${this.told.ramp_end_per_mm2} or more per mm²; `;
    this.legend.textContent = `${boxes}; a click goes to an item; ${heat}hatched: not analysed; ${umPerPx.toPrecision(3)} µm per screen px`;
  }
}
