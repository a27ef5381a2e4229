/* The review in the output of a notebook's cell: requests and answers are messages of the widget. */
import { element } from "./elements.js";
import { mount } from "./page.js";

const SLOW_MS = 3000; // then the wait is explained; a picture takes a tenth of it
const PATIENCE_MS = 600_000; // where nothing tells whether the kernel lives; a cell before this one may take as long
const GONE = "The kernel was stopped or restarted: run the cell again, after reloading the page where that shows nothing.";
const WAITING = "Waiting for the kernel, which is busy or was stopped. If it was stopped, run the cell again.";
// The notebook sends what was decided when it is connected again, if the kernel still runs then.
const AWAY = "No connection to the notebook's server: what you do is sent when it is back.";
const ENDED = ["dead", "restarting", "autorestarting", "terminating"]; // as Jupyter calls a kernel's states

class MessageCarrier {
  constructor(model, say) {
    Object.assign(this, { model, say, asked: 0, waiting: new Map(), gone: false });
    // Every view of the widget hears every answer, in other windows, too. Not randomUUID: a hub may be without https.
    this.view = Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(36)).join("-");
    this.kernel = model.widget_manager?.kernel; // where the notebook has one to show
    this.onAnswer = (told, buffers) => this.#answered(told, buffers);
    this.onEnd = () => this.#ended();
    this.onStatus = (_, status) => { if (ENDED.includes(status)) this.#ended(); };
    model.on("msg:custom", this.onAnswer);
    // It is live when it comes; of its end there are several signs.
    for (const sign of ["comm:close", "comm_live_update", "destroy"]) model.on(sign, this.onEnd);
    this.kernel?.statusChanged?.connect(this.onStatus);
    this.kernel?.disposed?.connect(this.onEnd);
    this.clock = setInterval(() => this.#look(), SLOW_MS / 3);
  }

  request(kind, values, signal) {
    if (this.gone) return Promise.reject(new Error(GONE));
    if (signal?.aborted) return Promise.reject(signal.reason);
    this.asked += 1;
    const { view, asked: n } = this;
    return new Promise((resolve, reject) => {
      this.waiting.set(n, { resolve, reject, since: performance.now() });
      signal?.addEventListener("abort", () => {
        if (!this.#take(n)) return;
        this.model.send({ view, n, drop: true });
        reject(signal.reason);
      });
      this.model.send({ view, n, kind, values });
    });
  }

  close() {
    this.#fail(GONE);
    this.gone = true;
    clearInterval(this.clock);
    this.model.off("msg:custom", this.onAnswer);
    for (const sign of ["comm:close", "comm_live_update", "destroy"]) this.model.off(sign, this.onEnd);
    this.kernel?.statusChanged?.disconnect(this.onStatus);
    this.kernel?.disposed?.disconnect(this.onEnd);
  }

  #take(n) {
    const asked = this.waiting.get(n);
    this.waiting.delete(n);
    return asked;
  }

  #answered({ view, n, answer, media_type: type, error }, buffers) {
    const asked = view === this.view && this.#take(n);
    if (!asked) return;
    this.say("");
    if (error !== undefined) asked.reject(new Error(error));
    else asked.resolve(type === undefined ? answer : new Blob(buffers, { type }));
  }

  #ended() {
    if (this.gone) return;
    this.gone = true;
    this.#fail(GONE);
    this.say(GONE);
  }

  /* The oldest request is the first that waits. */
  #look() {
    if (!this.waiting.size) return;
    const waited = performance.now() - this.waiting.values().next().value.since;
    const away = (this.kernel?.connectionStatus ?? "connected") !== "connected";
    if (waited > SLOW_MS) this.say(away ? AWAY : WAITING);
    // A kernel known to live may be as busy as it likes.
    if (waited > PATIENCE_MS && !this.kernel) {
      this.#fail("The kernel did not answer for ten minutes: run the cell again and see what is saved.");
    }
  }

  #fail(why) {
    const all = [...this.waiting.values()];
    this.waiting.clear();
    for (const { reject } of all) reject(Object.assign(new Error(why), { lost: true })); // it may have been done
  }
}

/* Keys in the review are the review's: notebooks have theirs, such as a for a cell above. Saving is left to them. */
function keepKeys(cell) {
  const suppress = (event) => {
    const saves = (event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "s";
    cell.toggleAttribute("data-lm-suppress-shortcuts", !saves);
    return saves;
  };
  // Before Jupyter's, which is at the document, and by its version on the way down or up.
  window.addEventListener("keydown", suppress, true);
  for (const name of ["keydown", "keypress", "keyup"]) {
    cell.addEventListener(name, (event) => { if (!suppress(event)) event.stopPropagation(); });
  }
  return () => window.removeEventListener("keydown", suppress, true);
}

function render({ model, el }) {
  const root = element("div");
  const notice = element("p", { className: "ss-kernel", role: "status" });
  const cell = element("div", { className: "ss-cell" }, notice, root);
  const leaveKeys = keepKeys(cell);
  const carrier = new MessageCarrier(model, (text) => { if (notice.textContent !== text) notice.textContent = text; });
  el.append(cell);
  let ended = false;
  const end = (review) => {
    for (const picture of review.crops.kept.values()) picture.then(URL.revokeObjectURL, () => {});
    review.context.viewer?.destroy();
  };
  mount(root, carrier, { OpenSeadragon, keysFrom: root }).then(
    (review) => {
      root.review = review;
      if (ended) end(review);
    },
    (error) => { root.textContent = error.message; },
  );
  return () => {
    ended = true;
    carrier.close();
    leaveKeys();
    if (root.review) end(root.review);
  };
}

export default { render };
