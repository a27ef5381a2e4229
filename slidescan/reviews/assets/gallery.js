/* A page of pictures, best first; one of them is the current one. */
import { Field, VERDICTS, button, counted, element, scored } from "./elements.js";

export class Gallery {
  constructor({ onChoose, onPage }) {
    this.onChoose = onChoose;
    this.cards = element("div", { className: "ss-cards", role: "group", aria: { label: "Pictures" } });
    this.where = element("output", { aria: { live: "off" } });
    const turn = (name, text, label) => button(text, () => onPage(name), { ariaLabel: label });
    this.turns = [turn("first", "«", "First page"), turn("back", "‹", "Page before"),
      turn("on", "›", "Next page"), turn("last", "»", "Last page")];
    const [first, back, on, last] = this.turns;
    this.pages = element("nav", { className: "ss-pages", aria: { label: "Pages" } }, first, back, this.where, on, last);
    this.root = element("section", { className: "ss-gallery", aria: { label: "Gallery" } }, this.cards, this.pages);
    this.shown = new Map();
  }

  /* Show items, the first of which is the list's number `first` from 0. */
  show(items, first, total, crops) {
    this.shown = new Map();
    crops.turnsOver();
    this.cards.replaceChildren(...items.map((item, i) => {
      const field = new Field("ss-small");
      const mark = element("span", { className: "ss-mark", aria: { hidden: "true" } });
      const caption = element("span", { className: "ss-caption" });
      const card = button("", () => this.onChoose(first + i), { className: "ss-card" });
      card.append(field.root, caption, mark);
      this.shown.set(item.id, { card, field, mark, caption, number: first + i + 1 });
      this.update(item);
      field.fill(item, crops, { inTurn: true });
      return card;
    }));
    const last = first + items.length;
    this.where.textContent = total ? `${counted(first + 1)}–${counted(last)} of ${counted(total)}` : "nothing to show";
    this.turns.forEach((turn, i) => { turn.disabled = i < 2 ? first === 0 : last >= total; });
  }

  /* Say of a card what is decided now. */
  update(item) {
    const at = this.shown.get(item.id);
    if (!at) return;
    const verdict = item.decided?.decision;
    at.card.dataset.decision = verdict ?? "none";
    at.mark.textContent = verdict ? VERDICTS[verdict].mark : "";
    const label = item.decided?.label ?? item.label;
    at.caption.replaceChildren(element("b", { text: scored(item.score) }), " ", label);
    const said = [`${at.number}`, label, item.score === null ? "" : `score ${scored(item.score)}`, item.slide_name,
      verdict ? VERDICTS[verdict].done : "not decided"];
    at.card.setAttribute("aria-label", said.filter(Boolean).join(", "));
  }

  /* Mark the current one; only it is a stop of the Tab key. */
  select(id, { focus }) {
    for (const [each, { card }] of this.shown) {
      card.tabIndex = each === id ? 0 : -1;
      if (each !== id) {
        card.removeAttribute("aria-current");
        continue;
      }
      card.setAttribute("aria-current", "true");
      card.scrollIntoView({ block: "nearest" });
      if (focus) card.focus({ preventScroll: true });
    }
  }
}
