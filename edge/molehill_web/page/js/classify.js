// Classes of texts, which experts a text used, and whether the bundle answers as where it was made.

import { Refusal } from './bytes.js';
import { usable } from './gates.js';

/** Probabilities of logits. */
export function softmax(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const weights = Array.from(logits, (logit) => Math.exp(logit - most));
  const sum = weights.reduce((a, b) => a + b, 0);
  if (!Number.isFinite(sum)) throw new Refusal('the model answers with numbers that are not finite: use another gate.');
  return weights.map((weight) => weight / sum);
}

export const argmax = (numbers) => numbers.reduce((best, number, i) => (number > numbers[best] ? i : best), 0);

/** {label, probability, probabilities, cut} of a text. */
export async function classify(engine, text) {
  const { labels, maxLength } = engine.manifest.task;
  const { ids, cut } = engine.tokens.whole(text, maxLength);
  const probabilities = softmax(await engine.logits(ids));
  const best = argmax(probabilities);
  return { label: labels[best], probability: probabilities[best], probabilities, cut, tokens: ids.length };
}

/** For every router {router, experts, shares}: how it weighed its experts over the tokens of a text, empty slots left out. */
export async function routes(engine, ids) {
  const { manifest } = engine;
  const names = manifest.routers.map((_, i) => `route.${i}`);
  if (!names.length) return [];
  const found = await engine.run(ids, names, { cache: engine.causal ? engine.noCache() : {} });
  return manifest.routers.map((router, i) => {
    const { data } = found[names[i]]; // [1, T|1, (H,) E]
    const width = router.slots.length;
    const sums = router.slots.map((_, e) => {
      let sum = 0;
      for (let at = e; at < data.length; at += width) sum += data[at];
      return sum / (data.length / width);
    });
    const kept = router.slots.map((slot, e) => e).filter((e) => manifest.slots[router.slots[e]].id);
    return { router: router.name, experts: kept.map((e) => manifest.slots[router.slots[e]].id), shares: kept.map((e) => sums[e]) };
  });
}

/** Mean share of each expert over the routers that know it: [[id, share]]. */
export function usage(manifest, reports) {
  const may = usable(manifest);
  const ids = new Set(manifest.numbers.filter((_, i) => may[i]).map(({ slot }) => manifest.slots[slot].id));
  return [...ids].map((id) => {
    const shares = reports.flatMap(({ experts, shares: of }) => (experts.includes(id) ? [of[experts.indexOf(id)]] : []));
    return [id, shares.reduce((a, b) => a + b, 0) / shares.length];
  });
}

const [EXACT, ROUNDED, FLIPS] = [1e-6, 2e-2, 0.1]; // as molehill_edge.golden has them

const LONG = 48; // tokens

/** Whether the golden inputs say anything of long texts, for which kernels are others; those of earlier versions do not. */
export const showsLong = ({ golden, task }) => golden.some(({ inputIds }) => inputIds.length >= Math.min(LONG, task.maxLength));

/** Whether a bundle with its own gate answers here as it did where it was made, read at once or `written` token by token. */
export async function check(engine, { written = false } = {}) {
  const { golden, quantisation } = engine.manifest;
  const feeds = engine.feeds(engine.default);
  let [error, same] = [0, 0];
  for (const { inputIds, logits: wanted, best } of golden) {
    const logits = await (written && inputIds.length > 1 ? engine.logitsAfterCache(inputIds, feeds) : engine.logits(inputIds, feeds));
    const mean = wanted.reduce((a, b) => a + b, 0) / wanted.length;
    const variance = wanted.reduce((sum, x) => sum + (x - mean) ** 2, 0) / wanted.length;
    const distance = wanted.reduce((sum, x, i) => sum + (x - logits[i]) ** 2, 0) / wanted.length;
    error = Math.max(error, distance / Math.max(variance, 1e-12));
    same += argmax(logits) === best;
  }
  const exact = [quantisation.base, quantisation.experts, quantisation.head || 'fp32'].every((kind) => kind === 'fp32');
  const agreement = golden.length ? same / golden.length : 1;
  return { passed: error <= (exact ? EXACT : ROUNDED) && agreement >= (exact ? 1 : 1 - FLIPS), inputs: golden.length, error, agreement };
}
