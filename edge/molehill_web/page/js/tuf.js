// The Update Framework, as far as a repository of `molehill publish` needs it: Ed25519, consistent snapshots, bins.
//
// From the pinned root, signatures lead to the newest root, to what its keys say is the newest state, and to the
// length and SHA-256 of every file. What was seen is kept: nothing older is taken afterwards.

import { Refusal, json, sha256, unhex, utf8 } from './bytes.js';

const LIMITS = { root: 256_000, timestamp: 16_384, snapshot: 256_000, targets: 8_000_000 };
const MAX_ROTATIONS = 256;

/** JSON as it is signed: keys in order, no spaces. */
export function canonical(value) {
  if (value === null || typeof value === 'boolean') return String(value);
  if (typeof value === 'string') return `"${value.replaceAll('\\', '\\\\').replaceAll('"', '\\"')}"`;
  if (typeof value === 'number') {
    if (!Number.isSafeInteger(value)) throw new Refusal('signed metadata have a number that is not whole.');
    return String(value);
  }
  if (Array.isArray(value)) return `[${value.map(canonical).join(',')}]`;
  return `{${Object.keys(value).sort().map((key) => `${canonical(key)}:${canonical(value[key])}`).join(',')}}`;
}

/** Refuse metadata that fewer keys of a role have signed than it wants. */
export async function verify(metadata, keys, role, name) {
  const { keyids, threshold } = role ?? {};
  if (!Array.isArray(keyids) || !(threshold >= 1)) throw new Refusal(`nobody may sign ${name}.`);
  const signed = utf8(canonical(metadata.signed));
  const good = new Set();
  for (const { keyid, sig } of metadata.signatures ?? []) {
    const key = keys?.[keyid];
    if (!keyids.includes(keyid) || key?.keytype !== 'ed25519' || key.scheme !== 'ed25519') continue;
    if (await holds(key.keyval?.public, sig, signed)) good.add(key.keyval.public);
  }
  if (good.size < threshold) throw new Refusal(`refused what is not signed by the keys of its owner: ${name}.`);
}

async function holds(key, signature, signed) {
  const algorithm = { name: 'Ed25519' };
  try {
    const made = await crypto.subtle.importKey('raw', unhex(key), algorithm, false, ['verify']);
    return await crypto.subtle.verify(algorithm, made, unhex(signature), signed);
  } catch (error) {
    if (error.name === 'NotSupportedError') throw new Refusal('this browser cannot check signatures (Ed25519): update it.');
    return false; // no key, or no signature
  }
}

/** Metadata of a type, parsed; its signatures are not checked. */
function parse(bytes, type, name) {
  const made = json(bytes, name);
  const { signed } = made ?? {};
  if (signed?._type !== type || !Number.isSafeInteger(signed.version) || signed.version < 1) {
    throw new Refusal(`${name} is not what its name says.`);
  }
  if (!/^1(\.|$)/.test(String(signed.spec_version))) throw new Refusal(`${name} is of a newer kind than this page knows.`);
  return made;
}

function refuseExpired({ signed }, name, now) {
  if (!(Date.parse(signed.expires) > now)) {
    throw new Refusal(`refused an old state, or one that its owner must sign anew (or the clock is wrong): ${name}.`);
  }
}

/** A root after another: signed by the keys of both, and one version higher. */
async function nextRoot(before, bytes) {
  const version = before.signed.version + 1;
  const made = parse(bytes, 'root', `root ${version}`);
  for (const { signed } of [before, made]) await verify(made, signed.keys, signed.roles?.root, `root ${version}`);
  if (made.signed.version !== version) throw new Refusal(`root ${version} is of another version.`);
  return made;
}

/** One repository: what it shows is verified against what is pinned and what was seen before. */
export class Repository {
  /**
   * @param {Uint8Array} pinned  the root metadata from which all trust comes
   * @param {{get, put}} kept    what was seen so far, by name
   * @param {(path, limit) => Promise<Uint8Array|null>} fetcher  a file of the repository; null when there is none
   * @param {() => number} now   milliseconds since 1970
   */
  constructor(pinned, kept, fetcher, now = Date.now) {
    Object.assign(this, { pinned, kept, fetcher, now });
  }

  /** The newest root that is kept, or that of a version; every one from the pinned on checked. */
  async knownRoot(last = Infinity) {
    let root = parse(this.pinned, 'root', 'the pinned root');
    await verify(root, root.signed.keys, root.signed.roles?.root, 'the pinned root');
    while (root.signed.version < last) {
      const bytes = await this.kept.get(`root/${root.signed.version + 1}`);
      if (!bytes) break;
      root = await nextRoot(root, bytes);
    }
    return root;
  }

  /** Ask for the newest state; afterwards `find` knows it. */
  async refresh() {
    const root = await this.#newestRoot();
    const timestamp = await this.#timestamp(root);
    const known = await this.#keptPart(root, 'snapshot', 'snapshot');
    const snapshot = await this.#part(root, 'snapshot', 'snapshot', timestamp.signed.meta?.['snapshot.json']);
    const meta = snapshot.signed.meta ?? {};
    for (const [name, before] of Object.entries(known?.signed.meta ?? {})) {
      if (!(meta[name]?.version >= before.version)) {
        throw new Refusal(`refused a state that is older than the known one, or mixed: ${name}.`);
      }
    }
    refuseExpired(snapshot, 'snapshot', this.now());
    await this.#keep('snapshot', snapshot);
    this.targets = await this.#part(root, 'targets', 'targets', meta['targets.json']);
    refuseExpired(this.targets, 'targets', this.now());
    await this.#keep('targets', this.targets);
    [this.meta, this.root, this.bins] = [meta, root, new Map()];
  }

  /** Whether a root is one of those that follow from the pinned one, as far as they are kept. */
  async isKnownRoot(bytes) {
    const { signed } = parse(bytes, 'root', 'a root');
    const same = signed.version === parse(this.pinned, 'root', 'a root').signed.version
      ? this.pinned
      : await this.kept.get(`root/${signed.version}`);
    return same !== null && (await sha256(same)) === (await sha256(bytes));
  }

  /** The newest signed list, and the version of the root whose keys have signed it. */
  get list() {
    return { bytes: utf8(JSON.stringify(this.targets)), root: this.root.signed.version };
  }

  /** Take up a signed list that was kept; that it has expired does not count: there may be no network. */
  async recall(bytes, version) {
    const root = await this.knownRoot(version);
    const made = parse(bytes, 'targets', 'the signed list that is kept');
    await verify(made, root.signed.keys, root.signed.roles?.targets, 'the signed list that is kept');
    this.targets = made;
  }

  /** What is signed about a file of the targets role: {length, sha256, path}; null when nothing is. */
  find(path) {
    return entry(this.targets.signed.targets?.[path], path);
  }

  /** The same of a file that a bin lists. */
  async findBlob(path) {
    const { delegations } = this.targets.signed;
    const bins = delegations?.succinct_roles;
    if (!(bins?.bit_length >= 1 && bins.bit_length <= 16)) throw new Refusal('the repository was made by other software.');
    const first = parseInt((await sha256(utf8(path))).slice(0, 8), 16);
    const width = (2 ** bins.bit_length - 1).toString(16).length;
    const name = `${bins.name_prefix}-${(first >>> (32 - bins.bit_length)).toString(16).padStart(width, '0')}`;
    if (!this.bins.has(name)) {
      const made = await this.#fetched('targets', name, this.meta[`${name}.json`], (bin) => verify(bin, delegations.keys, bins, name));
      refuseExpired(made, name, this.now());
      this.bins.set(name, made);
    }
    return entry(this.bins.get(name).signed.targets?.[path], path);
  }

  async #newestRoot() {
    let root = await this.knownRoot();
    for (let i = 0; i < MAX_ROTATIONS; i++) {
      const version = root.signed.version + 1;
      const bytes = await this.fetcher(`metadata/${version}.root.json`, LIMITS.root);
      if (!bytes) break;
      root = await nextRoot(root, bytes);
      await this.kept.put(`root/${version}`, bytes);
    }
    refuseExpired(root, 'root', this.now());
    return root;
  }

  async #timestamp(root) {
    const bytes = await this.fetcher('metadata/timestamp.json', LIMITS.timestamp);
    if (!bytes) throw new Refusal('the server does not give metadata/timestamp.json.');
    const made = parse(bytes, 'timestamp', 'timestamp');
    await verify(made, root.signed.keys, root.signed.roles?.timestamp, 'timestamp');
    const known = await this.#keptPart(root, 'timestamp', 'timestamp');
    const [now, then] = [made, known].map((each) => each?.signed.meta?.['snapshot.json']?.version);
    if (known && (made.signed.version < known.signed.version || now < then)) {
      throw new Refusal('refused a state that is older than the known one, or mixed: timestamp.');
    }
    refuseExpired(made, 'timestamp', this.now());
    await this.#keep('timestamp', made);
    return made;
  }

  /** Metadata that are kept, when the keys of this root have signed them. */
  async #keptPart(root, role, type) {
    const bytes = await this.kept.get(role);
    if (!bytes) return null;
    try {
      const made = parse(bytes, type, role);
      await verify(made, root.signed.keys, root.signed.roles?.[role], role);
      return made;
    } catch (error) {
      if (error instanceof Refusal) return null; // its key was rotated: what it said does not count any more
      throw error;
    }
  }

  #part(root, type, role, meta) {
    return this.#fetched(type, role, meta, (made) => verify(made, root.signed.keys, root.signed.roles?.[role], role));
  }

  /** Metadata as those above list them, signed by who may. */
  async #fetched(type, role, meta, check) {
    if (!Number.isSafeInteger(meta?.version)) throw new Refusal(`the repository lists no ${role}.`);
    const limit = Math.min(meta.length ?? Infinity, LIMITS[type]);
    const bytes = await this.fetcher(`metadata/${meta.version}.${role}.json`, limit);
    if (!bytes) throw new Refusal(`the server does not give metadata/${meta.version}.${role}.json.`);
    const wanted = meta.hashes?.sha256;
    if (wanted !== undefined && wanted !== (await sha256(bytes))) throw new Refusal(`refused a file other than the signed one: ${role}.`);
    const made = parse(bytes, type, role);
    await check(made);
    if (made.signed.version !== meta.version) throw new Refusal(`refused a state that is older than the known one, or mixed: ${role}.`);
    return made;
  }

  #keep(role, made) {
    return this.kept.put(role, utf8(JSON.stringify(made)));
  }
}

/** What is signed of a file, with the path under which it is stored. */
function entry(listed, path) {
  const digest = listed?.hashes?.sha256;
  if (!Number.isSafeInteger(listed?.length) || !/^[0-9a-f]{64}$/.test(digest ?? '')) return null;
  const at = path.lastIndexOf('/') + 1;
  return { length: listed.length, sha256: digest, path: `targets/${path.slice(0, at)}${digest}.${path.slice(at)}` };
}
