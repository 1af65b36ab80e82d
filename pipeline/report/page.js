"use strict";
// Names and numbers come from the data element and become text nodes, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const { names, columns, manifests } = data;
const $ = (id) => document.getElementById(id);
const PAGE = 100;
const whole = new Intl.NumberFormat("en");
const real = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const lowered = names.map((name) => name.toLowerCase());

function bytes(value) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return (unit ? value.toFixed(1) : value) + " " + units[unit];
}

// -- columns: a key (a manifest may be called like a column), a title, numbers by row, how they are shown

function fixedColumns() {
  return [
    { title: "class", values: names, order: lowered },
    { title: "group", values: data.group, show: (code) => data.groups[code] },
    { title: "images", values: columns.count },
    { title: "train", values: columns.train },
    { title: "val", values: columns.val },
    { title: "test", values: columns.test },
    { title: "evaluable", values: data.evaluable, show: (yes) => (yes ? "yes" : "no") },
    { title: "bytes", values: columns.bytes, show: bytes },
  ].map((column) => ({ key: column.title, ...column }));
}

function measured(manifest, measure) {
  const key = "manifest " + manifest.name;
  if (!measure) { return { key, title: manifest.name, values: manifest.draws }; }
  const show = (value) => (typeof value === "number" ? real.format(value) : value.replace("-", "\u2212"));
  const values = manifest.measures[measure];
  const order = values.map((value) => (value === "-inf" ? -Infinity : Number(value)));
  return { key, title: manifest.name, values, show, order };
}

let shownColumns = [];
let rows = names.map((_, row) => row);
let sortedBy = "images";
let ascending = false;
let page = 0;

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) { made.textContent = text; }
  if (className) { made.className = className; }
  return made;
}

function cell(column, row) {
  const value = column.values[row];
  if (column.values === names) {
    const made = element("td");
    made.append(element("bdi", value));
    return made;
  }
  const text = column.show ? column.show(value) : whole.format(value);
  const made = element("td", text, "n");
  if (column.values === data.evaluable && !value) { made.classList.add("no"); }
  return made;
}

function head(column) {
  const made = element("th", undefined, column.values === names ? "" : "n");
  const button = element("button", column.title);
  button.type = "button";
  button.addEventListener("click", () => {
    ascending = column.key === sortedBy ? !ascending : column.values === names;
    sortedBy = column.key;
    select();
  });
  made.append(button);
  made.setAttribute("aria-sort", column.key !== sortedBy ? "none" : ascending ? "ascending" : "descending");
  return made;
}

function show() {
  const last = Math.max(0, Math.ceil(rows.length / PAGE) - 1);
  page = Math.min(Math.max(page, 0), last);
  const here = rows.slice(page * PAGE, (page + 1) * PAGE);
  document.querySelector("#classes tbody").replaceChildren(...here.map((row) => {
    const tr = element("tr");
    tr.append(...shownColumns.map((column) => cell(column, row)));
    return tr;
  }));
  document.querySelector("#classes thead tr").replaceChildren(...shownColumns.map(head));
  $("found").textContent = whole.format(rows.length) + " of " + whole.format(names.length);
  $("pages").hidden = last === 0;
  $("where").textContent = whole.format(page * PAGE + 1) + " to " + whole.format(page * PAGE + here.length) + " of " + whole.format(rows.length);
  $("first").disabled = $("back").disabled = page === 0;
  $("on").disabled = $("last").disabled = page === last;
}

// -- which classes, in which order

const FILTERS = [
  ...data.groups.map((name, code) => [name + " (training images)", (row) => data.group[row] === code]),
  ["cannot be evaluated", (row) => !data.evaluable[row]],
  ["can be evaluated", (row) => data.evaluable[row]],
  ...manifests.map((manifest) => ["not drawn by " + manifest.name, (row) => manifest.draws[row] === 0]),
].filter(([, passes]) => names.some((_, row) => passes(row)));

function select() {
  const measure = $("measure").value;
  shownColumns = [...fixedColumns(), ...manifests.map((manifest) => measured(manifest, measure))];
  const column = shownColumns.find((one) => one.key === sortedBy);
  const order = column.order || column.values;
  const wanted = $("search").value.trim().toLowerCase();
  const passes = $("group").value === "" ? () => true : FILTERS[Number($("group").value)][1];
  const sign = ascending ? 1 : -1;
  rows = [];
  lowered.forEach((name, row) => { if (name.includes(wanted) && passes(row)) { rows.push(row); } });
  rows.sort((a, b) => (order[a] < order[b] ? -sign : order[a] > order[b] ? sign : a - b));
  page = 0;
  show();
}

function option(value, text) {
  const made = element("option", text);
  made.value = value;
  return made;
}

$("group").append(...FILTERS.map(([title], place) => option(String(place), title)));
if (manifests.length) {
  $("measure").append(...Object.keys(manifests[0].measures).map((title) => option(title, title)));
}
$("search").addEventListener("input", select);
$("group").addEventListener("change", select);
$("measure").addEventListener("change", select);
const turn = (to) => () => { page = to(); show(); };
$("first").addEventListener("click", turn(() => 0));
$("back").addEventListener("click", turn(() => page - 1));
$("on").addEventListener("click", turn(() => page + 1));
$("last").addEventListener("click", turn(() => Infinity));

// -- CSV: every listed class and column. A spreadsheet takes text that begins with = + - @ for a formula; an
// apostrophe before it makes it text again.

function csvText(value) {
  const guarded = /^[\s"']*[=+\-@\uff0b\uff0d\uff1d\uff20]/.test(value) ? "'" + value : value;
  return '"' + guarded.replaceAll('"', '""') + '"';
}

function csv() {
  const titles = ["class_id", "class", "group", "images", "train", "val", "test", "evaluable", "bytes"];
  const parts = [data.ids, names, data.group.map((code) => data.groups[code]), columns.count, columns.train, columns.val, columns.test, data.evaluable, columns.bytes];
  for (const manifest of manifests) {
    titles.push(manifest.name + " draws");
    parts.push(manifest.draws);
    for (const [title, values] of Object.entries(manifest.measures)) {
      titles.push(manifest.name + " " + title);
      parts.push(values);
    }
  }
  // Numbers, and infinities spelled as numbers, are ours; everything else is a name.
  const plain = (value) => typeof value === "number" || value === "-inf" || value === "inf";
  const lines = names.map((_, row) => parts.map((part) => (plain(part[row]) && part !== names ? String(part[row]) : csvText(part[row]))).join(","));
  return [titles.map(csvText).join(","), ...lines, ""].join("\r\n");
}

$("csv").addEventListener("click", () => {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob(["\ufeff", csv()], { type: "text/csv;charset=utf-8" }));
  link.download = "classes.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
});

// -- the curve tells the class under the pointer

document.querySelectorAll(".curve").forEach((curve) => {
  const hair = curve.querySelector(".hair");
  const left = Number(curve.dataset.left);
  const right = Number(curve.dataset.right);
  const power = Number(curve.dataset.power);
  curve.addEventListener("pointermove", (event) => {
    const box = curve.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * curve.viewBox.baseVal.width;
    const rank = Math.floor(((x - left) / (right - left)) ** (1 / power) * data.chart.length);
    const row = data.chart[rank];
    if (row === undefined) { return; }
    const at = left + ((rank + 0.5) / data.chart.length) ** power * (right - left);
    hair.setAttribute("x1", at);
    hair.setAttribute("x2", at);
    const draws = manifests.map((manifest) => manifest.name + " " + whole.format(manifest.draws[row]));
    const told = "rank " + whole.format(rank + 1) + ", " + whole.format(columns.train[row]) + " training images; draws: ";
    $("readout").replaceChildren(element("bdi", names[row]), ": " + told + draws.join(", "));
  });
});

// -- light or dark, also against the system's choice

const themeButton = $("theme");
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : prefersDark.matches;
}
function nameTheme() { themeButton.textContent = isDark() ? "Light" : "Dark"; }
themeButton.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
prefersDark.addEventListener("change", nameTheme);
themeButton.hidden = false;
nameTheme();

select();
document.documentElement.dataset.ready = "yes";
