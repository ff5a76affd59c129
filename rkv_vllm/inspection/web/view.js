"use strict";
// The whole page: its controls, its legend and its panels.

class View {
  constructor(found, runs) {
    this.found = found;
    // The full cache comes last, so that settings are beside each other.
    this.full = runs[0];
    this.runs = [...runs.slice(1), this.full];
    this.stops = [0];
    const colour = (name) => {
      const sample = element("span", { className: name });
      document.body.append(sample);
      const [red, green, blue] = getComputedStyle(sample).backgroundColor.match(/\d+/g).map(Number);
      sample.remove();
      return (255 << 24) | (blue << 16) | (green << 8) | red;
    };
    this.colours = Array.from({ length: LEVELS + 1 }, (_, level) => colour(`s${level}`));
    this.laterColour = colour("later");
    byId("about").textContent = `${found.model} on ${found.device}, ${found.dtype} · ${found.layers} layers of `
      + `${found.heads} KV heads · prompt of ${number(found.prompt_tokens)} tokens`;
    byId("command").textContent = found.command;
    for (let level = 0; level <= LEVELS; level++) {
      const label = { 0: "0 %", 5: "50 %", 10: "100 %" }[level] ?? "\u00a0";
      byId("scale").append(element("span", { className: `s${level}`, title: `up to ${10 * level} %` }, label));
    }
    for (let i = 0; i < found.layers; i++) byId("layer").append(new Option(i, i));
    for (let i = 0; i < found.heads; i++) byId("head").append(new Option(i, i));
    this.slider = byId("time");
    this.slider.addEventListener("input", () => this.drawSoon());
    for (const id of ["layer", "head"]) byId(id).addEventListener("change", () => this.drawSoon());
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    window.addEventListener("resize", () => this.drawAll());
    this.panels = this.runs.slice(0, 2).map((_, index) => new Panel(this, index));
    if (this.runs.length > 2) {
      const full = new Panel(this, 2);
      full.choice.selectedIndex = this.runs.length - 1;
      this.panels.push(full);
    }
    byId("panels").append(...this.panels.map((panel) => panel.root));
    this.panels.forEach((panel) => panel.write());
    this.setStops();
  }

  get time() {
    return this.stops[this.slider.value];
  }

  // The layers and heads that are chosen, as rows.
  get rows() {
    const chosen = (id, count) => {
      const value = byId(id).value;
      return value === "all" ? [...Array(count).keys()] : [Number(value)];
    };
    const heads = chosen("head", this.found.heads);
    return chosen("layer", this.found.layers).flatMap((layer) => heads.map((head) => layer * this.found.heads + head));
  }

  // The runs whose first difference from the full cache is marked in a run's text: its own, or all that are shown.
  differences(run) {
    const marked = run === this.full ? this.panels.map((panel) => panel.run) : [run];
    return marked.filter((other) => other.first_difference !== null);
  }

  // Chooses one row, or all where it is the chosen one.
  choose(row) {
    const [layer, head] = [Math.floor(row / this.found.heads), row % this.found.heads];
    const chosen = byId("layer").value === String(layer) && byId("head").value === String(head);
    byId("layer").value = chosen ? "all" : layer;
    byId("head").value = chosen ? "all" : head;
    this.drawSoon();
  }

  // The slider stops before the first round of what is shown, at every round, and at the end.
  setStops() {
    const shown = this.panels.map((panel) => panel.run);
    const rounds = shown.flatMap((run) => run.rounds);
    const first = rounds.length ? [Math.min(...rounds) - 1] : [];
    this.length = Math.max(...shown.map((run) => run.tokens.length)); // maps of all have one scale
    const before = this.stops.length > 1 ? this.time : this.length;
    this.stops = [...new Set([...first, ...rounds, this.length])].sort((a, b) => a - b);
    this.slider.max = this.stops.length - 1;
    const nearest = this.stops.findLastIndex((stop) => stop <= before);
    this.slider.value = Math.max(nearest, 0);
    this.drawAll();
  }

  // Once a frame, however fast the slider moves.
  drawSoon() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.draw(); });
  }

  drawAll() {
    this.panels.forEach((panel) => panel.drawKl());
    this.draw();
  }

  draw() {
    const said = `after ${number(this.time)} tokens`;
    byId("now").textContent = `${said} (stop ${Number(this.slider.value) + 1} of ${this.stops.length})`;
    this.slider.setAttribute("aria-valuetext", said);
    this.panels.forEach((panel) => panel.draw());
  }
}

async function main() {
  const found = JSON.parse(byId("data").textContent);
  byId("data").remove();
  const runs = await Promise.all(found.runs.map((run) => Run.load(run, found)));
  window.view = new View(found, runs);
  document.body.dataset.ready = "yes";
}

main();
