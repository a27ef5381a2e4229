/* The keys, in one table: what it says is what the help shows and what happens. */
import { button, element } from "./elements.js";

export const KEYS = [
  { keys: ["a"], act: "accept", tells: "accept" },
  { keys: ["r"], act: "reject", tells: "reject" },
  { keys: ["u"], act: "unsure", tells: "unsure" },
  { keys: ["1", "2", "3", "4", "5", "6", "7", "8", "9"], shown: "1–9", act: "label",
    tells: "choose the class, before accept, reject or unsure" },
  { keys: ["ArrowLeft"], shown: "←", act: "previous", tells: "previous", repeats: true },
  { keys: ["ArrowRight"], shown: "→", act: "next", tells: "next", repeats: true },
  { keys: ["z"], act: "undo", tells: "undo the last decision" },
  { keys: ["f"], act: "context", tells: "the whole slide, and back" },
  { keys: ["h"], act: "heat", tells: "heat map of the slide on or off" },
  { keys: ["b"], act: "box", tells: "boxes on or off" },
  { keys: ["n"], act: "note", tells: "write a note; Escape leaves any field" },
  { keys: ["+", "="], shown: "+", act: "closer", tells: "slide: closer", repeats: true },
  { keys: ["-"], shown: "−", act: "farther", tells: "slide: farther", repeats: true },
  { keys: ["0"], act: "whole", tells: "slide: all of it" },
  { keys: ["ShiftArrowLeft", "ShiftArrowRight", "ShiftArrowUp", "ShiftArrowDown"], shown: "Shift + arrow", act: "pan",
    tells: "slide: move", repeats: true },
  { keys: ["i"], act: "summary", tells: "summary: who decided what, and how far reviewers agree" },
  { keys: ["?"], act: "help", tells: "this help" },
];

const BY_KEY = new Map(KEYS.flatMap((entry) => entry.keys.map((key) => [key, entry])));
const TYPES = new Set(["text", "number", "search"]);

/* Where letters are typed, they are letters. */
function isTyping(target) {
  return target instanceof HTMLTextAreaElement || target instanceof HTMLSelectElement
    || (target instanceof HTMLInputElement && TYPES.has(target.type));
}

/* Calls acts[act](key) for the keys pressed in `target`, which is `root` or what it is in. */
export function listen(target, root, acts) {
  target.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (event.key === "Escape" && isTyping(event.target)) {
      acts.leave();
      return;
    }
    // A button held down by Enter is pressed again and again, on what comes next.
    if (event.repeat && event.key === "Enter" && event.target.closest("button")) event.preventDefault();
    if (isTyping(event.target) || root.querySelector("dialog[open]")) return;
    const arrow = event.key.startsWith("Arrow");
    if (arrow && event.target instanceof HTMLInputElement && ["range", "radio"].includes(event.target.type)) return;
    let key = event.key.length === 1 ? event.key.toLowerCase() : event.key; // with Caps Lock, too
    // Of a layout without Latin letters the key that has the letter on others.
    if (/^[^\x00-\x7f]$/u.test(key) && /^Key[A-Z]$/.test(event.code)) key = event.code.slice(3).toLowerCase();
    const entry = BY_KEY.get(event.shiftKey && arrow ? `Shift${key}` : key);
    if (!entry) return;
    event.preventDefault();
    // A key held down decides once, not on what comes next.
    if (!event.repeat || entry.repeats) acts[entry.act](event.key);
  });
}

export function helpDialog() {
  const rows = KEYS.map(({ keys, shown, tells }) =>
    element("tr", {}, element("th", { scope: "row" }, element("kbd", { text: shown ?? keys[0] })),
      element("td", { text: tells })));
  const dialog = element("dialog", { className: "ss-help", aria: { label: "Keys" } },
    element("h2", { text: "Keys" }), element("table", {}, element("tbody", {}, ...rows)));
  dialog.append(button("Close", () => dialog.close()));
  return dialog;
}
