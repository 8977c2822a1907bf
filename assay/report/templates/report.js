"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const cards = [...document.querySelectorAll("figure[data-figure]")];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse), (max-width: 640px)");
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "toImage"],
    doubleClick: "reset",
  };

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function axisNames(layout) {
    return Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key));
  }

  /* The colours of ink and paper as a flat relayout, so that a change of scheme keeps zoom and visibility. */
  function theme(layout) {
    const ink = colour("--ink"), muted = colour("--muted"), line = colour("--line"), card = colour("--card");
    const update = {
      "font.color": muted,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      "hoverlabel.bgcolor": card,
      "hoverlabel.bordercolor": muted,
      "hoverlabel.font.color": ink,
      "modebar.bgcolor": "rgba(0,0,0,0)",
      "modebar.color": muted,
      "modebar.activecolor": ink,
    };
    for (const axis of axisNames(layout)) {
      update[axis + ".gridcolor"] = line;
      update[axis + ".linecolor"] = muted;
      update[axis + ".zerolinecolor"] = line;
    }
    (layout.shapes || []).forEach((shape, i) => {
      if (shape.type === "line" && !shape.keep) update[`shapes[${i}].line.color`] = muted;
    });
    (layout.annotations || []).forEach((_, i) => { update[`annotations[${i}].font.color`] = muted; });
    return update;
  }

  function assign(target, path, value) {
    const keys = path.replace(/\[(\d+)\]/g, ".$1").split(".");
    const last = keys.pop();
    let at = target;
    for (const key of keys) at = at[key] === undefined ? (at[key] = {}) : at[key];
    at[last] = value;
  }

  function legendRows(data, width) {
    const names = new Set(data.filter((t) => t.name && t.showlegend !== false && t.visible !== false).map((t) => t.name));
    const total = [...names].reduce((sum, name) => sum + 52 + 7 * Math.min(name.length, 40), 0);
    return names.size > 1 ? Math.ceil(total / Math.max(200, width - 60)) : 0;
  }

  function draw(card) {
    if (card.dataset.drawn) return;
    card.dataset.drawn = "yes";
    const { data, layout } = figures[Number(card.dataset.figure)];
    const place = card.querySelector(".drawing");
    const height = Number(card.dataset.height) + 20 * legendRows(data, place.clientWidth);
    place.style.height = `${height}px`;
    Object.assign(layout, {
      height,
      autosize: true,
      dragmode: coarse.matches ? false : "zoom",
      hovermode: "closest",
      hoverdistance: 30,
      font: { family: colour("--sans"), size: 12 },
      hoverlabel: { align: "left", namelength: -1, font: { size: 12 } },
      margin: { l: 8, r: 14, t: 26, b: 8, pad: 2 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 }, itemwidth: 30 },
      showlegend: legendRows(data, 400) > 0,
    });
    for (const axis of axisNames(layout)) {
      layout[axis] = Object.assign({ automargin: true, zeroline: false, ticks: "outside", ticklen: 4, showline: true }, layout[axis]);
      layout[axis].tickcolor = "rgba(0,0,0,0)";
      if (layout[axis].title) layout[axis].title = Object.assign({ standoff: 8, font: { size: 12 } }, layout[axis].title);
    }
    layout.yaxis.showline = false;
    for (const [path, value] of Object.entries(theme(layout))) assign(layout, path, value);
    Plotly.newPlot(place, data, layout, config);
  }

  function press(button, group) {
    for (const other of group) other.setAttribute("aria-pressed", String(other === button));
  }

  for (const card of cards) {
    card.addEventListener("click", (event) => {
      const button = event.target.closest("button[data-visible], button[data-axis]");
      if (!button) return;
      draw(card);
      const place = card.querySelector(".drawing");
      if (button.dataset.visible) {
        press(button, card.querySelectorAll("button[data-visible]"));
        Plotly.restyle(place, { visible: JSON.parse(button.dataset.visible) });
        Plotly.relayout(place, { "xaxis.autorange": true, "yaxis.autorange": true });
      } else {
        const on = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(on));
        const axis = `${button.dataset.axis}axis`;
        Plotly.relayout(place, { [`${axis}.type`]: on ? "log" : "linear", [`${axis}.autorange`]: true });
      }
    });
  }

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "700px 0px" });
  cards.forEach((card) => near.observe(card));
  addEventListener("beforeprint", () => cards.forEach(draw));

  dark.addEventListener("change", () => {
    for (const card of cards) {
      if (!card.dataset.drawn) continue;
      const place = card.querySelector(".drawing");
      Plotly.relayout(place, theme(place.layout));
    }
  });

  const links = new Map([...document.querySelectorAll(".toc a")].map((a) => [a.getAttribute("href").slice(1), a]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const [id, link] of links) link.toggleAttribute("aria-current", id === entry.target.id);
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const id of links.keys()) seen.observe(document.getElementById(id));
})();
