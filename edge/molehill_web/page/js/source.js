// Where a bundle comes from, and what of it is kept: nothing is opened that was not checked, each time.

import { Refusal, hex, json, sha256, utf8 } from './bytes.js';
import { readManifest, validId } from './manifest.js';
import { Repository } from './tuf.js';

const MANIFEST = 'manifest.pb';
const MAX_MANIFEST = 2 << 20;
const [CURRENT, PINNED] = ['current', 'pinned'];
const blob = (digest) => `blob/${digest}`;
const list = (digest) => `list/${digest}`; // the signed list that named a manifest: the repository's moves on

/** Whether a failure is that of the network. */
export class Unreachable extends Refusal {}

/** A function that gets files below an address: at most so many bytes; null where the server has none. */
export function fetcher(base, progress = () => {}) {
  return async (path, limit) => {
    let response;
    try {
      response = await fetch(new URL(path, base), { cache: 'no-store', credentials: 'omit', redirect: 'error' });
    } catch {
      throw new Unreachable('the server cannot be reached.');
    }
    if (response.status === 404 || response.status === 403) return null;
    if (!response.ok) throw new Unreachable(`the server answers ${response.status} for ${path}.`);
    const [parts, reader] = [[], response.body.getReader()];
    let length = 0;
    try {
      for (let piece; !(piece = await reader.read()).done; ) {
        length += piece.value.length;
        if (length > limit) throw new Refusal(`refused a file that is longer than it may be: ${path}.`);
        parts.push(piece.value);
        progress(piece.value.length);
      }
    } catch (error) {
      if (error instanceof Refusal) throw error;
      throw new Unreachable(`the download of ${path} was cut.`);
    } finally {
      reader.cancel().catch(() => {});
    }
    const whole = new Uint8Array(length);
    let at = 0;
    for (const part of parts) {
      whole.set(part, at);
      at += part.length;
    }
    return whole;
  };
}

/** What both kinds of sources share: keeping a bundle, and opening what is kept. */
class Source {
  constructor(about, storage) {
    Object.assign(this, { about, storage });
    if (!validId(about.bundle)) throw new Refusal('site.json does not name a bundle.');
  }

  /** The manifest that bytes are, see `readManifest`. */
  read(bytes) {
    return readManifest(bytes, this.about.onnxruntime);
  }

  /** {version, manifest} of what is in use; null before the first download. */
  async current() {
    const kept = await this.storage.get(CURRENT);
    return kept && json(kept, CURRENT);
  }

  /** Get the newest version and use it from now on; what is in use stays when anything is refused. */
  async update(progress = () => {}) {
    const { bytes, get } = await this.newest(progress);
    const digest = await sha256(bytes);
    const manifest = this.read(bytes);
    if (manifest.id !== this.about.bundle) throw new Refusal(`what it shows as bundle ${this.about.bundle} is ${manifest.id}.`);
    const before = await this.current();
    this.admit(manifest, digest, before);
    const lacking = [];
    for (const file of manifest.files) {
      if (file.path.startsWith('genai') || file.path === 'tokenizer_config.json') continue; // of another program
      if (!(await this.storage.has(blob(hex(file.sha256))))) lacking.push(file);
    }
    const total = lacking.reduce((sum, file) => sum + file.length, 0);
    progress(0, total);
    for (const file of lacking) {
      const data = await get(file);
      if (!data || data.length !== file.length || (await sha256(data)) !== hex(file.sha256)) {
        throw new Refusal(`refused a file other than its manifest says: ${file.path}.`);
      }
      await this.storage.put(blob(hex(file.sha256)), data);
    }
    await this.storage.put(blob(digest), bytes);
    const proof = await this.seal(digest);
    await this.storage.put(CURRENT, utf8(JSON.stringify({ version: manifest.version, manifest: digest, ...proof })));
    await this.#sweep(manifest, digest);
    return { version: manifest.version, before: before?.version ?? null, bytes: total };
  }

  /** What is kept, every file checked again: {manifest, files} with the bytes by path. */
  async open() {
    const current = await this.current();
    if (!current) throw new Refusal('nothing is kept here yet.');
    const bytes = await this.#kept(current.manifest, MANIFEST);
    await this.vouch(bytes, current);
    const manifest = this.read(bytes);
    const files = new Map();
    for (const file of manifest.files) {
      if (await this.storage.has(blob(hex(file.sha256)))) files.set(file.path, await this.#kept(hex(file.sha256), file.path));
    }
    return { manifest, files };
  }

  async #kept(digest, path) {
    const bytes = await this.storage.get(blob(digest));
    if (!bytes || (await sha256(bytes)) !== digest) {
      await this.storage.remove(blob(digest));
      await this.storage.remove(CURRENT);
      throw new Refusal(`refused ${path}: it was changed in this browser. Load the page again to get it anew.`);
    }
    return bytes;
  }

  /** Remove the files of versions that are not in use. */
  async #sweep(manifest, digest) {
    const used = new Set([list(digest), ...[digest, ...manifest.files.map((file) => hex(file.sha256))].map(blob)]);
    for (const name of await this.storage.names()) {
      if (/^(blob|list)\//.test(name) && !used.has(name)) await this.storage.remove(name);
    }
  }
}

/** A bundle that lies beside the page, which names the SHA-256 of its manifest. */
export class Brought extends Source {
  get signed() {
    return false;
  }

  /** Whether the page means another version than the one in use. */
  async isStale() {
    return (await this.current())?.manifest !== this.about.manifest;
  }

  async newest(progress) {
    let done = 0;
    let total = 0;
    const report = (more) => progress((done += more), total);
    const bytes = await fetcher(new URL('bundle/', this.storage.base))(MANIFEST, MAX_MANIFEST);
    if (!bytes || (await sha256(bytes)) !== this.about.manifest) throw new Refusal(`refused a file other than the page's: ${MANIFEST}.`);
    total = this.read(bytes).files.reduce((sum, file) => sum + file.length, 0);
    const get = fetcher(new URL('bundle/', this.storage.base), report);
    return { bytes, get: (file) => get(file.path, file.length) };
  }

  admit() {} // the page says which

  async seal() {
    return {};
  }

  async vouch(bytes) {
    if ((await sha256(bytes)) !== this.about.manifest) throw new Refusal('the page is for another version of the bundle.');
  }
}

/** A bundle of a repository: what its owner has signed, and nothing older than what was seen. */
export class Signed extends Source {
  constructor(about, storage, pinned, now) {
    super(about, storage);
    this.pinned = pinned;
    const kept = { get: (name) => storage.get(`tuf/${name}`), put: (name, bytes) => storage.put(`tuf/${name}`, bytes) };
    const base = new URL(about.repository, storage.base);
    this.repository = new Repository(pinned, kept, fetcher(base), now);
    this.base = base;
  }

  get signed() {
    return true;
  }

  get target() {
    return `bundles/${this.about.bundle}/${MANIFEST}`;
  }

  /** Whether nothing is kept: newer versions come when the visitor asks, or at the next visit. */
  async isStale() {
    return (await this.current()) === null;
  }

  async newest(progress) {
    const first = (await this.storage.get(PINNED)) ?? this.pinned;
    this.repository.pinned = first;
    await this.repository.refresh();
    if (!(await this.repository.isKnownRoot(this.pinned))) {
      throw new Refusal('this page trusts another root than at the first visit: ask its owner, then remove its data.');
    }
    await this.storage.put(PINNED, first);
    const entry = this.repository.find(this.target);
    if (!entry || entry.length > MAX_MANIFEST) throw new Refusal(`the repository has no bundle ${this.about.bundle}.`);
    const bytes = await this.#read(entry, fetcher(this.base));
    let done = 0;
    const total = this.read(bytes).files.reduce((sum, file) => sum + file.length, 0);
    const read = fetcher(this.base, (more) => progress((done += more), total));
    const get = async (file) => {
      const found = await this.repository.findBlob(`blobs/${hex(file.sha256)}`);
      if (!found || found.length !== file.length || found.sha256 !== hex(file.sha256)) {
        throw new Refusal(`the signed list does not name ${file.path} as its manifest does.`);
      }
      return this.#read(found, read);
    };
    return { bytes, get };
  }

  admit(manifest, digest, before) {
    if (!before) return;
    if (manifest.version < before.version) throw new Refusal(`it shows version ${manifest.version}, older than the one in use.`);
    if (manifest.version === before.version && digest !== before.manifest) {
      throw new Refusal(`it shows another bundle as version ${manifest.version}, which is in use.`);
    }
  }

  /** Keep the signed list that names a manifest; returns what `vouch` needs to check it. */
  async seal(digest) {
    const { bytes, root } = this.repository.list;
    await this.storage.put(list(digest), bytes);
    return { root };
  }

  /** Follow the signatures that were kept, from the pinned root to the manifest; no network. */
  async vouch(bytes, { manifest, root }) {
    this.repository.pinned = (await this.storage.get(PINNED)) ?? this.pinned;
    const kept = await this.storage.get(list(manifest));
    if (!kept) throw new Refusal('the signed list that was kept is lost: remove this page\'s data and load it again.');
    await this.repository.recall(kept, root);
    if (this.repository.find(this.target)?.sha256 !== (await sha256(bytes))) {
      throw new Refusal('the signatures of the bundle do not hold: remove this page\'s data and load it again.');
    }
  }

  async #read({ path, length, sha256: wanted }, read) {
    const bytes = await read(path, length);
    if (!bytes) throw new Refusal(`the server does not give ${path}.`);
    if (bytes.length !== length || (await sha256(bytes)) !== wanted) throw new Refusal(`refused a file other than the signed one: ${path}.`);
    return bytes;
  }
}
