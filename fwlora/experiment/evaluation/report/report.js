"use strict";
// Everything here is a comfort: without it tables stay as they are and pages are opened by hand.
(() => {
  const read = (row, column) => {
    const cell = row.cells[column];
    if (!cell) return null;
    const value = cell.dataset.value;
    if (value === undefined) return cell.textContent.trim();
    return value === "" ? null : Number(value);
  };

  const compare = (first, second) =>
    typeof first === "number" && typeof second === "number"
      ? first - second
      : String(first).localeCompare(String(second), "en", { numeric: true });

  // What is missing stays last in both directions.
  const sort = (table, header) => {
    const ascending = header.getAttribute("aria-sort") !== "ascending";
    const body = table.tBodies[0];
    const rows = Array.from(body.rows, (row) => ({ row, value: read(row, header.cellIndex) }));
    rows.sort((a, b) => {
      if (a.value === null || b.value === null) return (a.value === null) - (b.value === null);
      return ascending ? compare(a.value, b.value) : compare(b.value, a.value);
    });
    for (const other of table.tHead.rows[0].cells) {
      if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    }
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    table.classList.add("sorted");
    body.append(...rows.map(({ row }) => row));
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    for (const header of table.tHead.rows[0].cells) {
      if (header.classList.contains("unsortable")) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      header.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sort(table, header));
    }
  }

  const reveal = (hash) => {
    const target = document.getElementById(decodeURIComponent(hash.slice(1)));
    if (!target) return;
    for (let node = target; node; node = node.parentElement) {
      if (node.tagName === "DETAILS") node.open = true;
    }
    target.scrollIntoView();
  };
  addEventListener("hashchange", () => reveal(location.hash));
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (link && link.hash === location.hash) reveal(link.hash);
  });
  if (location.hash) reveal(location.hash);

  const addButton = (text, act) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "action";
    button.textContent = text;
    button.addEventListener("click", () => act(button));
    return button;
  };

  for (const block of document.querySelectorAll(".copyable")) {
    block.append(
      addButton("Copy", async (button) => {
        const code = block.querySelector("code");
        try {
          await navigator.clipboard.writeText(code.textContent);
          button.textContent = "Copied";
        } catch {
          getSelection().selectAllChildren(code);
          button.textContent = "Selected";
        }
      }),
    );
  }

  const pages = document.querySelectorAll("details.run");
  if (pages.length > 1) {
    const open = addButton("Open all", () => pages.forEach((page) => (page.open = true)));
    const close = addButton("Close all", () => pages.forEach((page) => (page.open = false)));
    document.querySelector("#runs > p").append(" ", open, " ", close);
  }
})();
