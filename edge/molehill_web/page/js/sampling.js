// Choosing the next token from logits, as molehill_edge/sampling.py does.

import { Refusal } from './bytes.js';

/** The next token. @param {{temperature, topK, topP}} how  temperature 0 takes the likeliest */
export function sample(logits, { temperature = 0, topK = 0, topP = 1 }, random) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (!Number.isFinite(logits[best])) throw new Refusal('the model answers with numbers that are not finite: use another gate.');
  if (temperature === 0) return best;
  let tokens = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b);
  if (topK > 0) tokens = tokens.slice(0, topK);
  const weights = tokens.map((token) => Math.exp((logits[token] - logits[best]) / temperature));
  const all = weights.reduce((a, b) => a + b, 0);
  let sum = 0;
  const enough = topP < 1 ? weights.findIndex((weight) => (sum += weight / all) >= topP) + 1 || weights.length : weights.length;
  const limit = random() * weights.slice(0, enough).reduce((a, b) => a + b, 0);
  let reached = 0;
  const drawn = weights.findIndex((weight, i) => i < enough && (reached += weight) > limit);
  return tokens[drawn < 0 ? enough - 1 : drawn];
}
