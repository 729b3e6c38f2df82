"use strict";
// Sorts by the column whose head is clicked: by data-value where cells have one, else by text.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        const order = x === "" || y === "" || isNaN(x) || isNaN(y) ? x.localeCompare(y, "en", {numeric: true}) : x - y;
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
}
// Shows the sites that hold the text and have the kind and the code.
const filter = document.getElementById("filter");
if (filter) {
  const kind = document.getElementById("kind");
  const code = document.getElementById("code");
  const rows = [...document.getElementById("table").tBodies[0].rows];
  const show = () => {
    const text = filter.value.toLowerCase();
    for (const row of rows) {
      row.hidden = !(row.textContent.toLowerCase().includes(text) &&
        (!kind.value || row.dataset.kind === kind.value) && (!code.value || row.dataset.code === code.value));
    }
    const count = rows.filter((row) => !row.hidden).length;
    document.getElementById("shown").textContent = `${count} of ${rows.length}`;
  };
  for (const control of [filter, kind, code]) control.addEventListener("input", show);
}
