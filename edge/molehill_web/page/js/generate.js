// Answers of a causal LM, token by token: the cache of keys and values, and text as it comes.

import { Refusal } from './bytes.js';
import { sample } from './sampling.js';
import { seeded } from './random.js';

const CHUNK = 128; // tokens read at once: the page draws between two of them
const LOGITS = 1 << 22; // numbers of one chunk's logits: 16 MB
const ANSWER = 256; // tokens of an answer when nobody says how many
const BROKEN = '\ufffd';

/** Keys and values of the tokens read so far. */
export class Cache {
  constructor(engine) {
    this.engine = engine;
    this.cut();
  }

  /** Forget all tokens after the first `length`; none of them counts after another gate. */
  cut(length = 0) {
    this.arrays = length ? shortened(this.engine.runtime.Tensor, this.arrays, length) : this.engine.noCache();
    this.ids = length ? this.ids.slice(0, length) : [];
    this.changes = this.engine.changes;
  }

  /** Read on until all of `ids` are in the cache; returns the logits after the last. */
  async read(ids) {
    const { engine } = this;
    const { maxLength, generation } = engine.manifest.task;
    if (ids.length > maxLength) throw new Refusal(`${ids.length} tokens, where ${maxLength} fit: give a shorter text.`);
    if (this.changes !== engine.changes) this.cut();
    const differs = this.ids.findIndex((id, i) => i === ids.length - 1 || id !== ids[i]);
    if (differs >= 0) this.cut(differs);
    const chunk = Math.max(1, Math.min(CHUNK, Math.floor(LOGITS / generation.vocabulary)));
    let logits;
    while (this.ids.length < ids.length) {
      const part = ids.slice(this.ids.length, this.ids.length + chunk);
      logits = await this.#feed(part);
    }
    return logits;
  }

  async #feed(part) {
    const names = Object.keys(this.arrays).map((name) => name.replace('past_key_values', 'present'));
    const found = await this.engine.run(part, ['logits', ...names], { past: this.ids.length, cache: this.arrays });
    const arrays = {};
    for (const name of names) arrays[name.replace('present', 'past_key_values')] = found[name];
    [this.ids, this.arrays] = [[...this.ids, ...part], arrays];
    await new Promise((resolve) => setTimeout(resolve));
    return found.logits.data.slice(-found.logits.dims.at(-1));
  }
}

/** Keys and values [1, heads, tokens, size] of the first tokens. */
function shortened(Tensor, arrays, length) {
  const made = {};
  for (const [name, { data, dims: [one, heads, tokens, size] }] of Object.entries(arrays)) {
    const kept = new Float32Array(heads * length * size);
    for (let head = 0; head < heads; head++) {
      kept.set(data.subarray(head * tokens * size, (head * tokens + length) * size), head * length * size);
    }
    made[name] = new Tensor('float32', kept, [one, heads, length, size]);
  }
  return made;
}

/** Turns tokens into text as they come, never showing part of a character. */
class Text {
  constructor(tokens) {
    Object.assign(this, { tokens, ids: [], shown: 0, begin: 0 });
  }

  push(id) {
    this.ids.push(id);
    const text = this.#rest();
    if (!text || text.endsWith(BROKEN)) return '';
    [this.begin, this.shown] = [this.shown, this.ids.length];
    return text;
  }

  flush() {
    const text = this.#rest();
    this.begin = this.shown = this.ids.length;
    return text.replace(/\ufffd+$/, '');
  }

  #rest() {
    const before = this.tokens.decode(this.ids.slice(this.begin, this.shown));
    return this.tokens.decode(this.ids.slice(this.begin)).slice(before.length);
  }
}

/**
 * Answer a prompt; yields pieces of text.
 *
 * @param {Cache} cache  what was read before is not read again
 * @param {number[]} ids  the prompt
 * @param {{maxNewTokens, temperature, topK, topP, seed}} how
 * @param {AbortSignal} signal  ends the answer
 */
export async function* answer(cache, ids, how, signal) {
  const { engine } = cache;
  const { maxLength, generation } = engine.manifest.task;
  if (ids.length + 1 > maxLength) throw new Refusal(`the prompt has ${ids.length} tokens, where ${maxLength} fit: begin a new conversation.`);
  const most = Math.min(how.maxNewTokens ?? ANSWER, maxLength - ids.length);
  const text = new Text(engine.tokens);
  const random = seeded(how.seed ?? Math.floor(Math.random() * 2 ** 32));
  const all = [...ids];
  for (let drawn = 0; drawn < most && !signal?.aborted; drawn++) {
    const token = sample(await cache.read(all), how, random);
    all.push(token);
    if (generation.eos.includes(token)) break;
    const piece = text.push(token);
    if (piece) yield piece;
  }
  const rest = text.flush();
  if (rest) yield rest;
}

/** A conversation. */
export class Chat {
  constructor(engine, prompts) {
    Object.assign(this, { engine, prompts, cache: new Cache(engine), messages: [] });
  }

  /** Say something; yields the answer, which becomes part of the conversation as far as it came. */
  async *say(content, how = {}, signal) {
    const turn = { role: 'user', content };
    const system = how.system ? [{ role: 'system', content: how.system }] : [];
    const prompt = this.prompts.beforeAnswer([...system, ...this.messages, turn]);
    const ids = this.engine.tokens.begun(prompt, this.prompts.special);
    let said = '';
    try {
      for await (const piece of answer(this.cache, ids, how, signal)) {
        said += piece;
        yield piece;
      }
    } finally {
      if (said) this.messages.push(turn, { role: 'assistant', content: said });
    }
  }
}
