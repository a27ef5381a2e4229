/* The item in question, large, with what is known of it and what can be said of it. */
import { Field, VERDICTS, button, counted, element, scored } from "./elements.js";

const DOUBLE_MS = 400; // within which systems take two clicks for one double click, most of them

const known = ({ decided, label }) => ({
  note: (decided?.note ?? "").replace(/\r\n?/g, "\n"), // as a text area has it
  label: decided?.label ?? label,
});

const same = (a, b) => a.note === b.note && a.label === b.label;

export class Panel {
  constructor({ acts, state }) {
    this.labels = state.classes;
    this.drafts = new Map(); // by item id what was typed or chosen there and not decided with
    this.blinded = state.blinded;
    this.field = new Field("ss-large");
    this.title = element("h2", { text: "" });
    this.facts = element("dl", { className: "ss-facts" });
    this.others = element("dl", { className: "ss-facts", hidden: true });
    this.group = `ss-label-${Math.random()}`; // of this view: in a notebook there may be two
    this.note = element("textarea", { rows: 2, maxLength: 10000, placeholder: "Note (n); no patients' names" });
    this.choices = this.labels.map((label, i) => element("label", {},
      element("input", { type: "radio", name: this.group, value: label }), ` ${label} `,
      i < 9 ? element("kbd", { text: i + 1, aria: { hidden: "true" } }) : null));
    this.radios = this.choices.map((choice) => choice.firstChild);
    this.verdicts = Object.keys(VERDICTS).map((verdict) => button(
      verdict[0].toUpperCase() + verdict.slice(1), acts[verdict], { key: verdict[0], className: "ss-verdict", data: { verdict } },
    ));
    const moves = [button("Previous", acts.previous, { key: "←" }), button("Next", acts.next, { key: "→" }),
      button("Undo", acts.undo, { key: "z" }), button("Slide", acts.context, { key: "f" }),
      button("Summary", acts.summary, { key: "i" }), button("Help", acts.help, { key: "?" })];
    this.contextButton = moves[3];
    this.unsavedHint = element("p", { className: "ss-unsaved", hidden: true, aria: { live: "polite" },
      text: "Not saved yet: Accept, Reject or Unsure saves it." });
    for (const field of [this.note, ...this.radios]) field.addEventListener("input", () => this.#changed());
    this.status = element("p", { className: "ss-status", role: "status" });
    this.alert = element("p", { className: "ss-alert", role: "alert" });
    this.root = element("section", { className: "ss-panel", aria: { label: "In question" } },
      this.field.root,
      element("div", { className: "ss-verdicts", role: "group", aria: { label: "Decide" } }, ...this.verdicts),
      this.status, this.alert,
      this.title, this.facts, this.others,
      element("fieldset", { hidden: this.labels.length < 2 }, element("legend", { text: "Class" }), ...this.choices),
      element("label", { className: "ss-note" }, element("span", { className: "ss-hidden", text: "Note" }), this.note),
      this.unsavedHint,
      element("div", { className: "ss-moves", role: "group", aria: { label: "Go" } }, ...moves));
  }

  show(item, number, total, crops, { aloud = false } = {}) {
    if (this.item?.id !== item.id) { // else it is shown again, larger or from elsewhere: what was typed stays
      this.#keep();
      this.item = item;
      this.#fill(this.drafts.get(item.id) ?? known(item));
    }
    this.title.setAttribute("aria-live", aloud ? "polite" : "off"); // where focus moves to its card, that is read
    this.title.textContent = `${counted(number)} of ${counted(total)}`;
    const [x0, y0, x1, y1] = item.box_l0;
    const um = (px) => (px * item.mpp).toFixed(0);
    const larger = Math.max(x1 - x0, y1 - y0) * item.mpp > crops.fovUm;
    const facts = [["Class", item.label], ["Score", scored(item.score)],
      ["Evidence", item.evidence === null ? "" : item.evidence.toFixed(1)],
      ["Detections", item.n > 1 ? `${item.n}` : ""], ["Size", `${um(x1 - x0)} × ${um(y1 - y0)} µm${larger ? ", more than the field" : ""}`],
      ["Rank on slide", item.rank === null ? "" : `${item.rank}`], ["Slide", item.slide_name], ["Group", item.group]];
    this.facts.replaceChildren(...facts.filter(([, value]) => value).map(([name, value]) =>
      element("div", {}, element("dt", { text: name }), element("dd", { text: value }))));
    this.update(item);
    return this.field.fill(item, crops);
  }

  #fill({ note, label }) {
    this.note.value = note;
    this.#choose(label);
  }

  /* Keep what was typed or chosen and not decided with. */
  #keep() {
    if (!this.item) return;
    if (this.differs) this.drafts.set(this.item.id, this.typed);
    else this.drafts.delete(this.item.id);
  }

  /* Whether something was typed or chosen for the item shown that no decision has saved. */
  get differs() {
    return this.item !== undefined && !same(this.typed, known(this.item));
  }

  get typed() {
    return { note: this.note.value, label: this.#chosen };
  }

  #changed() {
    this.unsavedHint.hidden = !this.differs;
  }

  /* The same of all items. */
  get unsaved() {
    return this.drafts.size > 0 || this.differs;
  }

  /* A decision on it was saved, with what was typed and chosen then; what was changed since stays. */
  saved(item, sent) {
    this.drafts.delete(item.id);
    if (this.item?.id !== item.id) return;
    const changed = !same(this.typed, sent);
    this.item = item;
    if (!changed) this.#fill(known(item));
  }

  /* Its decision was taken back: what was typed or chosen for it is there again, to be decided with anew. */
  undone(item, decided) {
    const before = known({ ...item, decided });
    if (this.item?.id === item.id) {
      const typed = this.differs;
      this.item = item;
      if (!typed) this.#fill(before);
    } else if (!this.drafts.has(item.id) && !same(before, known(item))) this.drafts.set(item.id, before);
  }

  /* Show what is known of the item now; what was typed or chosen for it stays. */
  update(item) {
    const typed = this.differs;
    this.item = item;
    if (!typed) this.#fill(known(item));
    const verdict = item.decided?.decision;
    this.root.dataset.decision = verdict ?? "none";
    for (const each of this.verdicts) each.setAttribute("aria-pressed", String(each.dataset.verdict === verdict));
    this.#changed();
    this.others.hidden = !item.others.length;
    const said = item.others.map(({ reviewer, decision, note }) =>
      element("dd", { text: `${reviewer} ${decision}${note ? `: ${note}` : ""}` }));
    this.others.replaceChildren(...(said.length ? [element("div", {}, element("dt", { text: "Others" }), ...said)] : []));
  }

  /* Whether its picture is there, or cannot be had: before that there is nothing to decide on. */
  get seen() {
    return this.field.root.dataset.item === this.item?.id && ["shown", "failed"].includes(this.field.state);
  }

  /* Whether an act is the second click of two in haste: it was meant for the picture before. */
  doubled(by) {
    return by?.detail > 1 && performance.now() - this.field.shownAt < DOUBLE_MS;
  }

  choose(number) {
    if (number <= this.labels.length) this.#choose(this.labels[number - 1]);
  }

  #choose(label) {
    for (const radio of this.radios) radio.checked = radio.value === label;
    this.#changed();
  }

  get #chosen() {
    return this.radios.find((radio) => radio.checked)?.value ?? known(this.item).label;
  }

  /* The class chosen, null for the detector's. */
  get label() {
    return this.#chosen === this.item.label ? null : this.#chosen;
  }

  say(text, { wrong = false } = {}) {
    this.status.textContent = wrong ? "" : text;
    this.alert.textContent = wrong ? text : "";
  }
}
