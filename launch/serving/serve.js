"use strict";
// Sorts and filters tables, tells the points of pictures, and brings live parts up to date. Texts of
// runs are handled as texts: nothing here makes markup of them.

const rows = () => [...document.querySelectorAll("tbody tr:not(.group):not(.mean)")];
const marks = () => [...document.querySelectorAll("circle[data-row]")];
const tools = document.getElementById("tools");
const filter = document.createElement("input");
const status = document.createElement("output");

function valueOf(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.sort ?? (cell.querySelector("a") ?? cell).firstChild?.textContent ?? "";
  return text.trim() && !Number.isNaN(Number(text)) ? Number(text) : text.trim();
}

function compare(a, b) {
  const [x, y] = [typeof a === "number", typeof b === "number"];
  if (x !== y) return x ? -1 : 1; // what is not known comes last
  return x ? a - b : a.localeCompare(b, undefined, { numeric: true });
}

function sort(table) {
  const head = table.querySelector("th[aria-sort]");
  if (!head) return;
  const sign = head.getAttribute("aria-sort") === "descending" ? -1 : 1;
  for (const body of table.tBodies) {
    const own = [...body.rows].filter((row) => !row.matches(".group, .mean"));
    const known = (row) => [row, valueOf(row, head.cellIndex)];
    const keyed = own.map(known).sort(([, a], [, b]) =>
      typeof a === typeof b ? sign * compare(a, b) : compare(a, b));
    const last = body.querySelector(".mean");
    for (const [row] of keyed) body.insertBefore(row, last);
  }
}

function show() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const all = rows();
  const hidden = new Set();
  for (const row of all) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    if (row.hidden && row.dataset.row) hidden.add(row.dataset.row);
  }
  for (const mark of marks()) mark.toggleAttribute("hidden", hidden.has(mark.dataset.row));
  status.value = words.length ? `${all.filter((row) => !row.hidden).length} of ${all.length} rows` : "";
}

function addButtons(table) {
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.className = "sort";
    button.textContent = "↕";
    button.setAttribute("aria-label", `Sort by ${head.textContent}`);
    button.addEventListener("click", () => {
      const next = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of table.querySelectorAll("th[aria-sort]")) {
        other.removeAttribute("aria-sort");
        other.querySelector(".sort").textContent = "↕";
      }
      head.setAttribute("aria-sort", next);
      button.textContent = next === "ascending" ? "↑" : "↓";
      sort(table);
    });
    head.append(" ", button);
  }
}

function tell(event) {
  const row = event.target.dataset?.row;
  if (event.target.tagName !== "circle") return;
  const on = event.type === "pointerover" || event.type === "focusin";
  for (const other of document.querySelectorAll("[data-row]")) {
    other.classList.toggle("at", on && other.dataset.row === row);
  }
  status.value = on ? event.target.getAttribute("aria-label") : "";
}

async function poll() {
  const live = [...document.querySelectorAll("[data-live]")];
  if (!live.length) return;
  const start = performance.now();
  if (!document.hidden) {
    try {
      const text = await (await fetch(location.href)).text();
      const fresh = new DOMParser().parseFromString(text, "text/html");
      const focus = document.activeElement?.getAttribute("href");
      for (const part of live) {
        const other = fresh.getElementById(part.id);
        if (other) part.replaceChildren(...document.adoptNode(other).childNodes);
      }
      document.querySelectorAll("table").forEach(sort);
      show();
      if (focus) [...document.links].find((a) => a.getAttribute("href") === focus)?.focus();
    } catch {
      status.value = "The server does not answer: what is shown is old.";
    }
  }
  setTimeout(poll, Math.max(2000, 10 * (performance.now() - start)));
}

(tools ?? document.querySelector("main")).prepend(status);
if (tools) {
  const label = document.createElement("label");
  filter.type = "search";
  filter.name = "filter";
  filter.addEventListener("input", show);
  label.append("Show rows with ", filter);
  tools.prepend(label);
  document.querySelectorAll("table").forEach(addButtons);
  for (const kind of ["pointerover", "pointerout", "focusin", "focusout"]) {
    document.addEventListener(kind, tell);
  }
}
setTimeout(poll, 2000);
