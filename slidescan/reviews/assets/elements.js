/* Elements of the document. What comes from results becomes text, never markup. */

export function element(tag, { text, data, aria, ...properties } = {}, ...children) {
  const made = document.createElement(tag);
  Object.assign(made, properties);
  if (text !== undefined) made.textContent = text;
  if (data) Object.assign(made.dataset, data);
  for (const [name, value] of Object.entries(aria ?? {})) made.setAttribute(`aria-${name}`, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function button(text, onclick, { key, ...more } = {}) {
  const made = element("button", { type: "button", onclick, text, ...more });
  if (key) {
    made.append(" ", element("kbd", { text: key, aria: { hidden: "true" } }));
    made.setAttribute("aria-keyshortcuts", { "←": "ArrowLeft", "→": "ArrowRight" }[key] ?? key);
  }
  return made;
}

export const VERDICTS = {
  accept: { done: "Accepted", mark: "✓" },
  reject: { done: "Rejected", mark: "✗" },
  unsure: { done: "Unsure", mark: "?" },
};

const count = new Intl.NumberFormat("en");
export const counted = (n) => count.format(n);
export const scored = (x) => (x === null ? "" : x.toFixed(2));

/* The longest of 1, 2, 5, 10, … µm that takes at most `share` of a field. */
export function barLength(fieldUm, share) {
  const power = 10 ** Math.floor(Math.log10(fieldUm * share));
  return [5, 2, 1].map((m) => m * power).find((um) => um <= fieldUm * share) ?? power;
}

export const lengthText = (um) => (um >= 1000 ? `${um / 1000} mm` : `${+um.toPrecision(3)} µm`);

/* A square picture of a field of view with the item's box and a scale bar; `fill` gives it its pixels. */
export class Field {
  constructor(className) {
    this.image = element("img", { alt: "", draggable: false });
    this.box = element("div", { className: "ss-box" });
    this.bar = element("div", { className: "ss-bar" }, element("span"));
    this.why = element("p", { className: "ss-why" });
    this.parts = element("div", { className: "ss-parts" });
    this.root = element("div", { className: `ss-field ${className}` }, this.image, this.parts, this.box, this.bar, this.why);
    this.state = "empty";
    this.shownAt = 0; // ms of the page's clock
  }

  /* Returns whether it came to show this item: another may have been wanted meanwhile; `inTurn`, after others. */
  async fill(item, crops, { inTurn = false } = {}) {
    const { fovUm } = crops;
    const wanted = { fovUm };
    this.wanted = wanted;
    this.state = "loading";
    this.root.dataset.state = this.state;
    let url = null;
    let why = "";
    try {
      url = await (inTurn ? crops.inTurn(item) : crops.lookedAt(item));
    } catch (error) {
      why = error.message;
    }
    if (this.wanted !== wanted) return false;
    if (url !== null) {
      this.image.src = url;
      await this.image.decode().catch(() => { why = "The picture cannot be shown."; });
      if (this.wanted !== wanted) return false;
    }
    this.why.textContent = why;
    this.state = why ? "failed" : "shown";
    this.shownAt = performance.now();
    this.root.dataset.state = this.state;
    this.root.dataset.item = item.id;
    this.place(item, fovUm);
    return true;
  }

  place(item, fovUm) {
    const percent = (px) => (100 * px * item.mpp) / fovUm;
    const size = ([left, top, right, bottom]) => Math.max(right - left, bottom - top) * item.mpp;
    const [x0, y0, x1, y1] = size(item.box_l0) <= fovUm ? item.box_l0 : item.focus_l0; // as the server centres pictures
    const put = (box, [left, top, right, bottom]) => Object.assign(box.style, {
      left: `${50 + percent(left - (x0 + x1) / 2)}%`, top: `${50 + percent(top - (y0 + y1) / 2)}%`,
      width: `${percent(right - left)}%`, height: `${percent(bottom - top)}%`,
    });
    put(this.box, item.box_l0);
    this.box.classList.toggle("ss-region", item.parts_l0.length > 0);
    this.parts.replaceChildren(...item.parts_l0.map((part) => {
      const box = element("div", { className: "ss-box" });
      put(box, part);
      return box;
    }));
    const um = barLength(fovUm, 0.3);
    this.bar.style.width = `${(100 * um) / fovUm}%`;
    this.bar.firstChild.textContent = lengthText(um);
  }
}
