/* What is listed, and in which order. */
import { element } from "./elements.js";

const SORTS = { evidence: "most evidence", score: "highest score", uncertainty: "least certain", slide: "slide",
  shuffled: "shuffled" };
const DECISIONS = { "": "all", undecided: "not decided", decided: "decided", accept: "accepted", reject: "rejected",
  unsure: "unsure", disputed: "disputed" };
const FIELDS_UM = [32, 64, 128, 256, 512, 1024];

export class Filters {
  constructor({ state, fovUm, onChange, onField }) {
    let byPointer = false;
    const select = (name, text, options, value = "", change = onChange) => {
      const onchange = () => {
        if (byPointer) made.blur(); // or the next key would choose from it
        change();
      };
      const made = element("select", { onchange, name, onpointerdown: () => { byPointer = true; },
        onkeydown: () => { byPointer = false; } },
        ...options.map(([key, shown]) => element("option", { value: key, text: shown })));
      made.value = value;
      return [made, element("label", {}, `${text} `, made)];
    };
    const decisions = Object.entries(DECISIONS).filter(([name]) => name !== "disputed" || !state.blinded);
    let parts;
    [this.sort, parts] = select("sort", "Sort by", state.sorts.map((sort) => [sort, SORTS[sort]]), state.sorts[0]);
    const labels = [parts];
    [this.decision, parts] = select("decision", "Show", decisions);
    labels.push(parts);
    [this.slide, parts] = select("slide", "Slide", [["", "all"], ...state.slides.map(({ n, name }) => [n, name])]);
    if (state.slides.length > 1) labels.push(parts);
    [this.label, parts] = select("label", "Class", [["", "all"], ...state.labels.map((label) => [label, label])]);
    if (state.labels.length > 1) labels.push(parts);
    this.minScore = element("input", { type: "number", min: 0, max: 1, step: 0.05, onchange: onChange, name: "min_score" });
    if (!state.blinded) labels.push(element("label", {}, "Score from ", this.minScore));
    [this.field, parts] = select("field", "Field", FIELDS_UM.map((um) => [um, `${um} µm`]), String(fovUm),
      () => onField(Number(this.field.value)));
    labels.push(parts);
    this.root = element("form", { className: "ss-filters", onsubmit: (event) => event.preventDefault(),
      aria: { label: "Filters" } }, ...labels);
  }

  get values() {
    const or = (text, made) => (text === "" ? null : made(text));
    return {
      sort: this.sort.value,
      decision: or(this.decision.value, String),
      slide: or(this.slide.value, Number),
      label: or(this.label.value, String),
      min_score: or(this.minScore.value, (text) => Math.min(1, Math.max(0, Number(text)))),
    };
  }
}
