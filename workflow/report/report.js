"use strict";
// Sorting: a click on a header sorts by its column, the second reverses the order, the third restores the order of the study.
// Baseline rows stay on top; entries without a value (failed, missing) stay at the end in both directions.
function key(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.value === undefined) {
    const text = cell.textContent.trim();
    return text !== "" && isFinite(text) ? Number(text) : text;
  }
  const number = parseFloat(cell.dataset.value);
  return isFinite(number) ? number : null;
}
function compare(a, b, direction) {
  if (a === null || b === null) return (a === null) - (b === null);
  const both = typeof a === "number" && typeof b === "number";
  return direction * (both ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
}
function sort(table, header, column) {
  const next = { ascending: "descending", descending: "none" }[header.getAttribute("aria-sort")] || "ascending";
  table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
  if (next !== "none") header.setAttribute("aria-sort", next);
  const direction = next === "descending" ? -1 : 1;
  const rows = Array.from(table.tBodies[0].rows);
  rows.sort((a, b) => {
    const original = a.dataset.order - b.dataset.order;
    if (next === "none") return original;
    const pinned = b.classList.contains("baseline") - a.classList.contains("baseline");
    return pinned || compare(key(a, column), key(b, column), direction) || original;
  });
  table.tBodies[0].append(...rows);
}
document.querySelectorAll("table.sortable").forEach((table) => {
  Array.from(table.tBodies[0].rows).forEach((row, position) => { row.dataset.order = position; });
  table.querySelectorAll("thead th button").forEach((button) => {
    const header = button.closest("th");
    const column = Number(header.dataset.column ?? header.cellIndex);
    button.addEventListener("click", () => sort(table, header, column));
  });
});
// Filtering: rows that contain all words of the search box and have the chosen value of every list. Rows of
// full precision stay, except those of other models. Lists act on everything of their section that names the axis.
function fits(element, lists, words) {
  const baseline = element.classList.contains("baseline");
  for (const list of lists) {
    const own = element.dataset[list.dataset.axis];
    if (list.value && own !== undefined && own !== list.value && !(baseline && list.dataset.axis !== "model")) return false;
  }
  if (baseline || element.tagName !== "TR") return true;
  const text = Array.from(element.cells, (cell) => cell.textContent).join(" ").toLowerCase();
  return words.every((word) => text.includes(word));
}
function filter(block) {
  const input = block.querySelector("input[type=search]"), table = block.querySelector("table");
  const lists = Array.from(block.querySelectorAll("select[data-axis]"));
  const words = input ? input.value.toLowerCase().split(/\s+/).filter(Boolean) : [];
  const rows = Array.from(table.tBodies[0].rows);
  [...rows, ...block.querySelectorAll("li[data-model], figure[data-model]")].forEach((element) => {
    element.hidden = !fits(element, lists, words);
  });
  const output = block.querySelector("output");
  if (!output) return;
  const counted = rows.filter((row) => !row.classList.contains("baseline"));
  const narrowed = words.length || lists.some((list) => list.value);
  output.textContent = narrowed ? counted.filter((row) => !row.hidden).length + " of " + counted.length + " rows" : "";
}
document.querySelectorAll(".filtered, #answer").forEach((block) => {
  block.querySelectorAll("input[type=search], select[data-axis]").forEach((control) => {
    control.addEventListener("input", () => filter(block));
  });
});
const answer = document.querySelector("#answer");
if (answer) filter(answer); // a page loaded again keeps its choices
// Download of the visible rows of a table as CSV, numbers in full precision; next to the numbers of recipes what the page shows, with intervals.
function quoted(text) {
  return /[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
}
function csv(table) {
  const heads = Array.from(table.tHead.rows).flatMap((row) => Array.from(row.cells)).filter((cell) => !cell.classList.contains("group"));
  const rows = Array.from(table.tBodies[0].rows).filter((row) => !row.hidden);
  const numeric = (cell) => isFinite(parseFloat(cell.dataset.value)), text = (cell) => cell.textContent.trim();
  const more = heads.map((_, column) => table.closest("#answer, #cells") && Array.from(table.tBodies[0].rows).some((row) => /\d .*\d/.test(text(row.cells[column])) && numeric(row.cells[column])));
  const line = (cells, first, second) => Array.from(cells).flatMap((cell, column) => more[column] ? [first(cell), second(cell)] : [first(cell)]);
  const lines = rows.map((row) => line(row.cells, (cell) => numeric(cell) ? cell.dataset.value : text(cell), text));
  return [line(heads, text, (cell) => text(cell) + ", as shown"), ...lines].map((cells) => cells.map(quoted).join(",")).join("\n") + "\n";
}
document.querySelectorAll("button.csv").forEach((button) => {
  button.addEventListener("click", () => {
    const link = document.createElement("a");
    const block = button.closest(".filtered, #answer"), budget = block.querySelector("select[data-axis=budget]");
    link.href = "data:text/csv;charset=utf-8," + encodeURIComponent(csv(block.querySelector("table")));
    link.download = (button.dataset.name + (budget ? ", " + budget.selectedOptions[0].textContent : "")).replace(/[^\w.]+/g, "-") + ".csv";
    document.body.append(link);
    link.click();
    link.remove();
  });
});
// Card of a cell.
const card = document.querySelector("#card"), known = JSON.parse(document.querySelector("#cards").textContent);
function made(tag, text, parts) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  element.append(...(parts || []));
  return element;
}
function pairs(entries) {
  return made("dl", undefined, entries.map(([name, value]) => made("div", undefined, [made("dt", name), made("dd", value)])));
}
function show(key) {
  const cell = known[key], close = made("button", "Close");
  close.type = "button";
  close.addEventListener("click", () => card.close());
  const body = made("tbody", undefined, cell.numbers.map((line) => made("tr", undefined, line.map((text) => made("td", text)))));
  const head = made("thead", undefined, [made("tr", undefined, ["metric", "value ± standard error", "to full precision, paired"].map((text) => made("th", text)))]);
  const links = Object.entries(cell.links).map(([name, path]) => {
    const link = made("a", name);
    link.href = encodeURI(path);
    return made("li", undefined, [link]);
  });
  card.replaceChildren(
    close, made("h2", cell.title), ...(cell.reason ? [made("p", "failed: " + cell.reason)] : []),
    made("div", undefined, [made("table", undefined, [head, body])]),
    pairs([...Object.entries(cell.axes), ...Object.entries(cell.entries).map(([axis, entry]) => [axis + " in the config", JSON.stringify(entry)]), ["cell", key]]),
    ...(links.length ? [made("h3", "Logs and evaluations"), made("ul", undefined, links)] : []),
  );
  card.showModal();
}
document.querySelectorAll("button.card").forEach((button) => {
  if (known[button.dataset.cell]) button.addEventListener("click", () => show(button.dataset.cell));
  else button.disabled = true;
});
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((block) => { block.open = true; }));
