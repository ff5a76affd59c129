"use strict";
// What the cache held of one request. The data are those of `--json`; rkv_vllm/inspection/report.py describes them.

// In place of how many hold a token: it is not written yet, or never was in any cache.
const LATER = -1;
const NEVER = -2;
const TYPES = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array };
const byId = (id) => document.getElementById(id);
const percent = (share) => `${Math.round(100 * share)} %`;
const number = (value) => value.toLocaleString("en");

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

async function unpack(packed) {
  if (!packed) return null;
  const text = atob(packed.data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new TYPES[packed.dtype](await new Response(stream).arrayBuffer());
}

// One request: what it wrote, and what of that its cache held when.
class Run {
  static async load(data, found) {
    const run = new Run();
    Object.assign(run, data, { rows: found.layers * found.heads, prompt: found.prompt_tokens, rounds: [] });
    run.cached = run.tokens.length - 1; // the last token was written and never read
    if (data.forgotten) {
      run.rounds = data.forgotten.rounds;
      for (const name of ["left", "importance", "redundancy", "match"]) {
        run[name] = await unpack(data.forgotten[name]);
      }
      run.noMatch = run.match && 2 ** (8 * run.match.BYTES_PER_ELEMENT) - 1;
    }
    return run;
  }

  get name() {
    if (!this.setting) return "full cache";
    const { policy, budget, buffer, protect } = this.setting;
    return `${policy}, budget ${budget}, buffer ${buffer}` + (protect ? `, ${protect} protected` : "");
  }

  // How many rounds there were when the text had so many tokens.
  roundsAt(time) {
    let count = 0;
    while (count < this.rounds.length && this.rounds[count] <= time) count++;
    return count;
  }

  // For each token how many of the rows hold it, or LATER, or NEVER.
  holders(time, rows) {
    const counts = new Int32Array(this.tokens.length).fill(rows.length);
    const round = this.roundsAt(time);
    if (this.left) {
      for (const row of rows) {
        const start = row * this.cached;
        for (let i = 0; i < this.cached; i++) {
          const left = this.left[start + i];
          if (left !== 0 && left <= round) counts[i]--;
        }
      }
    }
    return counts.fill(NEVER, this.cached).fill(LATER, Math.min(time, this.tokens.length));
  }

  // When it left, in words.
  leaving(cells) {
    const rounds = cells.map((cell) => this.left[cell]).filter((round) => round > 0).sort((a, b) => a - b);
    if (!rounds.length) return "never left";
    const at = (round) => `round ${round}, at ${number(this.rounds[round - 1])} tokens`;
    if (cells.length === 1) return `left in ${at(rounds[0])}`;
    const stayed = cells.length - rounds.length;
    const half = rounds[Math.floor((rounds.length - 1) / 2)];
    const when = rounds[0] === rounds.at(-1)
      ? at(rounds[0]) : `rounds ${rounds[0]} to ${rounds.at(-1)}, half of them by ${at(half)}`;
    return `left in ${when}` + (stayed ? `; ${stayed} hold it to the end` : "");
  }

  // What most of the cells match.
  newestSimilar(cells) {
    const { match, noMatch } = this;
    const matches = match ? cells.map((cell) => match[cell]).filter((found) => found !== noMatch) : [];
    if (!matches.length) return undefined;
    const times = new Map();
    for (const found of matches) times.set(found, (times.get(found) ?? 0) + 1);
    const [index, most] = [...times].reduce((a, b) => (b[1] > a[1] ? b : a));
    return { index, times: most, of: matches.length };
  }

  // The mean of the percentages that cells have of something; undefined where none has one.
  meanShare(name, cells) {
    const shares = this[name] ? cells.map((cell) => this[name][cell]).filter((share) => share !== 255) : [];
    return shares.length ? Math.round(shares.reduce((a, b) => a + b, 0) / shares.length) : undefined;
  }
}
