// What a browser keeps of a bundle: its files by SHA-256, and a few small things by name.

import { Refusal } from './bytes.js';

const PREFIX = 'molehill kept ';

/** A place to keep bytes by name, which ends with the visitor's data of this page. */
export class Storage {
  constructor(base = new URL('.', location.href)) {
    this.base = base;
    this.name = `${PREFIX}${base.pathname}`;
  }

  #url(name) {
    return new URL(`kept/${encodeURIComponent(name)}`, this.base).href;
  }

  async #cache() {
    return (this.opened ??= await caches.open(this.name));
  }

  async get(name) {
    const found = await (await this.#cache()).match(this.#url(name));
    return found ? new Uint8Array(await found.arrayBuffer()) : null;
  }

  async has(name) {
    return (await (await this.#cache()).match(this.#url(name))) !== undefined;
  }

  /** Keep bytes: whole or not at all. */
  async put(name, bytes) {
    try {
      await (await this.#cache()).put(this.#url(name), new Response(bytes));
    } catch (error) {
      if (error.name !== 'QuotaExceededError') throw error;
      throw new Refusal(`this browser gives the page no room for ${(bytes.length / 1e6).toFixed(1)} MB more: make room, or leave private mode.`);
    }
  }

  async remove(name) {
    await (await this.#cache()).delete(this.#url(name));
  }

  async names() {
    const keys = await (await this.#cache()).keys();
    return keys.map(({ url }) => decodeURIComponent(url.slice(url.lastIndexOf('/') + 1)));
  }

  /** Forget everything, the page itself as well. */
  async clear() {
    this.opened = undefined;
    const page = `molehill page ${this.base.pathname} `; // as the service worker calls it
    for (const name of await caches.keys()) if (name === this.name || name.startsWith(page)) await caches.delete(name);
  }
}
