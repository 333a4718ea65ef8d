"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = heading.querySelector("button");
    const numeric = button.dataset.sortAs === "num";
    const value = (row) => {
      const cell = row.cells[column];
      if (!numeric) return cell.textContent.trim();
      return cell.dataset.sort === "" ? NaN : Number(cell.dataset.sort);
    };
    button.addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      const ascending = before === "none" ? !numeric || column === 0 : before === "descending";
      for (const other of headings) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const sign = ascending ? 1 : -1;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (!numeric) return sign * x.localeCompare(y, "en", { numeric: true });
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // what is unknown comes last
        return sign * (x - y);
      });
      table.tBodies[0].append(...rows);
    });
  });
}
for (const group of document.querySelectorAll(".filter")) {
  const buttons = [...group.querySelectorAll("button")];
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      for (const row of document.querySelectorAll("#rows tbody tr")) {
        row.hidden = button.dataset.show !== "" && row.dataset.kind !== button.dataset.show;
      }
    });
  }
}
