// The report's charts and its viewer of episodes. The page holds all data; nothing is loaded. Texts of games are set as text,
// never as markup.
"use strict";

const byId = (id) => document.getElementById(id);
const jsonOf = (id) => JSON.parse(byId(id).textContent);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const percent = (share, digits = 1) => `${(share * 100).toFixed(digits)}%`;
const words = (name) => name.replaceAll("_", " ");

// Charts

const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A specification with the style sheet's colours in the place of their names. */
function coloured(spec) {
  if (typeof spec === "string") return spec.startsWith("--") ? colourOf(spec) : spec;
  if (Array.isArray(spec)) return spec.map(coloured);
  if (spec === null || typeof spec !== "object") return spec;
  return Object.fromEntries(Object.entries(spec).map(([key, value]) => [key, coloured(value)]));
}

function chartConfig() {
  const [ink, muted, line] = ["--ink", "--muted", "--line"].map(colourOf);
  const font = getComputedStyle(document.body).fontFamily;
  const axis = {
    labelColor: muted, titleColor: ink, gridColor: line, domainColor: muted, tickColor: muted, labelFontSize: 12, titleFontSize: 13,
    titleFontWeight: "normal", labelFont: font, titleFont: font, labelOverlap: true,
  };
  return { background: null, axis, view: { stroke: null }, lineBreak: "\n" };
}

function showTip(handler, event, item, value) {
  const tip = byId("tip");
  tip.hidden = !value;
  if (!value) return;
  tip.replaceChildren(
    ...Object.entries(value).flatMap(([name, told]) => [element("dt", {}, name), element("dd", {}, String(told))]),
  );
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, room))}px`;
  const below = event.clientY + 18;
  const fits = below + tip.offsetHeight < window.innerHeight;
  tip.style.top = `${fits ? below : event.clientY - tip.offsetHeight - 12}px`;
}

const views = new Map();

async function draw(place, charts) {
  const name = place.dataset.chart;
  const drawn = views.get(name);
  const shown = drawn ? drawn.signal("shown") : charts[name].params[0].value;
  const compiled = vegaLite.compile(coloured(charts[name]), { config: chartConfig() });
  drawn?.finalize();
  const view = new vega.View(vega.parse(compiled.spec), { renderer: "svg", container: place, hover: true });
  views.set(name, view);
  view.tooltip(showTip).signal("shown", shown);
  await view.runAsync();
  place.dataset.drawn = "yes";
}

/** As Vega draws the shapes of these names. */
const SYMBOLS = {
  circle: "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z",
  square: "M-4.5-4.5h9v9h-9Z",
  diamond: "M0-6L5.5 0L0 6L-5.5 0Z",
  "triangle-up": "M0-5.5L5.5 4.5H-5.5Z",
  "triangle-down": "M0 5.5L5.5-4.5H-5.5Z",
  "triangle-right": "M5.5 0L-4.5 5.5V-5.5Z",
  "triangle-left": "M-5.5 0L4.5 5.5V-5.5Z",
  cross: "M-2-5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5Z",
  wedge: "M0-5.5L2.5 4.5H-2.5Z",
  arrow: "M0-5.5L4 0H1.5V5.5H-1.5V0H-4Z",
};

/** A small picture of a series' mark, for its legend. */
function mark(series) {
  const svg = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(svg, "svg");
  drawing.setAttribute("viewBox", "-11 -8 22 16");
  drawing.setAttribute("aria-hidden", "true");
  for (const [tag, set] of [
    ["line", { x1: -11, x2: 11, y1: 0, y2: 0, "stroke-dasharray": series.dash.join(" "), opacity: 0.5 }],
    ["path", { d: SYMBOLS[series.shape], fill: series.filled ? `var(${series.colour})` : "var(--card)" }],
  ]) {
    const made = document.createElementNS(svg, tag);
    for (const [name, value] of Object.entries(set)) made.setAttribute(name, value);
    made.setAttribute("stroke", `var(${series.colour})`);
    made.setAttribute("stroke-width", "2");
    drawing.append(made);
  }
  return drawing;
}

/** Boxes that say which series the charts of a group draw. */
function legend(place, { series, shown, charts }) {
  const boxes = series.map((its) => {
    const box = element("input", { type: "checkbox", value: its.name, checked: shown.includes(its.name) });
    return [box, element("label", {}, box, mark(its), element("span", {}, its.name))];
  });
  const apply = () => {
    const chosen = boxes.map(([box]) => box).filter((box) => box.checked).map((box) => box.value);
    for (const chart of charts) views.get(chart).signal("shown", chosen).run();
  };
  const all = (checked) => () => {
    for (const [box] of boxes) box.checked = checked;
    apply();
  };
  place.addEventListener("change", apply);
  place.append(element("legend", {}, "shown"), ...boxes.map(([, label]) => label));
  if (series.length > 3) {
    const buttons = [["all", true], ["none", false]].map(([text, checked]) => {
      const button = element("button", { type: "button" }, text);
      button.addEventListener("click", all(checked));
      return button;
    });
    place.append(element("span", { class: "buttons" }, ...buttons));
  }
}

async function drawCharts() {
  const { charts, legends } = jsonOf("charts");
  const places = [...document.querySelectorAll("[data-chart]")];
  for (const place of places) await draw(place, charts);
  for (const place of document.querySelectorAll("[data-legend]")) legend(place, legends[place.dataset.legend]);
  for (const choice of document.querySelectorAll("[data-axis]")) {
    choice.addEventListener("change", () => {
      for (const place of document.querySelectorAll(`[data-axis-of="${choice.name}"]`)) {
        place.hidden = place.dataset.axisIs !== choice.value;
      }
      window.dispatchEvent(new Event("resize")); // what was hidden had no width
    });
  }
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", async () => {
    for (const place of places) await draw(place, charts);
  });
}

// Episodes

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

const most = (values) => values.reduce((highest, value) => Math.max(highest, value ?? -Infinity), -Infinity);

class Viewer {
  constructor(data) {
    this.data = data;
    this.who = data.headline;
    this.games = [];
    this.game = 0;
    this.turn = 0;
    this.controls = Object.fromEntries(["who", "outcome", "type", "order"].map((name) => [name, byId(`episode-${name}`)]));
    this.fillControls();
    for (const control of Object.values(this.controls)) control.addEventListener("change", () => this.select());
    byId("episodes").addEventListener("keydown", (event) => this.key(event));
    this.select();
  }

  fillControls() {
    const { policies, games, headline } = this.data;
    const options = (values, chosen) => values.map(([value, text]) => element("option", { value, selected: value === chosen }, text));
    this.controls.who.append(...options(policies.map(({ name }) => [name, name]), headline));
    const types = [...new Set(games.map((game) => game.type))].sort();
    this.controls.type.append(...options([["", "all"], ...types.map((type) => [type, words(type)])]));
  }

  /** The rows of `would` belong to the chosen router's episodes alone. */
  would(game) {
    return this.who === this.data.headline ? game.would : undefined;
  }

  /** Whether a game passes the filters. */
  passes(game) {
    const { outcome, type } = this.controls;
    const won = (policy) => game.episodes[policy].won;
    const { high, low } = this.data;
    const passes = {
      all: true,
      "lost-high-won": !won(this.who) && won(high),
      "won-high-lost": won(this.who) && !won(high),
      "won-low-lost": won(this.who) && !won(low),
      lost: !won(this.who),
      won: won(this.who),
    };
    return passes[outcome.value] && (!type.value || game.type === type.value);
  }

  /** What games are ordered by, the highest first. */
  rank(game) {
    const episode = game.episodes[this.who];
    switch (this.controls.order.value) {
      case "switches": return episode.switches;
      case "divergence": return most((this.would(game) ?? []).map((step) => most(step.map(([, , kl]) => kl))));
      case "probability": return most(episode.steps.map(([, , , exceedance]) => exceedance[0]));
      case "steps": return episode.steps.length;
      default: return 0;
    }
  }

  select() {
    this.who = this.controls.who.value;
    const only = this.controls.order.querySelector("[value=divergence]");
    only.disabled = this.who !== this.data.headline;
    if (only.disabled && only.selected) this.controls.order.value = "number";
    const ranked = this.data.games.filter((game) => this.passes(game)).map((game) => [this.rank(game), game]);
    ranked.sort(([one], [other]) => other - one || 0);
    this.games = ranked.map(([, game]) => game);
    this.game = this.turn = 0;
    byId("episode-count").textContent = `${this.games.length} of ${this.data.games.length} games`;
    this.showList();
    this.show();
  }

  showList() {
    const list = byId("episode-list");
    list.replaceChildren(
      ...this.games.map((game, index) => {
        const { won, steps, switches } = game.episodes[this.who];
        const button = element(
          "button", { type: "button", "data-game": game.id },
          element("span", { class: won ? "won" : "lost" }, won ? "✓ won" : "✗ lost"),
          element("span", { class: "name" }, game.texts[game.task]),
          element("small", {}, `${steps.length} steps, ${switches} switches`),
        );
        button.addEventListener("click", () => this.go(index, 0));
        return element("li", {}, button);
      }),
    );
  }

  go(game, turn, focus = null) {
    if (game < 0 || game >= this.games.length) return;
    this.game = game;
    const last = this.games[game].episodes[this.who].steps.length - 1;
    this.turn = Math.max(0, Math.min(turn, last));
    this.show();
    const target = { list: '#episode-list [aria-current="true"]', steps: '#episode-steps [aria-current="step"]' }[focus];
    if (target) document.querySelector(target).focus({ preventScroll: focus === "steps" });
  }

  key(event) {
    if (["SELECT", "INPUT"].includes(event.target.tagName) || event.target.closest(".text")) return; // those scroll
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const within = event.target.closest("#episode-list") ? "list" : "steps";
    const last = this.games[this.game]?.episodes[this.who].steps.length - 1;
    const move = {
      ArrowUp: () => this.go(this.game - 1, 0, within),
      ArrowDown: () => this.go(this.game + 1, 0, within),
      ArrowLeft: () => this.go(this.game, this.turn - 1, within),
      ArrowRight: () => this.go(this.game, this.turn + 1, within),
      Home: () => this.go(this.game, 0, within),
      End: () => this.go(this.game, last, within),
    }[event.key];
    if (!move || !this.games.length) return;
    event.preventDefault();
    move();
  }

  show() {
    const game = this.games[this.game];
    byId("episode").hidden = !game;
    byId("episode-none").hidden = Boolean(game);
    if (!game) return;
    for (const [index, { firstChild: button }] of [...byId("episode-list").children].entries()) {
      button.setAttribute("aria-current", String(index === this.game));
      button.tabIndex = index === this.game ? 0 : -1;
      if (index === this.game) {
        const list = byId("episode-list");
        const [top, bottom] = [button.offsetTop - list.offsetTop, button.offsetTop - list.offsetTop + button.offsetHeight];
        if (top < list.scrollTop) list.scrollTop = top;
        if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
      }
    }
    byId("episode-task").textContent = game.texts[game.task];
    byId("episode-game").textContent = `${words(game.type)}, ${game.id}`;
    this.showPolicies(game);
    this.showSteps(game);
    this.showStep(game);
  }

  showPolicies(game) {
    byId("episode-policies").replaceChildren(
      ...this.data.policies.filter(({ name }) => name in game.episodes).map(({ name }) => {
        const { won, steps, cost, outgrown } = game.episodes[name];
        const dear = steps.filter(([, , rung]) => rung === 0).length;
        const button = element("button", { type: "button", "aria-pressed": String(name === this.who) }, name);
        button.addEventListener("click", () => this.change(name));
        return element(
          "tr", {}, element("th", { scope: "row" }, button),
          element("td", { class: won ? "won" : "lost" }, won ? "✓ won" : outgrown ? "✗ no room left" : "✗ lost"),
          element("td", {}, String(steps.length)), element("td", {}, String(dear)), element("td", {}, cost.toFixed(2)),
        );
      }),
    );
  }

  /** The same game, played by another policy. */
  change(name) {
    const { id } = this.games[this.game];
    this.controls.who.value = name;
    this.select();
    const index = this.games.findIndex((game) => game.id === id);
    if (index >= 0) this.go(index, 0);
    byId("episode-policies").querySelector('[aria-pressed="true"]')?.focus({ preventScroll: true });
  }

  differs(game, turn) {
    const step = this.would(game)?.[turn];
    return Boolean(step) && new Set(step.map(([command]) => command)).size > 1;
  }

  showSteps(game) {
    const { route } = this.data;
    byId("episode-steps").replaceChildren(
      ...game.episodes[this.who].steps.map(([, , rung], turn) => {
        const differs = this.differs(game, turn);
        const said = `turn ${turn}: ${route[rung]} acted${differs ? ", the precisions differ" : ""}`;
        const height = route.length > 1 ? 1 - rung / (route.length - 1) : 1;
        const button = element("button", {
          type: "button", "aria-label": said, title: said, tabindex: turn === this.turn ? "0" : "-1", style: `--level: ${height}`,
          "aria-current": turn === this.turn ? "step" : null, class: differs ? "differs" : null,
        }, String(turn));
        button.addEventListener("click", () => this.go(this.game, turn, "steps"));
        return element("li", {}, button);
      }),
    );
  }

  showStep(game) {
    const { route, headline } = this.data;
    const episode = game.episodes[this.who];
    const { steps } = episode;
    const [command, shown, rung, exceedance] = steps[this.turn];
    const seen = this.turn ? steps[this.turn - 1][1] : game.opening;
    const last = this.turn === steps.length - 1;
    byId("step-title").textContent = `Turn ${this.turn}${last ? ", the last" : ""}: ${route[rung]} acts`;
    byId("step-seen").textContent = game.texts[seen];
    byId("step-shown").textContent = game.texts[shown];
    byId("step-end").textContent = last ? this.ending(episode) : "";
    const would = this.would(game)?.[this.turn];
    byId("step-choices").replaceChildren(
      ...route.map((name, index) => {
        const [its, margin, kl] = would?.[index] ?? [index === rung ? command : null, null, null];
        const text = its === null ? element("span", { class: "note" }, "not known") : element("code", {}, game.texts[its]);
        const acts = index === rung;
        return element(
          "tr", { class: acts ? "chosen" : null }, element("th", { scope: "row" }, acts ? `${name} ◀ acts` : name), element("td", {}, text),
          element("td", {}, margin === null ? "–" : margin.toFixed(3)), element("td", {}, kl === null ? "–" : kl.toPrecision(3)),
        );
      }),
    );
    byId("step-acted").textContent = game.texts[command];
    byId("step-unknown").hidden = Boolean(would);
    byId("step-unknown").textContent = `What the others would do was measured on the episodes of ${headline} alone.`;
    byId("step-probabilities").replaceChildren(
      ...exceedance.map((probability, index) => {
        const of = route.length === 2 ? `probability of ${route[0]}` : `probability of ${route[index]}${index ? " or dearer" : ""}`;
        const bar = element("span", { class: "bar", "aria-hidden": true }, element("span", { style: `width: ${percent(probability)}` }));
        const threshold = this.data.thresholds[this.who];
        const over = threshold === undefined ? "" : ` (threshold ${threshold.toFixed(3)})`;
        return element("p", {}, `${of}: ${probability.toFixed(3)} `, bar, over);
      }),
    );
  }

  ending({ won, reward, outgrown }) {
    if (won) return "The goal is reached: won.";
    const score = reward > 0 ? `, with a reward of ${reward.toFixed(2)}` : "";
    return outgrown ? "There is no room for another step in the transcript: lost." : `Here the episode ends: lost${score}.`;
  }
}

async function main() {
  await drawCharts();
  if (byId("games")) new Viewer(await unpacked("games"));
  document.documentElement.dataset.ready = "yes";
}

main();
