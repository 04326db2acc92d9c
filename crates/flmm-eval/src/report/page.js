"use strict";
const body = document.querySelector("#failures tbody");
const rows = [...body.rows];
const search = document.getElementById("search");
const kinds = [...document.querySelectorAll("input[name=kind]")];

function show() {
  const wanted = new Set(kinds.filter((box) => box.checked).map((box) => box.value));
  const text = search.value.trim().toLowerCase();
  let count = 0;
  for (const row of rows) {
    row.hidden = !wanted.has(row.dataset.kind) || !row.textContent.toLowerCase().includes(text);
    count += row.hidden ? 0 : 1;
  }
  document.getElementById("shown").textContent = `${count} of ${rows.length} shown`;
}

function sort(button) {
  const head = button.closest("th");
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = button.dataset.key;
  const numeric = key === "iou" || key === "size";
  const compare = (a, b) =>
    numeric ? a.dataset[key] - b.dataset[key] : a.dataset[key].localeCompare(b.dataset[key], "en", { numeric: true });
  rows.sort((a, b) => (down ? compare(b, a) : compare(a, b)));
  body.append(...rows);
}

for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sort(button));
for (const box of kinds) box.addEventListener("change", show);
search.addEventListener("input", show);
body.addEventListener("click", (event) => {
  if (event.target.tagName !== "IMG") return;
  for (const picture of event.target.closest("tr").querySelectorAll("img")) picture.classList.toggle("large");
});
sort(document.querySelector("th button[data-key=iou]"));
show();
