// Gates: what one owner adds to a bundle, as files and as inputs of the graph.

import { Refusal } from './bytes.js';
import { BIAS, MASK } from './graph.js';
import { readTensors, writeTensors } from './safetensors.js';

/** Which numbers of `expert_mask` stand for an expert rather than an empty slot. */
export const usable = (manifest) => Uint8Array.from(manifest.numbers, ({ slot }) => (manifest.slots[slot].id ? 1 : 0));

/**
 * Read a gate file that was made for this bundle's base, layout and experts.
 *
 * @returns {{name, tensors: Map, bias: Float32Array, mask: Uint8Array}}
 */
export function readGate(bytes, manifest, where) {
  const { tensors, metadata } = readTensors(bytes, where);
  const refuse = (what) => {
    throw new Refusal(`${where}: ${what}`);
  };
  if (metadata.kind !== 'gate') refuse('not a gate file.');
  if (metadata.format !== '1') refuse('a gate file of another format: this page is too old for it.');
  if (metadata.base !== manifest.base.digest) refuse('the gate is for another base model.');
  if (metadata.layout !== manifest.layoutHex) refuse('the gate is for another layout of experts and routers.');
  checkExperts(metadata.slots, manifest, refuse);
  const size = manifest.numbers.length;
  const found = new Map();
  for (const { name, shape } of manifest.gate) {
    const tensor = tensors.get(name) ?? refuse(`the gate lacks ${name}.`);
    if (!(tensor.data instanceof Float32Array) || String(tensor.shape) !== String(shape)) refuse(`${name} has another shape.`);
    if (!tensor.data.every(Number.isFinite)) refuse(`${name} holds numbers that are not finite.`);
    found.set(name, tensor);
  }
  const bias = tensors.get(BIAS)?.data ?? new Float32Array(size);
  const mask = tensors.get(MASK)?.data ?? new Uint8Array(size).fill(1);
  if (bias.length !== size || !bias.every(Number.isFinite)) refuse(`${BIAS} does not fit.`);
  if (mask.length !== size || mask instanceof Float32Array) refuse(`${MASK} does not fit.`);
  return { name: metadata.name ?? where, tensors: found, bias, mask: mask.map((bit) => (bit ? 1 : 0)) };
}

/** Refuse a gate whose rows belong to other experts than those of the slots; either side may lack some. */
function checkExperts(said, manifest, refuse) {
  let theirs;
  try {
    theirs = JSON.parse(said);
  } catch {
    theirs = null;
  }
  if (!Array.isArray(theirs) || theirs.length !== manifest.slots.length) refuse('the gate does not say which experts it is for.');
  manifest.slots.forEach(({ id }, i) => {
    if (theirs[i] && id && theirs[i] !== id) refuse(`the gate is for expert ${String(theirs[i]).slice(0, 80)} where the bundle has ${id}.`);
  });
}

/** The bytes of a gate file, as `molehill edge run --gate` takes it. */
export function writeGate(gate, manifest) {
  const size = manifest.numbers.length;
  const tensors = [...gate.tensors, [BIAS, { data: gate.bias, shape: [size] }], [MASK, { data: gate.mask, shape: [size] }]];
  return writeTensors(tensors, {
    format: '1',
    kind: 'gate',
    name: gate.name,
    base: manifest.base.digest,
    layout: manifest.layoutHex,
    slots: JSON.stringify(manifest.slots.map((slot) => slot.id)),
  });
}

/** The experts that may be chosen with a gate: of the usable ones, at least one for each router. */
export function allowed(gate, manifest) {
  const may = usable(manifest).map((bit, i) => bit & gate.mask[i]);
  manifest.routers.forEach((router, index) => {
    if (!manifest.numbers.some((number, i) => number.router === index && may[i])) {
      throw new Refusal(`this leaves router ${router.name} without experts: choose from more.`);
    }
  });
  return may;
}

/** A gate that chooses from these experts only (a set of ids). */
export function choosing(gate, ids, manifest) {
  const mask = gate.mask.map((bit, i) => (bit && ids.has(manifest.slots[manifest.numbers[i].slot].id) ? 1 : 0));
  const made = { ...gate, mask };
  allowed(made, manifest);
  return made;
}
