"use strict";
// Sorts and filters tables, tells the points of pictures, and brings live parts up to date. Texts of
// runs are handled as texts: nothing here makes markup of them.

const rows = () => [...document.querySelectorAll("tbody tr:not(.group):not(.mean)")];
const marks = () => [...document.querySelectorAll("circle[data-row], .plots [data-row]")];
const tools = document.getElementById("tools");
const filter = document.createElement("input");
const status = document.createElement("output");
const live = [...document.querySelectorAll("[data-live]")];
const said = new Map(live.map((part) => [part.id, part.cloneNode(true)])); // by the server, the last time
let tag = "";
let ahead = 0; // of this machine's clock, the server's, in milliseconds

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

// Moves rows, or those of a set alone: the others are in order already, and a row that is moved
// loses focus and selection.
function order(body, wanted, moved = new Set(wanted)) {
  let next = body.querySelector(".mean");
  for (const row of wanted.toReversed()) {
    if (moved.has(row) && row.nextElementSibling !== next) body.insertBefore(row, next);
    next = row;
  }
}

function sort(table, moved) {
  const head = table.querySelector("th[aria-sort]");
  const sign = head.getAttribute("aria-sort") === "descending" ? -1 : 1;
  for (const body of table.tBodies) {
    const own = [...body.rows].filter((row) => !row.matches(".group, .mean"));
    const known = (row) => [row, valueOf(row, head.cellIndex)];
    const keyed = own.map(known).sort(([, a], [, b]) =>
      typeof a === typeof b ? sign * compare(a, b) : compare(a, b));
    order(body, keyed.map(([row]) => row), moved);
  }
}

function turn(head, way) {
  for (const other of head.parentElement.querySelectorAll("th[aria-sort]")) {
    other.removeAttribute("aria-sort");
    other.querySelector(".sort").textContent = "↕";
  }
  head.setAttribute("aria-sort", way);
  head.querySelector(".sort").textContent = way === "ascending" ? "↑" : "↓";
  sort(head.closest("table"));
}

function show() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const all = rows();
  const hidden = new Set();
  for (const row of all) {
    row.hidden = words.length > 0 && !words.every((word) => row.textContent.toLowerCase().includes(word));
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
      turn(head, head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending");
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

function age(root) {
  for (const time of root.querySelectorAll("time[data-at]")) {
    const seconds = Math.max(0, Math.round((Date.now() + ahead) / 1000 - time.dataset.at));
    const [size, unit] = [[86400, "d"], [3600, "h"], [60, "min"]].find(([n]) => seconds >= 2 * n) ?? [1, "s"];
    const text = `${Math.floor(seconds / size)} ${unit} ago`;
    time.title ||= time.textContent;
    if (time.textContent !== text) time.textContent = text;
  }
}

// Brings what is shown from what the server said before to what it says now. What is equal in both
// is not touched, so it keeps focus, selection, scroll and the pointer.
function update(shown, before, now) {
  if (before.isEqualNode(now)) return;
  const table = shown.tagName === "TABLE";
  const [parts, old, fresh] = [shown, before, now].map((part) => [...part.children]);
  const text = [...now.childNodes].some((part) => part.nodeType === Node.TEXT_NODE && part.data.trim());
  if (table && before.tHead.isEqualNode(now.tHead)) {
    updateRows(shown, before, now);
  } else if (table || text || !fresh.length || old.length !== fresh.length
      || shown.tagName !== now.tagName) {
    replace(shown, now);
  } else {
    for (const { name, value } of now.attributes) {
      if (before.getAttribute(name) !== value) shown.setAttribute(name, value);
    }
    parts.forEach((part, k) => update(part, old[k], fresh[k]));
  }
}

function replace(shown, now) {
  const fresh = document.importNode(now, true);
  const [was, table] = [shown, fresh].map((part) => (part.tagName === "TABLE" ? part : part.querySelector("table")));
  shown.replaceWith(fresh);
  if (!tools || !table) return;
  addButtons(table);
  const head = was?.querySelector("th[aria-sort]");
  const name = head?.firstChild.data;
  const same = [...table.tHead.rows[0].cells].find((cell) => cell.firstChild.data === name);
  if (head && same) turn(same, head.getAttribute("aria-sort"));
}

function updateRows(shown, before, now) {
  const body = shown.tBodies[0];
  const keyed = (table) => new Map([...table.tBodies[0].rows].map((row) => [row.dataset.key, row]));
  const [have, old, fresh] = [shown, before, now].map(keyed);
  const changed = new Set();
  for (const [key, row] of fresh) {
    const [mine, was] = [have.get(key), old.get(key)];
    if (was?.isEqualNode(row)) continue;
    changed.add(mine ?? body.appendChild(document.importNode(row, true)));
    [...(mine?.cells ?? [])].forEach((cell, k) => {
      if (!was.cells[k].isEqualNode(row.cells[k])) cell.replaceWith(document.importNode(row.cells[k], true));
    });
  }
  for (const [key, row] of have) if (!fresh.has(key)) row.remove();
  const all = keyed(shown);
  if (shown.querySelector("th[aria-sort]")) sort(shown, changed);
  else order(body, [...fresh.keys()].map((key) => all.get(key)), changed);
}

async function ask() {
  const answer = await fetch(location.href, { headers: tag ? { "If-None-Match": tag } : {} });
  ahead = (Date.parse(answer.headers.get("Date")) || Date.now()) - Date.now();
  if (answer.status === 304) return "";
  if (!answer.ok) return "The server does not show this any more: what is here is old.";
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  const focus = document.activeElement;
  const name = focus?.hasAttribute("href") ? "href" : "aria-label";
  const value = focus?.getAttribute(name);
  for (const [id, before] of said) {
    const now = fresh.getElementById(id);
    if (!now) continue;
    update(document.getElementById(id), before, now);
    said.set(id, now);
  }
  age(document);
  show();
  if (value && document.activeElement !== focus) { // its row was moved, or its table has other columns
    [...document.querySelectorAll(`[${name}]`)].find((one) => one.getAttribute(name) === value)
      ?.focus({ preventScroll: true });
  }
  tag = answer.headers.get("ETag") ?? "";
  return "";
}

async function poll() {
  const start = performance.now();
  if (!document.hidden) {
    const trouble = await ask().catch(() => "The server does not answer: what is shown is old.");
    if (trouble) status.value = trouble;
    else if (status.dataset.trouble) show();
    status.dataset.trouble = trouble;
    age(document);
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
age(document);
if (live.length) setTimeout(poll, 2000);
