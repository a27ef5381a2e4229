/* The review in numbers: who decided what, how far reviewers agree, what became of earlier decisions. */
import { VERDICTS, button, counted, element } from "./elements.js";

function table(caption, heads, rows) {
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col", text })));
  const body = rows.map(([first, ...cells]) => element("tr", {}, element("th", { scope: "row", text: first }),
    ...cells.map((text) => element("td", { text }))));
  return element("table", {}, element("caption", { text: caption }), element("thead", {}, head), element("tbody", {}, ...body));
}

const plural = (n, one) => `${counted(n)} ${one}${n === 1 ? "" : "s"}`;

export class Summary {
  constructor() {
    this.body = element("div");
    this.root = element("dialog", { className: "ss-help ss-summary", aria: { label: "Summary" } },
      element("h2", { text: "Summary" }), this.body);
    this.root.append(button("Close", () => this.root.close()));
  }

  show({ reviewers, agreement, reattached, orphaned, unreadable }, { blinded, total, of }) {
    const verdicts = Object.keys(VERDICTS);
    const said = [
      blinded ? "This review is blinded: what others decided is not told." : "",
      !blinded && !agreement.length ? "Agreement needs two reviewers; there is one." : "",
      reattached ? `${plural(reattached, "decision")} of an earlier scan ${reattached === 1 ? "was" : "were"} re-attached.` : "",
      orphaned ? `${plural(orphaned, "decision")} of an earlier scan found no place: nothing, or more, is found there now.` : "",
      unreadable ? `${plural(unreadable, "line")} of the decision logs cannot be read.` : "",
    ];
    const decided = table(`Decisions on ${plural(total, of)}`, ["Reviewer", "Accept", "Reject", "Unsure", "Left"],
      reviewers.map((each) => [each.name, ...[...verdicts, "left"].map((name) => counted(each[name]))]));
    const agreed = table("Agreement beyond chance", ["Reviewers", "Decided by both", "Cohen's kappa"],
      agreement.map(({ reviewers: pair, n, kappa, why }) => [pair.join(", "), counted(n), kappa === null ? why : kappa.toFixed(2)]));
    this.body.replaceChildren(decided, agreement.length ? agreed : "",
      ...said.filter(Boolean).map((text) => element("p", { text })));
    if (!this.root.open) this.root.showModal();
  }
}
