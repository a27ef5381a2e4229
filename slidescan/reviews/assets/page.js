/* A review in an element, over a transport.

   transport.request(kind, values, signal?) gives a promise of an object, or of a Blob where the answer is bytes; it is
   refused with an Error whose message is for a person. */
import { VERDICTS, counted, element } from "./elements.js";
import { Crops } from "./crops.js";
import { helpDialog, listen } from "./keys.js";
import { Filters } from "./filters.js";
import { Gallery } from "./gallery.js";
import { Panel } from "./panel.js";
import { SlideView } from "./context.js";
import { Summary } from "./summary.js";

const PER_PAGE = 24; // items: as many as are seen at once
const AHEAD = 8; // items whose pictures are fetched before they are needed

export async function mount(root, transport, { OpenSeadragon = globalThis.OpenSeadragon, keysFrom = root } = {}) {
  root.tabIndex = -1; // a click beside everything leaves the keys here
  root.setAttribute("role", "region");
  root.setAttribute("aria-label", "Review");
  root.classList.add("slidescan-review");
  const state = await transport.request("state", {});
  const review = new Page(root, transport, state, { OpenSeadragon, keysFrom });
  if (state.notice) review.panel.say(`${state.notice}.`);
  await review.list();
  return review;
}

class Page {
  constructor(root, transport, state, { OpenSeadragon, keysFrom }) {
    Object.assign(this, { root, transport, state });
    this.left = state.left;
    Object.assign(this, { listing: null, total: 0, pages: new Map(), index: 0 }); // until there is a list
    this.asked = 0; // lists
    this.acting = null; // what is being written, and the move that follows it
    this.crops = new Crops(transport, state.of === "detection" ? 64 : 128);
    const say = (...said) => this.panel.say(...said);
    const acts = {
      ...Object.fromEntries(Object.keys(VERDICTS).map((verdict) => [verdict, (by) => {
        if (!this.panel.doubled(by)) this.#act(() => this.decide(verdict));
      }])),
      label: (key) => this.panel.choose(Number(key)),
      previous: () => this.go(this.index - 1),
      next: () => this.go(this.index + 1),
      undo: () => this.#act(() => this.undo()),
      context: () => this.toggleContext(),
      heat: () => this.toggleHeat(),
      box: () => this.toggleBoxes(),
      note: () => this.panel.note.focus(),
      leave: () => this.#leave(),
      closer: () => this.context.zoom(true),
      farther: () => this.context.zoom(false),
      whole: () => this.context.whole(),
      pan: (key) => { if (!this.context.root.hidden) this.context.pan(key); },
      summary: () => this.summarise(),
      help: () => this.help.showModal(),
    };
    this.panel = new Panel({ acts, state });
    this.gallery = new Gallery({ onChoose: (index) => this.go(index), onPage: (name) => this.turn(name) });
    this.context = new SlideView(transport, OpenSeadragon, {
      say, blinded: state.blinded, onPlace: (place) => this.goTo(place),
    });
    this.filters = new Filters({
      state, fovUm: this.crops.fovUm, onChange: () => this.list(), onField: (um) => this.resize(um),
    });
    this.help = helpDialog();
    this.summary = new Summary();
    this.progress = element("progress", { max: Math.max(1, state.total), aria: { label: "Decided" } });
    this.leftText = element("output", { className: "ss-left", aria: { live: "polite" } });
    const who = `${state.reviewer}${state.blinded ? ", blinded" : ""}`;
    root.replaceChildren(
      element("header", {}, element("h1", { text: "Review" }), element("span", { className: "ss-who", text: who }),
        this.filters.root, element("div", { className: "ss-progress" }, this.leftText, this.progress)),
      element("main", {}, element("div", { className: "ss-main" }, this.gallery.root, this.context.root), this.panel.root),
      element("footer", { text: "Research use only. Not for diagnosis." }), this.help,
      this.summary.root);
    listen(keysFrom, root, acts);
    this.#progressed(state.left);
  }

  get current() {
    return this.at(this.index);
  }

  at(index) {
    return this.pages.get(Math.floor(index / PER_PAGE))?.[index % PER_PAGE];
  }

  /* List anew, and begin at the first item that is not decided; what was asked for last is shown, whatever comes last. */
  async list() {
    const { values } = this.filters;
    const asked = this.asked += 1;
    try {
      await this.acting; // the new list is to know of it
      const told = await this.transport.request("items", { ...values, page: 0, size: PER_PAGE });
      await this.acting; // begun meanwhile, on the list before
      if (asked !== this.asked) return;
      Object.assign(this, { listing: told.listing, total: told.total, values, pages: new Map([[0, told.items]]), index: 0, wanted: 0,
        shownPage: null });
      if (!told.total) {
        this.gallery.show([], 0, 0, this.crops);
        this.panel.say("Nothing is listed: change the filters above.");
        this.root.dataset.ready = `${this.listing}`;
        return;
      }
      const { index } = await this.transport.request("next", { listing: told.listing, start: 0 }).catch(() => ({}));
      if (asked !== this.asked) return;
      await this.acting;
      await this.go(index ?? 0);
      this.root.dataset.ready = `${this.listing}`;
    } catch (error) {
      if (asked === this.asked) this.panel.say(error.message, { wrong: true });
    }
  }

  /* Decide or undo, one at a time, of what is listed; what goes wrong is said and keeps no list from coming. */
  #act(act) {
    if (this.busy || this.listing === null) return;
    this.acting = act().catch((error) => this.panel.say(error.message, { wrong: true }));
  }

  /* Take the keys back from a field. */
  #leave() {
    this.gallery.select(this.current?.id, { focus: true });
    if (!this.gallery.root.contains(document.activeElement)) this.root.focus(); // the slide is shown, or nothing is listed
  }

  async #page(number) {
    if (!this.pages.has(number)) {
      const { listing } = this;
      const told = await this.transport.request("items", { listing, page: number, size: PER_PAGE });
      if (listing === this.listing) this.pages.set(number, told.items);
    }
    return this.pages.get(number) ?? [];
  }

  async go(index, { stay = false } = {}) {
    if (this.busy || !(index >= 0 && index < this.total)) return;
    this.wanted = index;
    const number = Math.floor(index / PER_PAGE);
    try {
      await this.#page(number);
    } catch (error) {
      if (this.wanted === index) this.wanted = this.index;
      this.#failed(error);
      return;
    }
    if (this.wanted !== index || !this.at(index)) return;
    this.index = index;
    const item = this.current;
    const focused = document.activeElement;
    // Of this view; on a radio button the arrows would choose another class for the next item.
    const onCard = this.root.contains(focused) && focused.closest(".ss-card, .ss-panel [type=radio]") !== null;
    const focus = focused === document.body || focused === this.root || onCard;
    // First the one to be decided on, then its page, then those to come.
    const shown = this.panel.show(item, index + 1, this.total, this.crops, { aloud: !focus });
    if (this.shownPage !== number) {
      this.gallery.show(this.pages.get(number), number * PER_PAGE, this.total, this.crops);
      this.shownPage = number;
    }
    this.gallery.select(item.id, { focus: focus || focused?.disabled }); // it was on the button to a page beyond the last
    // Of the slide's view no card can have it, and the arrows must not choose a class there either.
    if (focus && !this.gallery.root.contains(document.activeElement)) this.root.focus({ preventScroll: true });
    if (!this.context.root.hidden) this.context.show(item, { stay });
    this.#ahead(index);
    await shown;
  }

  /* Go to the item of this list at a place of a slide; the view stays where it was clicked. */
  async goTo(place) {
    const { listing } = this;
    try {
      const { index } = await this.transport.request("find", { listing, ...place });
      if (index !== null && listing === this.listing) await this.go(index, { stay: true });
    } catch (error) {
      this.#failed(error);
    }
  }

  /* Say why a place of the list could not be had; one that is kept no more, for others were asked for, is made anew. */
  async #failed(error) {
    if (!error.message.startsWith("listing:")) {
      this.panel.say(error.message, { wrong: true });
      return;
    }
    await this.list();
    this.panel.say("This list was made anew.");
  }

  async summarise() {
    try {
      this.summary.show(await this.transport.request("summary", {}), this.state);
    } catch (error) {
      this.panel.say(error.message, { wrong: true });
    }
  }

  async #ahead(index) {
    const last = Math.min(this.total - 1, index + AHEAD);
    await this.#page(Math.floor(last / PER_PAGE)).catch(() => {}); // said when it is gone to
    const coming = Array.from({ length: Math.max(0, last - index) }, (_, i) => this.at(index + 1 + i));
    this.crops.ahead(coming.filter(Boolean));
  }

  turn(name) {
    const page = Math.floor(this.index / PER_PAGE);
    const last = Math.floor((this.total - 1) / PER_PAGE);
    this.go(Math.max(0, Math.min(last, { first: 0, back: page - 1, on: page + 1, last }[name])) * PER_PAGE);
  }

  /* Only when the answer is there, the decision is on the disk, and the next picture may come. */
  async decide(decision) {
    const item = this.current;
    if (this.busy || !item) return;
    if (this.wanted !== undefined && this.wanted !== this.index) { // its page is not here yet
      this.panel.say("Wait for the page, then decide.");
      return;
    }
    if (this.panel.item?.id !== item.id || !this.panel.seen) { // a list is there before its first item is shown
      this.panel.say("Wait for the picture, then decide.");
      return;
    }
    const { index } = this;
    const { label, typed } = this.panel;
    const over = item.decided?.event_id ?? null;
    const answer = await this.#write("decide", { id: item.id, decision, label, note: typed.note, over });
    if (!answer) return;
    if (answer.saved) this.panel.saved(answer.item, typed);
    this.#known(answer);
    if (!answer.saved) {
      const now = VERDICTS[answer.item.decided?.decision]?.done.toLowerCase() ?? "undecided";
      this.panel.say(`Not saved: meanwhile it is ${now}, by you in another window. Decide again to overrule.`, { wrong: true });
      return;
    }
    this.panel.say(`${VERDICTS[decision].done}: ${counted(index + 1)} of ${counted(this.total)}.`);
    this.busy = true; // a key is for the picture that comes now, or for none
    const next = await this.#following(index);
    if (next < this.total) await this.#page(Math.floor(next / PER_PAGE)).catch(() => {}); // said when it is gone to
    this.busy = false;
    if (this.panel.differs) return; // typed on meanwhile: it stays, for what is typed next; the panel says it is not saved
    if (next < this.total) await this.go(next);
    else this.panel.say(this.left ? "End of this list." : "All are decided.");
  }

  /* The next that is not decided, else the next. */
  async #following(index) {
    const next = index + 1;
    if (this.at(next)?.decided === null) return next;
    const told = await this.transport.request("next", { listing: this.listing, start: next }).catch(() => ({}));
    return told.index ?? next;
  }

  async undo() {
    const answer = await this.#write("undo", {});
    if (!answer) return;
    if (!answer.item) {
      this.panel.say("There is nothing to undo.");
      return;
    }
    this.panel.undone(answer.item, answer.undone);
    this.#known(answer);
    for (const [number, items] of this.pages) {
      const i = items.findIndex(({ id }) => id === answer.item.id);
      if (i < 0) continue;
      await this.go(number * PER_PAGE + i);
      this.panel.say(`Undone: ${counted(number * PER_PAGE + i + 1)} of ${counted(this.total)}.`);
      return;
    }
    this.panel.say(`Undone: one on ${answer.item.slide_name} that is not on a page shown so far.`);
  }

  async #write(kind, values) {
    if (this.busy) return null;
    this.busy = true;
    this.root.setAttribute("aria-busy", "true");
    try {
      return await this.transport.request(kind, values);
    } catch (error) {
      this.panel.say(`${error.lost ? "Perhaps not saved" : "Not saved"}: ${error.message}`, { wrong: true });
      return null;
    } finally {
      this.busy = false;
      this.root.removeAttribute("aria-busy");
    }
  }

  /* Show of an item what is known of it now. */
  #known({ item, left }) {
    for (const items of this.pages.values()) {
      const i = items.findIndex(({ id }) => id === item.id);
      if (i >= 0) items[i] = item;
    }
    this.gallery.update(item);
    if (this.panel.item?.id === item.id) this.panel.update(item);
    this.#progressed(left);
  }

  #progressed(left) {
    this.left = left;
    this.leftText.textContent = `${counted(left)} left of ${counted(this.state.total)}`;
    this.progress.value = this.state.total - left;
  }

  toggleContext() {
    const opens = this.context.root.hidden;
    this.context.root.hidden = !opens;
    this.gallery.root.hidden = opens;
    this.panel.contextButton.firstChild.textContent = opens ? "Gallery" : "Slide";
    if (!opens) {
      this.gallery.select(this.current?.id, { focus: true });
      return;
    }
    this.root.focus(); // what had it is hidden now
    if (this.current) this.context.show(this.current);
  }

  toggleHeat() {
    if (this.state.blinded) this.panel.say("The heat map would tell scores; this review is blinded.");
    else this.context.set("heat", !this.context.shown.heat);
  }

  toggleBoxes() {
    const hidden = this.root.classList.toggle("ss-no-boxes");
    this.context.set("boxes", !hidden);
  }

  resize(um) {
    this.crops.fovUm = um;
    this.shownPage = null;
    this.go(this.index);
  }
}
