"use strict";
// One of the columns: a request, or another that is chosen, with its facts, map, KL and text.

const LEVELS = 10; // of the colour scale, beside 0
const CHUNK = 256; // tokens from which a piece of text may end at a line's end

class Panel {
  constructor(view, index) {
    this.view = view;
    this.choice = element("select", { ariaLabel: `Setting of panel ${index + 1}` });
    view.runs.forEach((run, i) => this.choice.append(new Option(run.name, i)));
    this.choice.selectedIndex = index;
    this.facts = element("p", { className: "facts" });
    this.map = element("canvas", { className: "map" });
    this.map.setAttribute("role", "img");
    this.kl = element("canvas", { className: "kl" });
    this.klCaption = element("span", {});
    this.across = element("span", {});
    this.text = element("div", { className: "text", tabIndex: 0, ariaLabel: "Text" });
    this.text.setAttribute("role", "group");
    this.mapFigure = element(
      "figure", {},
      element("figcaption", {}, element("span", {}, "layers and KV heads, layer 0 on top"), this.across),
      this.map, this.kl, element("figcaption", {}, this.klCaption),
    );
    this.root = element("article", {}, element("h2", {}, this.choice), this.facts, this.mapFigure, this.text);
    this.choice.addEventListener("change", () => { this.write(); view.setStops(); });
    this.text.addEventListener("mouseover", (event) => this.follow(event, event.target.index));
    this.text.addEventListener("mouseleave", (event) => this.follow(event, undefined));
    this.text.addEventListener("blur", () => this.pointAt(undefined));
    this.text.addEventListener("keydown", (event) => this.step(event));
    for (const canvas of [this.map, this.kl]) {
      canvas.addEventListener("mousemove", (event) => this.pointAtMap(canvas, event));
      canvas.addEventListener("mouseleave", (event) => this.follow(event, undefined));
    }
    this.map.addEventListener("click", (event) => view.choose(this.rowAt(event)));
  }

  // Writes the text of the chosen run, in pieces that a browser need not lay out while they are not seen.
  write() {
    this.run = this.view.runs[this.choice.selectedIndex];
    this.mapFigure.hidden = !this.run.left;
    this.spans = this.run.tokens.map((token, index) => {
      const shown = token === "" ? "◌" : token.replaceAll("\n", "↵\n");
      return Object.assign(element("span", { className: "t" }, shown), { index });
    });
    this.classes = new Array(this.spans.length).fill("t");
    const pieces = [element("div", {})];
    this.spans.forEach((span, index) => {
      const piece = pieces.at(-1);
      piece.append(span);
      const full = piece.childNodes.length >= CHUNK && this.run.tokens[index].endsWith("\n");
      if (full) pieces.push(element("div", {}));
    });
    this.text.replaceChildren(...pieces);
    this.pointed = undefined;
  }

  draw() {
    const { time, rows } = this.view;
    const run = this.run;
    this.pointAt(undefined);
    const counts = run.holders(time, rows);
    const differs = new Set(this.view.differences(run).map((other) => other.first_difference));
    counts.forEach((count, index) => {
      const level = count < 0 || !run.left ? "" : ` s${Math.ceil((LEVELS * count) / rows.length - 1e-9)}`;
      let name = `t${count === LATER ? " later" : level}`;
      if (differs.has(index)) name += " differs";
      if (this.classes[index] !== name) this.spans[index].className = this.classes[index] = name;
    });
    this.facts.textContent = this.describe(counts);
    if (run.left) this.drawMap();
  }

  describe(counts) {
    const { time, rows } = this.view;
    const run = this.run;
    const written = Math.min(time, run.cached);
    const facts = [];
    if (run.left) {
      let held = 0;
      for (let i = 0; i < written; i++) held += counts[i];
      facts.push(`round ${run.roundsAt(time)} of ${run.rounds.length}`);
      const each = held / rows.length;
      facts.push(`holds ${number(Math.round(each))} of ${number(written)} tokens (${percent(each / written)})`);
    } else {
      facts.push(`holds all ${number(written)} tokens`);
    }
    if (run.setting && run.first_difference === null) facts.push("the answer is the full cache's");
    if (run.first_difference !== null) {
      facts.push(`the answer leaves the full cache's at token ${number(run.first_difference)}`);
    }
    if (run.kl) {
      const mean = run.kl.reduce((sum, kl) => sum + kl, 0) / run.kl.length;
      facts.push(`mean KL ${mean.toPrecision(2)} nats a token`);
    }
    return facts.join(" · ");
  }

  // A canvas of as many pixels as the screen has for it.
  begin(canvas) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.max(canvas.clientWidth * ratio, 1);
    canvas.height = Math.max(canvas.clientHeight * ratio, 1);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    return context;
  }

  drawMap() {
    const { run, map } = this;
    const { time, length, colours, laterColour } = this.view;
    const context = this.begin(map);
    const bins = Math.min(length, map.width);
    const image = new ImageData(bins, run.rows);
    const pixels = new Uint32Array(image.data.buffer);
    const round = run.roundsAt(time);
    for (let bin = 0; bin < bins; bin++) {
      const first = Math.floor((bin * length) / bins);
      const end = Math.min(Math.floor(((bin + 1) * length) / bins), run.cached);
      const written = Math.min(end, time) - first;
      for (let row = 0; row < run.rows; row++) {
        let held = 0;
        for (let i = row * run.cached + first; i < row * run.cached + first + written; i++) {
          if (run.left[i] === 0 || run.left[i] > round) held++;
        }
        const level = Math.ceil((LEVELS * held) / written - 1e-9);
        if (first < run.tokens.length) pixels[row * bins + bin] = written > 0 ? colours[level] : laterColour;
      }
    }
    const drawn = element("canvas", { width: bins, height: run.rows });
    drawn.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(drawn, 0, 0, map.clientWidth, map.clientHeight);
    context.fillStyle = "#d55e00";
    context.fillRect((run.prompt / length) * map.clientWidth, 0, 1, map.clientHeight);
    map.setAttribute("aria-label", `Tokens held by ${run.rows} layers and heads. ${this.facts.textContent}`);
  }

  drawKl() {
    const { run, kl: canvas } = this;
    const { length } = this.view;
    this.across.textContent = `tokens 0 to ${number(length - 1)} of the text →`;
    canvas.hidden = !run.kl;
    this.klCaption.textContent = "orange: end of the prompt";
    if (!run.kl) return;
    const most = run.kl.reduce((a, b) => Math.max(a, b), 0);
    this.klCaption.textContent += ` · bars: KL of each token, up to ${most.toPrecision(2)} nats`;
    const context = this.begin(canvas);
    const across = canvas.clientWidth / length;
    context.fillStyle = "#1b1f24";
    run.kl.forEach((kl, index) => {
      const height = most > 0 ? (kl / most) * canvas.clientHeight : 0;
      context.fillRect((run.prompt + index) * across, canvas.clientHeight - height, Math.max(across, 1), height);
    });
  }

  rowAt(event) {
    const { top, height } = this.map.getBoundingClientRect();
    const row = Math.floor(((event.clientY - top) / height) * this.run.rows);
    return Math.min(Math.max(row, 0), this.run.rows - 1);
  }

  pointAtMap(canvas, event) {
    const { left, width } = canvas.getBoundingClientRect();
    const index = Math.max(Math.floor(((event.clientX - left) / width) * this.view.length), 0);
    const rows = canvas === this.map ? [this.rowAt(event)] : this.view.rows;
    this.follow(event, index < this.run.tokens.length ? index : undefined, rows);
  }

  step(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const last = this.run.tokens.length - 1;
    const index = Math.min(Math.max((this.pointed ?? -1) + steps[event.key], 0), last);
    this.spans[index].scrollIntoView({ block: "nearest" });
    const { left, bottom } = this.spans[index].getBoundingClientRect();
    this.byKeys = true;
    this.pointAt(index, { clientX: left, clientY: bottom });
  }

  // Points where the mouse is. A text that scrolls or is coloured anew below a mouse that rests sends the same
  // events: they say nothing against the token that keys have chosen.
  follow(event, index, rows) {
    const rests = this.mouse?.x === event.clientX && this.mouse?.y === event.clientY;
    this.mouse = { x: event.clientX, y: event.clientY };
    if (this.byKeys && rests) return;
    this.byKeys = false;
    this.pointAt(index, event, rows);
  }

  // Marks a token, and the newest that was similar, and says what is known of it.
  pointAt(index, where, rows = this.view.rows) {
    const tip = byId("tip");
    const old = this.pointed;
    if (old !== undefined) this.spans[old].classList.remove("here");
    for (const span of this.text.querySelectorAll(".like")) span.classList.remove("like");
    this.pointed = index;
    tip.hidden = index === undefined;
    if (index === undefined) return;
    this.spans[index].classList.add("here");
    const known = this.know(index, rows);
    if (known.like !== undefined) this.spans[known.like].classList.add("like");
    tip.replaceChildren(...known.lines);
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.min(where.clientX + 12, window.innerWidth - width - 8)}px`;
    const above = where.clientY + 16 + height > window.innerHeight;
    tip.style.top = `${above ? where.clientY - height - 10 : where.clientY + 16}px`;
  }

  know(index, rows) {
    const { run } = this;
    const { time, found } = this.view;
    const say = (...words) => element("div", {}, ...words);
    const token = (i) => element("b", {}, JSON.stringify(run.tokens[i]));
    const lines = [say(token(index), ` token ${number(index)}, ${index < run.prompt ? "prompt" : "answer"}`)];
    for (const other of this.view.differences(run)) {
      if (other.first_difference !== index) continue;
      const [theirs, whose] = run === other ? [this.view.full, "the full cache"] : [other, other.name];
      const next = JSON.stringify(theirs.tokens[index] ?? "its end");
      lines.push(say(`here ${whose} goes on with `, element("b", {}, next)));
    }
    if (run.kl && index >= run.prompt) lines.push(say(`predicted with a KL of ${run.kl[index - run.prompt]} nats`));
    if (index >= run.cached) lines.push(say("the last token, which was never read"));
    if (!run.left || index >= run.cached) return { lines };
    const cells = rows.map((row) => row * run.cached + index);
    const held = cells.filter((cell) => run.left[cell] === 0 || run.left[cell] > run.roundsAt(time)).length;
    const one = rows.length === 1;
    if (one) lines.push(say(`layer ${Math.floor(rows[0] / found.heads)}, KV head ${rows[0] % found.heads}`));
    const share = `${held} of ${rows.length} layers and heads (${percent(held / rows.length)})`;
    if (index >= time) lines.push(say("not written yet"));
    else lines.push(say(one ? (held ? "held" : "forgotten") : `held by ${share}`));
    lines.push(say(run.leaving(cells)));
    const weighed = [];
    for (const [name, words] of [["importance", "more important"], ["redundancy", "more redundant"]]) {
      const mean = run.meanShare(name, cells);
      if (mean !== undefined) weighed.push(`${words} than ${mean} %`);
    }
    if (weighed.length) {
      lines.push(say(`when last a candidate ${weighed.join(" and ")} of them${one ? "" : ", on average"}`));
    }
    const like = run.newestSimilar(cells);
    if (like !== undefined) {
      const often = one ? "" : ` (in ${like.times} of ${like.of})`;
      lines.push(say("newest similar token: ", token(like.index), ` token ${number(like.index)}${often}`));
    }
    return { lines, like: like?.index };
  }

}
