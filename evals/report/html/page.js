"use strict";
// Charts in the page's colors, a legend for all of them, sortable tables, links into folded rows.
(() => {
  const root = document.documentElement;
  const night = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : night.matches);

  // --- charts ---
  const legend = [...document.querySelectorAll(".legend button")];
  const views = [];
  let turn = 0;

  function color(name) {
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = `var(${name})`;
    const found = getComputedStyle(probe).color; // light-dark() comes out resolved
    probe.remove();
    return found;
  }

  function look() {
    const [ink, quiet, line, panel] = ["--ink", "--quiet", "--line", "--panel"].map(color);
    const title = { labelColor: quiet, titleColor: ink, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500 };
    return {
      background: panel,
      font: "system-ui, sans-serif",
      axis: { ...title, gridColor: line, domainColor: quiet, tickColor: quiet },
      legend: { ...title, symbolFillColor: quiet, symbolStrokeColor: quiet },
      view: { stroke: null },
      text: { color: ink },
      rule: { color: quiet },
      range: {
        category: legend.map((button) => color(button.dataset.color)),
        symbol: legend.map((button) => button.dataset.symbol),
      },
    };
  }

  async function draw() {
    const mine = ++turn; // another theme may be asked for meanwhile
    const options = {
      mode: "vega-lite", renderer: "svg", ast: true, config: look(),
      actions: { export: true, source: false, compiled: false, editor: false },
      loader: { target: "_self" }, tooltip: { theme: isDark() ? "dark" : "light" },
    };
    views.splice(0).forEach((view) => view.finalize());
    for (const data of document.querySelectorAll("script[data-for]")) {
      const box = document.getElementById(data.dataset.for);
      const { view } = await vegaEmbed(box, JSON.parse(data.textContent), options);
      if (mine !== turn) return view.finalize();
      views.push(view);
    }
    fade();
    root.dataset.drawn = views.length;
  }

  function fade() {
    const off = legend.filter((button) => button.getAttribute("aria-pressed") === "false");
    const names = off.map((button) => button.dataset.strategy);
    views.forEach((view) => view.signal("hidden", names).runAsync());
  }

  legend.forEach((button) => {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") === "false");
      fade();
    });
  });

  // --- theme ---
  const toggle = document.getElementById("theme");
  const name = () => { toggle.textContent = isDark() ? "Light" : "Dark"; };
  const redraw = () => { name(); draw(); };
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    redraw();
  });
  night.addEventListener("change", redraw);

  // --- tables ---
  const number = (text) => parseFloat(text.replace(/,/g, ""));

  function sort(head) {
    const rows = head.closest("table").tBodies[0], up = head.getAttribute("aria-sort") !== "ascending";
    const text = (row) => (row.cells[head.cellIndex]?.textContent ?? "").trim();
    const last = (row) => ["", "-", "failed"].includes(text(row)) || text(row).startsWith("failed:");
    const numeric = [...rows.rows].every((row) => last(row) || !Number.isNaN(number(text(row))));
    const order = numeric
      ? (a, b) => number(text(a)) - number(text(b))
      : (a, b) => text(a).localeCompare(text(b), "en", { numeric: true });
    rows.append(...[...rows.rows].sort(
      (a, b) => last(a) - last(b) || (last(a) ? 0 : up ? order(a, b) : order(b, a)),
    ));
    head.closest("tr").querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  }

  document.querySelectorAll("thead th").forEach((head) => {
    head.firstElementChild.addEventListener("click", () => sort(head));
  });

  // --- links into folded rows ---
  function unfold() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let at = target; at; at = at.parentElement) {
      if (at.tagName === "DETAILS") at.open = true;
    }
    target?.scrollIntoView({ block: target.tagName === "TR" ? "center" : "start" });
  }
  addEventListener("hashchange", unfold);

  redraw();
  unfold();
})();
