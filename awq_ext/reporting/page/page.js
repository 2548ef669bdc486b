"use strict";
// numbers by value, the rest by name; what is empty comes last, whichever way; the first click on a column of numbers: largest first
for (const table of document.querySelectorAll("table[id]")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => {
      const was = head.getAttribute("aria-sort");
      const down = was === "none" ? head.className === "n" : was === "ascending";
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = [...body.rows].map((row) => {
        const cell = row.cells[column];
        return { row, text: cell.textContent, value: "v" in cell.dataset ? parseFloat(cell.dataset.v.replace("inf", "Infinity")) : null };
      });
      keyed.sort((a, b) => {
        if (!a.text || !b.text) return !a.text - !b.text;
        const order = a.value !== null && b.value !== null ? a.value - b.value : a.text.localeCompare(b.text, "en", { numeric: true });
        return (down ? -order : order) || 0;
      });
      body.append(...keyed.map((one) => one.row));
    });
  });
}
