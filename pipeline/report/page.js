"use strict";
// Names and numbers come from the data element and become text nodes, never markup.
const { columns, chart } = JSON.parse(document.getElementById("data").textContent);
const heads = document.querySelectorAll("#classes thead tr:last-child th");
const titles = Array.from(heads, (head) => head.textContent);
const byteColumn = titles.indexOf("bytes");
const lowered = columns[0].map((name) => name.toLowerCase());
const PAGE = 100;
let rows = columns[0].map((_, row) => row);
let sortedBy = 1;
let ascending = false;
let shown = PAGE;

const group = new Intl.NumberFormat("en");

function bytes(value) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return (unit ? value.toFixed(1) : value) + " " + units[unit];
}

function line(row) {
  const tr = document.createElement("tr");
  columns.forEach((column, i) => {
    const cell = document.createElement("td");
    if (i === 0) {
      const name = document.createElement("bdi");
      name.textContent = column[row];
      cell.append(name);
    } else {
      cell.className = "n";
      cell.textContent = i === byteColumn ? bytes(column[row]) : group.format(column[row]);
    }
    tr.append(cell);
  });
  return tr;
}

function show() {
  document.querySelector("#classes tbody").replaceChildren(...rows.slice(0, shown).map(line));
  const more = document.getElementById("more");
  more.hidden = rows.length <= shown;
  more.textContent = "Show more (" + group.format(rows.length - shown) + " left)";
  document.getElementById("found").textContent = group.format(rows.length) + " of " + group.format(lowered.length);
}

function select() {
  const wanted = document.getElementById("search").value.trim().toLowerCase();
  rows = lowered.flatMap((name, row) => (name.includes(wanted) ? [row] : []));
  const column = sortedBy === 0 ? lowered : columns[sortedBy];
  const sign = ascending ? 1 : -1;
  rows.sort((a, b) => (column[a] < column[b] ? -sign : column[a] > column[b] ? sign : a - b));
  heads.forEach((cell, i) => {
    cell.setAttribute("aria-sort", i !== sortedBy ? "none" : ascending ? "ascending" : "descending");
  });
  shown = PAGE;
  show();
}

document.getElementById("search").addEventListener("input", select);
document.getElementById("more").addEventListener("click", () => { shown += 5 * PAGE; show(); });
heads.forEach((head, i) => {
  head.firstChild.addEventListener("click", () => {
    ascending = i === sortedBy ? !ascending : i === 0;
    sortedBy = i;
    select();
  });
});
select();

const curve = document.getElementById("curve");
const hair = document.getElementById("hair");
const readout = document.getElementById("readout");
const left = Number(curve.dataset.left);
const right = Number(curve.dataset.right);
const power = Number(curve.dataset.power);

curve.addEventListener("pointermove", (event) => {
  const box = curve.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * curve.viewBox.baseVal.width;
  const rank = Math.floor(((x - left) / (right - left)) ** (1 / power) * chart.length);
  const row = chart[rank];
  if (row === undefined) { return; }
  const at = left + ((rank + 0.5) / chart.length) ** power * (right - left);
  hair.setAttribute("x1", at);
  hair.setAttribute("x2", at);
  const name = document.createElement("bdi");
  name.textContent = columns[0][row];
  const draws = titles.map((title, i) => (i > byteColumn ? title + " " + group.format(columns[i][row]) : ""));
  const told = "rank " + group.format(rank + 1) + ", " + group.format(columns[2][row]) + " training images; draws: ";
  readout.replaceChildren(name, ": " + told + draws.filter(Boolean).join(", "));
});
