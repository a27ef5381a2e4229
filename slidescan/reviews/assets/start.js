/* The page over HTTP: the token is in its address, behind the #, and travels in a header. */
import { mount } from "./page.js";

const TOKEN = "slidescan-token"; // of this tab, so that it can be loaded again
const WRITES = ["decide", "undo"];

class HttpCarrier {
  constructor(token) {
    this.headers = { "X-Slidescan-Token": token };
  }

  async request(kind, values, signal) {
    const text = JSON.stringify(values);
    let wrong;
    try {
      const answer = await (WRITES.includes(kind)
        ? fetch(`api/${kind}`, { method: "POST", body: text, headers: { ...this.headers, "Content-Type": "application/json" } })
        : fetch(`api/${kind}?q=${encodeURIComponent(text)}`, { headers: this.headers, signal }));
      const isJson = answer.headers.get("Content-Type")?.startsWith("application/json");
      if (answer.ok) return isJson ? await answer.json() : await answer.blob();
      wrong = isJson ? (await answer.json()).error : `failed (${answer.status})`;
    } catch {
      const error = new Error("slidescan review does not answer. If it runs, load this page again: it shows what was saved.");
      throw Object.assign(error, { lost: true }); // what was asked for may have been done
    }
    throw new Error(wrong);
  }
}

if (location.hash.length > 1) {
  sessionStorage.setItem(TOKEN, location.hash.slice(1));
  history.replaceState(null, "", location.pathname);
}
addEventListener("hashchange", () => location.reload());

addEventListener("beforeunload", (event) => { if (root.review?.panel.unsaved) event.preventDefault(); });

const root = document.getElementById("review");
mount(root, new HttpCarrier(sessionStorage.getItem(TOKEN) ?? ""), { keysFrom: document }).then(
  (review) => { root.review = review; },
  (error) => { root.textContent = error.message; },
);
