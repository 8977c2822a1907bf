"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const cards = [...document.querySelectorAll("figure[data-figure]")];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse), (max-width: 640px)");
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
    doubleClick: "reset",
  };

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axisNames = ["xaxis", "yaxis"];

  /* The colours of ink and paper as a flat relayout, so that a change of scheme keeps zoom and visibility. */
  function theme(layout, inked) {
    const ink = colour("--ink"), muted = colour("--muted"), line = colour("--line");
    const update = {
      "font.color": muted,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      "hoverlabel.bgcolor": colour("--card"),
      "hoverlabel.bordercolor": muted,
      "hoverlabel.font.color": ink,
      "modebar.bgcolor": "rgba(0,0,0,0)",
      "modebar.color": muted,
      "modebar.activecolor": ink,
    };
    for (const axis of axisNames) {
      update[`${axis}.gridcolor`] = line;
      update[`${axis}.linecolor`] = muted;
    }
    for (const i of inked) update[`shapes[${i}].line.color`] = muted;
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

  const trim = (value, digits = 3) => String(Number(value.toPrecision(digits)));

  function scaled(value, base, names, digits = 3) {
    let step = 0;
    while (Math.abs(value) >= base && step < names.length - 1) { value /= base; step += 1; }
    return trim(value, digits) + names[step];
  }

  function tickText(value, kind, digits = 3) {
    if (kind === "bytes") return scaled(value, 1024, [" B", " KiB", " MiB", " GiB", " TiB"], digits);
    if (kind === "seconds" && value && value < 1) return value < 1e-3 ? `${trim(value * 1e6)} µs` : `${trim(value * 1e3)} ms`;
    if (kind === "seconds") return `${trim(value)} s`;
    if (kind === "whole") return String(value);
    if (kind === "binary") return value >= 131072 && value % 1024 === 0 ? scaled(value, 1024, ["", "Ki", "Mi"]) : value.toLocaleString("en");
    return scaled(value, 1000, ["", "k", "M", "G", "T"]);
  }

  /* As many digits as tell neighbours apart. */
  function labels(values, kind) {
    let texts = [];
    for (let digits = 3; digits < 9; digits += 1) {
      texts = values.map((value) => tickText(value, kind, digits));
      if (new Set(texts).size === values.length) break;
    }
    return texts;
  }

  function spread(from, to, step) {
    const found = [];
    for (let at = Math.ceil(from / step - 1e-9); at * step <= to + 1e-9 * Math.abs(to); at += 1) found.push(at * step);
    return found;
  }

  function niceStep(span) {
    const power = 10 ** Math.floor(Math.log10(span / 4));
    return power * [1, 2, 5, 10].find((m) => m * power >= span / 4);
  }

  /* Ticks of a log axis, or of a linear axis of bytes: powers of two, decades, or 1-2-5 where there are few decades. */
  function ticks(low, high, kind, isLog) {
    if (kind === "whole") return spread(low, high, Math.max(1, niceStep((high - low) / 2)));
    if (!isLog) return spread(low, high, 2 ** Math.ceil(Math.log2((high - low) / 6)));
    const base = kind === "binary" || kind === "bytes" ? 2 : 10;
    const from = Math.log(low) / Math.log(base), to = Math.log(high) / Math.log(base);
    const start = Math.ceil(from - 1e-9), step = Math.max(1, Math.ceil((to - from) / 6));
    let found = spread(0, to - start, step).map((e) => base ** (e + start));
    if (base === 10 && found.length < 4)
      found = spread(Math.floor(from), to, 1).flatMap((e) => [1, 2, 5].map((m) => m * 10 ** e));
    found = found.filter((v) => v >= low * 0.999 && v <= high * 1.001);
    return found.length > (kind === "binary" ? 1 : 2) ? found : spread(low, high, niceStep(high - low));
  }

  /* What the axes need after a draw, a zoom or a switch between linear and log; {} when they are right already. */
  function ticksFor(place) {
    const update = {};
    for (const name of axisNames) {
      const axis = place._fullLayout[name], kind = (place.layout.meta || {})[name[0]] || "";
      const own = place.fixed[name];
      const isLog = axis.type === "log";
      if (axis.type === "category" || (own && !isLog && name === "yaxis")) continue;
      if (own && isLog) { Object.assign(update, { [`${name}.tickvals`]: own.tickvals, [`${name}.ticktext`]: own.ticktext, [`${name}.tickmode`]: "array" }); continue; }
      if (!isLog && kind !== "bytes" && kind !== "whole") { update[`${name}.tickmode`] = "auto"; continue; }
      const [low, high] = isLog ? axis.range.map((v) => 10 ** v) : axis.range;
      const values = ticks(Math.min(low, high), Math.max(low, high), kind, isLog);
      Object.assign(update, { [`${name}.tickmode`]: "array", [`${name}.tickvals`]: values, [`${name}.ticktext`]: labels(values, kind) });
    }
    return update;
  }

  async function retick(place) {
    if (place.ticking) return;
    place.ticking = true;
    const update = ticksFor(place);
    if (Object.keys(update).length) await Plotly.relayout(place, update);
    place.ticking = false;
  }

  function dress(layout, height) {
    Object.assign(layout, {
      height,
      autosize: true,
      showlegend: false,
      dragmode: touch.matches ? false : "zoom",
      hovermode: "closest",
      hoverdistance: 30,
      font: { family: colour("--sans"), size: 12 },
      hoverlabel: { align: "left", namelength: -1, font: { size: 12 } },
      margin: { l: 8, r: 14, t: touch.matches ? 46 : 26, b: 4, pad: 2 },
    });
    for (const axis of axisNames) {
      layout[axis] = { automargin: true, zeroline: false, ticks: "outside", ticklen: 4, tickcolor: "rgba(0,0,0,0)", showline: axis === "xaxis", ...layout[axis] };
      layout[axis].title = { standoff: 8, font: { size: 12 }, ...layout[axis].title };
    }
  }

  async function draw(card) {
    if (card.dataset.drawn) return;
    card.dataset.drawn = "yes";
    const { data, layout } = figures[Number(card.dataset.figure)];
    const place = card.querySelector(".drawing");
    dress(layout, Number(card.dataset.height) + (touch.matches ? 20 : 0));
    place.style.height = `${layout.height}px`;
    place.fixed = {};
    for (const axis of axisNames) if (layout[axis].tickvals) place.fixed[axis] = { tickvals: layout[axis].tickvals, ticktext: layout[axis].ticktext };
    place.inked = (layout.shapes || []).map((shape, i) => (shape.type === "line" && !shape.line.color ? i : -1)).filter((i) => i >= 0);
    for (const [path, value] of Object.entries(theme(layout, place.inked))) assign(layout, path, value);
    await Plotly.newPlot(place, data, layout, config);
    await retick(place);
    place.on("plotly_relayout", () => retick(place));
  }

  /* Visible is what the chosen view shows, less what the legend hides. */
  function show(card) {
    const place = card.querySelector(".drawing");
    const view = card.querySelector('button[data-visible][aria-pressed="true"]');
    const visible = view ? JSON.parse(view.dataset.visible) : place.data.map(() => true);
    for (const entry of card.querySelectorAll('button[data-traces][aria-pressed="false"]'))
      for (const i of JSON.parse(entry.dataset.traces)) visible[i] = false;
    return Plotly.restyle(place, { visible });
  }

  async function press(card, button) {
    await draw(card);
    const place = card.querySelector(".drawing");
    const on = button.getAttribute("aria-pressed") !== "true";
    if (button.dataset.visible) {
      for (const other of card.querySelectorAll("button[data-visible]")) other.setAttribute("aria-pressed", String(other === button));
      await show(card);
      const free = axisNames.filter((axis) => !figures[Number(card.dataset.figure)].layout[axis].fixedrange);
      await Plotly.relayout(place, Object.fromEntries(free.map((axis) => [`${axis}.autorange`, true])));
    } else if (button.dataset.traces) {
      button.setAttribute("aria-pressed", String(on));
      await show(card);
    } else {
      button.setAttribute("aria-pressed", String(on));
      const axis = `${button.dataset.axis}axis`;
      await Plotly.relayout(place, { [`${axis}.type`]: on ? "log" : "linear", [`${axis}.autorange`]: true, [`${axis}.tickmode`]: "auto" });
    }
    await retick(place);
  }

  for (const card of cards)
    card.addEventListener("click", (event) => {
      const button = event.target.closest("button[aria-pressed]");
      if (button) press(card, button);
    });

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "700px 0px" });
  cards.forEach((card) => near.observe(card));
  addEventListener("beforeprint", () => cards.forEach(draw));

  dark.addEventListener("change", () => {
    for (const place of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(place, theme(place.layout, place.inked));
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
