// Tokens of texts, as the device's tokenizer makes them.

import { Refusal } from './bytes.js';

const TRIAL = 'A trial: 1, 2 and \u00e9.';

export class Tokens {
  /** @param {object} about  tokenizer.json; truncation and padding in it do not count */
  constructor(Tokenizer, about) {
    try {
      this.inner = new Tokenizer({ ...about, truncation: null, padding: null }, { clean_up_tokenization_spaces: false });
      this.decode(this.plain(TRIAL)); // much of what is wrong with one shows only in use
    } catch (error) {
      throw new Refusal(`this page has no tokenizer like the bundle's: ${String(error?.message ?? error).slice(0, 200)}`);
    }
  }

  /** Ids without special tokens around them. */
  plain(text) {
    return this.inner.encode(text, { add_special_tokens: false }).ids;
  }

  /** Ids of a text, and how many special ones stand after it. */
  #around(text) {
    const { ids } = this.inner.encode(text, { add_special_tokens: true });
    const inside = this.plain(text);
    for (let before = 0; before + inside.length <= ids.length; before++) {
      if (inside.every((id, i) => ids[before + i] === id)) return { ids, before, after: ids.length - before - inside.length };
    }
    return { ids, before: 0, after: 0 };
  }

  /** Ids of a text to classify: one that is too long loses its end, and keeps its special tokens. */
  whole(text, most) {
    const { ids, after } = this.#around(text);
    if (!ids.length) throw new Refusal('the text has no tokens.');
    return { ids: ids.length <= most ? ids : [...ids.slice(0, most - after), ...ids.slice(ids.length - after)], cut: ids.length > most };
  }

  /** Ids of a text that goes on: without special tokens at its end. */
  begun(text, special) {
    const { ids, after } = special ? this.#around(text) : { ids: this.plain(text), after: 0 };
    const kept = ids.slice(0, Math.max(1, ids.length - after));
    if (!kept.length) throw new Refusal('the text has no tokens.');
    return kept;
  }

  /** The text of ids, without special ones. */
  decode(ids) {
    return ids.length ? this.inner.decode(ids, { skip_special_tokens: true }) : '';
  }
}
