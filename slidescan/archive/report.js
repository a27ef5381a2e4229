"use strict";

/* The table of slides. All rows lie in one array; a page of them is in the document. What comes from records becomes
   text, never markup. */
(() => {
  const ROWS_PER_PAGE = 100;
  const GAPS = 1; // the kind of a row that is done, but not wholly
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const at = Object.fromEntries(data.columns.map((name, i) => [name, i]));
  const value = (row, name) => data.rows[row][at[name]];

  const decimals = (n) => new Intl.NumberFormat("en", { minimumFractionDigits: n, maximumFractionDigits: n });
  const FORMATS = [0, 1, 2].map(decimals);
  const number = (digits) => (x) => FORMATS[digits].format(x);
  // What is not whole is never shown as 100%.
  const share = (x) => `${FORMATS[2].format(100 * (x < 1 ? Math.min(x, 0.9999) : x))}%`;

  /* In their order on the page. amiss: what a number says that is not 0; tells: what it means. */
  const COLUMNS = [
    { name: "slide_id", title: "Id", over: "Slide", text: true, tells: "Names its folder below slides." },
    { name: "picture", title: "Heat map", over: "",
      tells: "Pale slide, density of figures and coverage, where there is a picture.", fixed: true },
    { name: "group", title: "Group", text: true, tells: "As the list of slides says." },
    { name: "state", title: "State", over: "Outcome", text: true,
      tells: "Failed; done; or done with gaps: not all of its tissue was looked at, or a caveat." },
    { name: "reason", title: "Reason", text: true, tells: "Why it failed, or what to mind, and the message." },
    { name: "tissue_mm2", title: "Tissue mm²", over: "Tissue", show: number(2), tells: "Area of tissue." },
    { name: "analysed_fraction", title: "Analysed", show: share, amiss: (x) => x < 1,
      tells: "Share of the tissue that the detector looked at." },
    { name: "found", title: "Found", over: "Findings", show: number(0),
      tells: "Detections at or above the threshold." },
    { name: "per_mm2", title: "Per mm²", show: number(2), tells: "Found per mm² of analysed tissue." },
    { name: "hotspot_count", title: "Hotspot", show: number(0), tells: "Figures in the square that holds most." },
    { name: "flagged_regions", title: "Flagged", show: number(0), tells: "Regions worth a look." },
    { name: "best_evidence", title: "Evidence", show: number(1),
      tells: "Of the region that has most, in nats: how unlikely it is that none of its detections is real." },
    { name: "read_failed_boxes", title: "Unread", over: "Trouble", show: number(0), amiss: (x) => x > 0,
      tells: "Parts whose pixels could not be read." },
    { name: "saturated_tiles", title: "Saturated", show: number(0), amiss: (x) => x > 0,
      tells: "Tiles with more than the detector can report: their counts are too low." },
    { name: "crashed_regions", title: "Crashed", show: number(0), amiss: (x) => x > 0,
      tells: "Regions whose reading ended the process; they count as not analysed." },
    { name: "seconds", title: "Seconds", over: "Cost", show: number(1), tells: "From opening to the saved result." },
    { name: "stages_s", title: "By stage",
      tells: "Seconds of all threads that did its regions, by stage; sorted by their sum." },
    { name: "peak_rss_mb", title: "RAM MB", show: number(0),
      tells: "Most memory its process had, up to the slide's end." },
    { name: "peak_gpu_mb", title: "GPU MB", show: number(0), tells: "Most memory of the GPU." },
  ];
  const STATES = { failed: "failed", done: "done", gaps: "done with gaps" };

  const sum = (list) => list.reduce((total, x) => total + (x ?? 0), 0);
  const everything = data.rows.map((_, row) => row);
  const plain = (text) => text.normalize("NFC").toLowerCase();
  const haystacks = everything.map((row) =>
    plain(["slide_id", "group", "reason", "message"].map((name) => value(row, name) ?? "").join("\n")));

  let sorting = null; // {column, descending}; null: worst first, as the rows lie
  let order = everything;
  let shown = everything;
  let page = 0;

  function element(tag, { text, ...properties } = {}, ...children) {
    const made = document.createElement(tag);
    Object.assign(made, properties);
    if (text !== undefined) made.textContent = text;
    made.append(...children);
    return made;
  }

  function stateOf(row) {
    const state = value(row, "state");
    return state === "done" && value(row, "rank") === GAPS ? "gaps" : state;
  }

  function keyOf(row, name) {
    if (name === "state") return STATES[stateOf(row)] ?? stateOf(row);
    if (name === "stages_s") return value(row, name) && sum(value(row, name));
    if (name === "reason") return [value(row, "reason"), value(row, "message")].filter(Boolean).join(" ");
    return value(row, name);
  }

  function sort() {
    if (!sorting) {
      order = everything;
      return;
    }
    const { column, descending } = sorting;
    const keys = everything.map((row) => keyOf(row, column.name));
    const collator = new Intl.Collator("en", { numeric: true });
    const compare = column.text ? (a, b) => collator.compare(keys[a], keys[b]) : (a, b) => keys[a] - keys[b];
    const known = (row) => keys[row] !== null && keys[row] !== "";
    const sign = descending ? -1 : 1;
    // What is not on record comes last, whichever way.
    const sorted = everything.filter(known).sort((a, b) => sign * compare(a, b));
    order = [...sorted, ...everything.filter((row) => !known(row))];
  }

  function filter() {
    const words = plain(byId("find").value).split(/\s+/).filter(Boolean);
    const state = byId("state").value;
    const reason = byId("reason").value;
    shown = order.filter((row) =>
      (!state || stateOf(row) === state || (state === "any done" && value(row, "state") === "done")) &&
      (!reason || value(row, "reason") === reason) &&
      words.every((word) => haystacks[row].includes(word)));
  }

  function overview(slideId) {
    try {
      return `slides/${encodeURIComponent(slideId)}/overview.png`;
    } catch { // an id that no URL can hold
      return null;
    }
  }

  function linked(row, ...content) {
    const href = value(row, "state") === "done" ? overview(value(row, "slide_id")) : null;
    return href ? [element("a", { href, target: "_blank", rel: "noopener" }, ...content)] : content;
  }

  function stack(seconds) {
    const total = sum(seconds);
    const spent = data.stages.map((name, i) => ({ name, s: seconds[i] ?? 0 })).filter(({ s }) => s > 0);
    const title = spent.map(({ name, s }) => `${name} ${FORMATS[1].format(s)} s`).join(", ");
    const bar = element("div", { className: "stack", title });
    bar.setAttribute("role", "img");
    bar.setAttribute("aria-label", title);
    for (const { name, s } of spent) {
      const piece = element("i");
      piece.dataset.stage = name;
      piece.style.width = `${(100 * s) / total}%`;
      bar.append(piece);
    }
    return total > 0 ? [bar] : [];
  }

  function cell(row, column) {
    const { name, show, amiss } = column;
    const content = value(row, name);
    const made = element(name === "slide_id" ? "th" : "td", { className: column.over ? "first" : "" });
    if (name === "slide_id") {
      made.scope = "row";
      // An id may be written right to left; it must not turn what stands around it.
      made.append(...linked(row, element("bdi", { text: content })));
    } else if (name === "picture") {
      const src = typeof content === "string" && content.startsWith("data:image/jpeg;base64,") ? content : null;
      const alt = `Heat map of ${value(row, "slide_id")}`;
      if (src) made.append(...linked(row, element("img", { src, alt, loading: "lazy", decoding: "async" })));
    } else if (name === "state") {
      made.classList.add("state");
      made.append(element("span", { className: "mark", text: keyOf(row, name) }));
    } else if (name === "reason") {
      made.classList.add("why");
      if (content) made.append(element("b", { text: content, title: data.reasons[content] ?? "" }));
      made.append(element("bdi", { text: value(row, "message") }));
    } else if (name === "stages_s") {
      made.append(...(content ? stack(content) : []));
    } else if (column.text) {
      made.append(element("bdi", { text: content ?? "" }));
    } else {
      made.classList.add("n");
      if (content !== null) {
        made.textContent = show(content);
        if (content === 0) made.classList.add("zero");
        if (amiss?.(content)) made.classList.add("amiss");
      }
    }
    return made;
  }

  // Not `disabled`: that would take the focus away from who just pressed the button.
  const idle = (button, is) => button.setAttribute("aria-disabled", is);

  // A slide that failed has no numbers: its message gets their room.
  function cells(row) {
    const last = COLUMNS.findIndex(({ name }) => name === "reason");
    const bare = COLUMNS.slice(last + 1).every(({ name }) => value(row, name) === null);
    const made = COLUMNS.slice(0, bare ? last + 1 : undefined).map((column) => cell(row, column));
    if (bare) made[last].colSpan = COLUMNS.length - last;
    return made;
  }

  function render() {
    const pages = Math.max(1, Math.ceil(shown.length / ROWS_PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const first = page * ROWS_PER_PAGE;
    const part = shown.slice(first, first + ROWS_PER_PAGE);
    const body = byId("table").tBodies[0];
    body.replaceChildren(...part.map((row) =>
      element("tr", { className: `rank${value(row, "rank")}` }, ...cells(row))));
    if (!part.length) {
      const text = data.rows.length ? "No slide is like that." : "No slide has a record yet.";
      body.append(element("tr", {}, element("td", { text, colSpan: COLUMNS.length })));
    }
    const count = number(0);
    const all = shown.length < data.rows.length ? ` (${count(data.rows.length)} in all)` : "";
    const of = `${count(shown.length)}${all}`;
    byId("where").textContent = part.length ? `${count(first + 1)}–${count(first + part.length)} of ${of}` : of;
    for (const button of byId("pages").querySelectorAll("button")) {
      const backwards = ["first", "back"].includes(button.dataset.page);
      idle(button, backwards ? page === 0 : page === pages - 1);
    }
    for (const th of byId("table").tHead.rows[1].cells) {
      if (!th.dataset.column) continue;
      const mine = sorting?.column.name === th.dataset.column;
      th.setAttribute("aria-sort", mine ? (sorting.descending ? "descending" : "ascending") : "none");
    }
    idle(byId("worst"), !sorting);
    byId("scroll").scrollTop = 0;
  }

  function update({ sorted = false } = {}) {
    if (sorted) sort();
    filter();
    page = 0;
    render();
  }

  // Numbers fall at first and text rises; a second press turns it, a third goes back to worst first.
  function press(column) {
    const falls = !column.text;
    if (sorting?.column !== column) sorting = { column, descending: falls };
    else sorting = sorting.descending === falls ? { column, descending: !falls } : null;
    update({ sorted: true });
  }

  function buildHead() {
    const over = element("tr");
    const titles = element("tr");
    for (const column of COLUMNS) {
      if (column.over !== undefined) {
        // An empty heading is no heading: a plain cell.
        const { over: text } = column;
        over.append(text ? element("th", { text, scope: "colgroup", className: "first" }) : element("td"));
      } else {
        over.lastChild.colSpan += 1;
      }
      const th = element("th", { scope: "col", className: `${column.show ? "n" : ""} ${column.over ? "first" : ""}` });
      if (column.fixed) {
        th.append(element("span", { className: "fixed", text: column.title, title: column.tells }));
      } else {
        th.dataset.column = column.name;
        const button = element("button", { type: "button", text: column.title, title: column.tells });
        button.addEventListener("click", () => press(column));
        th.append(button);
      }
      titles.append(th);
      byId("meanings").append(
        element("dt", { text: column.title }), element("dd", { text: column.tells }));
    }
    byId("table").tHead.append(over, titles);
  }

  function buildControls() {
    const count = (keys) => keys.reduce((counts, key) => counts.set(key, (counts.get(key) ?? 0) + 1), new Map());
    const option = (key, text, n) => element("option", { value: key, text: `${text} (${number(0)(n)})` });
    const states = count(everything.map(stateOf));
    const done = everything.filter((row) => value(row, "state") === "done").length;
    byId("state").append(option("", "all", data.rows.length));
    if (states.has("gaps") && states.has("done")) {
      byId("state").append(option("any done", "done, with or without gaps", done));
    }
    for (const [key, n] of states) {
      byId("state").append(option(key, key === "done" ? "done without gaps" : STATES[key] ?? key, n));
    }
    const reasons = count(everything.map((row) => value(row, "reason")).filter(Boolean));
    byId("reason").append(option("", "any", data.rows.length));
    for (const [key, n] of reasons) byId("reason").append(option(key, key, n));
  }

  function buildLegend() {
    const totals = data.stages.map((_, i) => sum(data.rows.map((row) => row[at.stages_s]?.[i])));
    const all = sum(totals);
    if (!all) return;
    byId("stages").append(element("span", { text: "Time of all threads:" }));
    data.stages.forEach((name, i) => {
      const swatch = element("i");
      swatch.dataset.stage = name;
      byId("stages").append(element("span", {}, swatch, `${name} ${FORMATS[1].format((100 * totals[i]) / all)}%`));
    });
  }

  buildHead();
  buildControls();
  buildLegend();
  byId("find").addEventListener("input", () => update());
  byId("state").addEventListener("change", () => update());
  byId("reason").addEventListener("change", () => update());
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("worst").addEventListener("click", () => {
    sorting = null;
    update({ sorted: true });
  });
  byId("pages").addEventListener("click", ({ target }) => {
    const to = { first: 0, back: page - 1, on: page + 1, last: Infinity }[target.dataset?.page];
    if (to === undefined) return;
    page = to;
    render();
  });
  update();
  byId("interactive").hidden = false;
})();
