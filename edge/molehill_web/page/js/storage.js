// What a browser keeps of a bundle: its files by SHA-256, and a few small things by name.

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
    await (await this.#cache()).put(this.#url(name), new Response(bytes, { headers: { 'content-length': bytes.length } }));
  }

  async remove(name) {
    await (await this.#cache()).delete(this.#url(name));
  }

  async names() {
    const keys = await (await this.#cache()).keys();
    return keys.map(({ url }) => decodeURIComponent(url.slice(url.lastIndexOf('/') + 1)));
  }

  /** Forget everything. */
  async clear() {
    this.opened = undefined;
    await caches.delete(this.name);
  }
}
