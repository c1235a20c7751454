// Fitting `router_bias` and `expert_mask` to a few texts of the visitor, with forward passes only.
//
// The search, its steps and its rule for keeping the result are those of molehill_edge/personalise.py.

import { Refusal } from './bytes.js';
import { argmax, softmax } from './classify.js';
import { usable } from './gates.js';
import { permutation, seeded } from './random.js';

const FEWEST = 4; // texts
const HELD_OUT = 0.3;
const [SHARED, OWN] = [1.0, 0.5]; // how far a bias is expected to go
const ENOUGH = 16; // texts to fit, from which on every router gets a bias of its own
const [STEP, SMALLEST_STEP] = [1.0, 0.2];
const GAIN = 1e-4; // of the loss; less is rounding
const PROXY_MARGIN = 0.1; // without labels, surer answers are only a sign of better ones

/**
 * Fit the gate in use to texts.
 *
 * @param {Engine} engine
 * @param {{text, label}[]} rows  all with a label, or none
 * @param {{seed, budget, progress}} how  `budget` is how many times the texts may be read
 * @returns {{gate, kept, before, after, fitted, heldOut, evaluations, dropped}}
 */
export async function personalise(engine, rows, { seed = 0, budget = 80, progress = () => {} } = {}) {
  const { manifest, gate: start } = engine;
  if (!manifest.routers.length) throw new Refusal('the bundle has no router to fit.');
  const labelled = !engine.causal && rows.some((row) => row.label);
  if (labelled && !rows.every((row) => row.label)) throw new Refusal('some texts have a label and others none: give all of them one.');
  const odd = labelled && rows.find((row) => !manifest.task.labels.includes(row.label));
  if (odd) throw new Refusal(`this version of the bundle has no label ${odd.label}: remove the text, or add it with another.`);
  const random = seeded(seed);
  const [fit, held] = split(rows, random).map((part) => new Loss(engine, part, labelled));
  const search = new Search(manifest, start, fit, random, budget, progress);
  await search.run();
  const [before, after] = [await held.score(start), await held.score(search.best)];
  const margin = engine.causal || labelled ? 0 : PROXY_MARGIN * Math.abs(before.loss);
  const better = after.loss <= before.loss - margin && (after.accuracy ?? 0) >= (before.accuracy ?? 0);
  const kept = better && search.best !== start;
  const may = usable(manifest);
  const lost = manifest.numbers.filter((_, i) => may[i] && start.mask[i] && !search.best.mask[i]);
  return {
    gate: kept ? { ...search.best, name: `${start.name}, personalised` } : start,
    kept, before, after,
    fitted: fit.rows.length, heldOut: held.rows.length, evaluations: search.used,
    dropped: [...new Set(lost.map(({ slot }) => manifest.slots[slot].id))].sort(),
  };
}

/** The loss of a gate on some texts. */
export class Loss {
  constructor(engine, rows, labelled) {
    const { maxLength, labels } = engine.manifest.task;
    Object.assign(this, { engine, rows, labelled });
    this.read = rows
      .map(({ text, label }) => ({ ids: engine.causal ? engine.tokens.begun(text, true).slice(0, maxLength) : engine.tokens.whole(text, maxLength).ids, label: labels.indexOf(label) }))
      .filter(({ ids }) => !engine.causal || ids.length > 1);
    if (!this.read.length) throw new Refusal('no text has more than one token: give longer texts.');
  }

  async score(gate) {
    const feeds = this.engine.feeds(gate);
    return this.engine.causal ? this.#likelihood(feeds) : this.#classes(feeds);
  }

  async #classes(feeds) {
    const all = [];
    for (const { ids } of this.read) all.push(softmax(await this.engine.logits(ids, feeds)).map((p) => Math.max(p, 1e-12)));
    const mean = (numbers) => numbers.reduce((a, b) => a + b, 0) / numbers.length;
    if (this.labelled) {
      const right = all.map((p, i) => p[this.read[i].label]);
      const hits = all.map((p, i) => (argmax(p) === this.read[i].label ? 1 : 0));
      return { loss: mean(right.map((p) => -Math.log(p))), accuracy: mean(hits) };
    }
    const entropy = (p) => -p.reduce((sum, each) => sum + each * Math.log(each), 0);
    const together = all[0].map((_, i) => mean(all.map((p) => p[i])));
    return { loss: mean(all.map(entropy)) - entropy(together), accuracy: null };
  }

  async #likelihood(feeds) {
    let [total, count] = [0, 0];
    for (const { ids } of this.read) {
      const { logits } = await this.engine.run(ids, ['logits'], { feeds, cache: this.engine.noCache(), from: 0 });
      const width = logits.dims.at(-1);
      for (let i = 0; i + 1 < ids.length; i++) {
        const row = logits.data.subarray(i * width, (i + 1) * width);
        const most = row.reduce((a, b) => Math.max(a, b), -Infinity);
        total += Math.log(row.reduce((sum, z) => sum + Math.exp(z - most), 0)) - (row[ids[i + 1]] - most);
        count++;
      }
    }
    return { loss: total / count, accuracy: null };
  }
}

/** One search, from a gate to a better one. */
class Search {
  constructor(manifest, start, loss, random, budget, progress) {
    Object.assign(this, { manifest, start, loss, random, budget, progress, best: start, used: 0 });
    const may = usable(manifest);
    this.slots = manifest.numbers.map(({ slot }) => slot);
    this.known = [...new Set(this.slots.filter((_, i) => may[i] && start.mask[i]))].sort((a, b) => a - b);
  }

  /** Shared biases, then experts left out, then biases of every router. */
  async run() {
    this.value = await this.#measure(this.start);
    const { routers, numbers } = this.manifest;
    const own = routers.length > 1 && this.loss.rows.length >= ENOUGH;
    const shared = this.known.map((slot) => this.slots.map((each) => each === slot));
    await this.#coordinates(shared, SHARED, Math.floor((this.budget * (own ? 5 : 7)) / 10));
    await this.#drop(Math.floor((this.budget * (own ? 7 : 10)) / 10));
    if (!own) return;
    const each = routers.flatMap((_, router) => this.known.map((slot) => numbers.map((n) => n.slot === slot && n.router === router)));
    await this.#coordinates(each.filter((direction) => direction.some(Boolean)), OWN, this.budget);
  }

  async #measure(gate) {
    this.progress(++this.used, this.budget);
    await new Promise((resolve) => setTimeout(resolve)); // the page draws
    return (await this.loss.score(gate)).loss;
  }

  /** Move along one direction at a time, and pull all of them to 0. */
  async #coordinates(directions, spread, until) {
    const origin = this.best;
    let point = directions.map(() => 0);
    const moves = directions.map(() => 1);
    const at = (where) => ({
      ...origin,
      bias: origin.bias.map((bias, n) => bias + where.reduce((sum, far, i) => sum + (directions[i][n] ? far : 0), 0)),
    });
    let step = STEP * spread;
    let value = this.value; // with what the distance costs
    let moved = true;
    while (this.used < until && (moved || step > SMALLEST_STEP * spread)) {
      if (!moved) step /= 2;
      moved = false;
      for (const i of permutation(directions.length, this.random)) {
        for (let turn = 0; turn < 2 && this.used < until; turn++) {
          const there = point.with(i, point[i] + moves[i] * step);
          const loss = await this.#measure(at(there));
          const cost = there.reduce((sum, far) => sum + far ** 2, 0) / (2 * spread ** 2 * this.loss.rows.length);
          if (loss + cost < value - GAIN) {
            [point, value, moved] = [there, loss + cost, true];
            [this.best, this.value] = [at(point), loss];
            break;
          }
          moves[i] = -moves[i];
        }
      }
    }
  }

  /** Leave out experts that only harm. */
  async #drop(until) {
    const price = 1 / (2 * this.loss.rows.length); // as much as a bias of one standard deviation
    const { routers, numbers } = this.manifest;
    for (const i of permutation(this.known.length, this.random)) {
      const slot = this.known[i];
      const mask = this.best.mask.map((bit, n) => (this.slots[n] === slot ? 0 : bit));
      const left = routers.every((_, router) => numbers.some((n, at) => n.router === router && mask[at] && this.known.includes(n.slot)));
      if (this.used >= until || !left) continue;
      const gate = { ...this.best, mask };
      const loss = await this.#measure(gate);
      if (loss < this.value - price - GAIN) [this.best, this.value] = [gate, loss];
    }
  }
}

/** Texts to fit and texts to hold out; equal texts are on one side. */
function split(rows, random) {
  const found = new Map();
  for (const row of rows) found.set(row.text, [...(found.get(row.text) ?? []), row]);
  const groups = [...found.values()];
  if (groups.length < FEWEST) throw new Refusal(`${groups.length} different texts, where at least ${FEWEST} are needed.`);
  const order = permutation(groups.length, random);
  const count = Math.max(2, Math.round(HELD_OUT * groups.length));
  return [order.slice(count), order.slice(0, count)].map((part) => part.sort((a, b) => a - b).flatMap((i) => groups[i]));
}
