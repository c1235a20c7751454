// The manifest of a bundle: what it says, and what it must say before anything else of the bundle is opened.
// Fields and limits are those of protos/molehill/v1/bundle.proto and molehill_edge/manifest.py.

import { Refusal, hex } from './bytes.js';
import { read } from './protobuf.js';

const FORMAT = 1;
const MAX_BYTES = 2 << 20;
const MAX_FILES = 256;
const MAX_FILE = 2 ** 31; // bytes; more than a browser gives to one buffer
const MAX_TEMPLATE = 64 << 10;
const ID = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/;
const FIXED = /^(model\.onnx|base\.bin|(experts|gate)\.safetensors|(tokenizer|genai_config|tokenizer_config)\.json)$/;
const RELEASE = /^\d{1,6}(\.\d{1,6}){0,3}$/;
const GATE = /^gates\/([A-Za-z0-9][A-Za-z0-9._-]{0,127})\.safetensors$/;

const GENERATION = {
  1: ['eos', 'int', true], 2: ['pad', 'int'], 3: ['template', 'bool'], 4: ['chatTemplate', 'string'],
  5: ['bosToken', 'string'], 6: ['eosToken', 'string'], 7: ['layers', 'uint'], 8: ['heads', 'uint'],
  9: ['headDim', 'uint'], 10: ['vocabulary', 'uint'], 11: ['sharedBuffer', 'bool'],
};
const MANIFEST = {
  1: ['format', 'uint'], 2: ['id', 'string'], 3: ['version', 'uint'],
  4: ['base', { 1: ['id', 'string'], 2: ['revision', 'string'], 3: ['digest', 'string'] }],
  5: ['task', {
    1: ['kind', 'string'], 2: ['labels', 'string', true], 3: ['pooling', 'string'], 4: ['maxLength', 'uint'],
    5: ['generation', GENERATION],
  }],
  6: ['quantisation', { 1: ['base', 'string'], 2: ['head', 'string'], 3: ['experts', 'string'] }],
  7: ['slots', { 1: ['id', 'string'], 2: ['shared', 'bool'] }, true],
  9: ['routers', { 1: ['name', 'string'], 2: ['slots', 'uint', true] }, true],
  10: ['gate', { 1: ['name', 'string'], 2: ['shape', 'uint', true], 3: ['router', 'int'], 4: ['expertAxis', 'int'] }, true],
  11: ['layout', 'bytes'],
  12: ['parity', {
    1: ['texts', 'uint'], 2: ['logitError', 'double'], 3: ['agreement', 'double'], 4: ['rows', 'uint'],
    5: ['accuracyOriginal', 'double'], 6: ['accuracyBundle', 'double'],
  }],
  13: ['golden', { 1: ['inputIds', 'int', true], 2: ['logits', 'float', true], 3: ['best', 'int'] }, true],
  14: ['runtime', { 1: ['onnxruntime', 'string'] }],
  15: ['provenance', {
    1: ['run', 'string'], 2: ['rounds', 'uint'], 4: ['federation', 'string'], 5: ['epsilon', 'double'],
    6: ['gate', 'string'], 7: ['exporter', 'string'],
  }],
  16: ['files', { 1: ['path', 'string'], 2: ['length', 'uint'], 3: ['sha256', 'bytes'] }, true],
  17: ['created', 'int'], 18: ['expires', 'int'],
};

/** A bundle that its owner lets nobody use any more. */
export class Expired extends Refusal {}

/**
 * Read a manifest, and refuse one that is damaged, too new, expired, implausible, or for another runtime than the page's.
 *
 * @param {Uint8Array} bytes
 * @param {string} runtime  the version of onnxruntime-web that the page has
 *
 * Beside the fields it gets `numbers`: for every number of `router_bias` and `expert_mask` its router and its slot.
 */
export function readManifest(bytes, runtime, now = Date.now() / 1000) {
  if (bytes.length > MAX_BYTES) throw new Refusal('the manifest is longer than any.');
  const manifest = read(MANIFEST, bytes);
  if (manifest.format > FORMAT) throw new Refusal(`the bundle has format ${manifest.format}: this page is too old for it.`);
  const must = (condition, what) => {
    if (!condition) throw new Refusal(`the manifest is not plausible: ${what}.`);
  };
  must(manifest.format === FORMAT && manifest.version >= 1 && ID.test(manifest.id), 'it has no format, version or id');
  const { base, task, files, slots, routers, gate } = manifest;
  must(base && /^[0-9a-f]{64}$/.test(base.digest), 'it does not say what its base is');
  must(manifest.layout.length === 32, 'it has no layout');
  manifest.quantisation ??= { base: '', head: '', experts: '' };
  must(files.length <= MAX_FILES, 'it has too many files');
  for (const file of files) {
    must(FIXED.test(file.path) || GATE.test(file.path), `${file.path.slice(0, 80)} is no file of a bundle`);
    must(file.sha256.length === 32 && file.length < MAX_FILE, `${file.path} has no SHA-256, or is too large for a browser`);
  }
  const paths = files.map((file) => file.path);
  must(paths.every((path, i) => i === 0 || paths[i - 1] < path), 'its files are not in order');
  must(['model.onnx', 'base.bin', 'tokenizer.json'].every((path) => paths.includes(path)), 'it lacks a file');
  must(task && task.maxLength >= 1, 'it does not say what it is for');
  if (task.kind === 'classification') must(task.labels.length >= 1, 'it has no labels');
  else {
    must(task.kind === 'causal-lm' && task.generation, 'it does not say how to generate');
    const { layers, heads, headDim, vocabulary, eos, chatTemplate } = task.generation;
    must([layers, heads, headDim, vocabulary].every((size) => size >= 1 && size <= 1 << 24), 'its cache has no size');
    must(eos.every((token) => token >= 0 && token < vocabulary), 'it ends with a token that it has not');
    must(chatTemplate.length <= MAX_TEMPLATE, 'its chat template is too long');
  }
  for (const router of routers) {
    must(router.slots.length >= 1 && router.slots.every((slot) => slot < slots.length), 'a router has no slots');
  }
  for (const tensor of gate) {
    must(tensor.name && tensor.shape.every((size) => size >= 1) && tensor.router < routers.length, 'a gate tensor has no place');
    must(tensor.expertAxis < tensor.shape.length, 'a gate tensor has no such axis');
  }
  if (manifest.expires && manifest.expires <= now) {
    const day = new Date(manifest.expires * 1000).toISOString().slice(0, 10);
    throw new Expired(`the bundle expired on ${day}: its owner must give a newer version.`);
  }
  const needed = manifest.runtime?.onnxruntime ?? '';
  must(RELEASE.test(needed), 'it does not say which onnxruntime it needs');
  if (isOlder(runtime, needed)) {
    throw new Refusal(`the bundle needs onnxruntime ${needed} or newer, and this page has ${runtime}: its owner has to write the page anew, with a newer molehill.`);
  }
  manifest.numbers = routers.flatMap((router, index) => router.slots.map((slot) => ({ router: index, slot })));
  manifest.layoutHex = hex(manifest.layout);
  return manifest;
}

/** Whether a version, such as 1.9.2, comes before another. */
function isOlder(version, other) {
  const [ours, theirs] = [version, other].map((each) => each.match(/^\d+(\.\d+)*/)[0].split('.').map(Number));
  const at = theirs.findIndex((number, i) => number !== (ours[i] ?? 0));
  return at >= 0 && (ours[at] ?? 0) < theirs[at];
}

/** Whether a text may be the id of a bundle. */
export const validId = (id) => ID.test(id);

/** Path and name of every gate of a bundle beside its default. */
export const gatesOf = (manifest) => manifest.files.flatMap(({ path }) => {
  const found = GATE.exec(path);
  return found ? [{ path, name: found[1] }] : [];
});

/** Whether a bundle writes text. */
export const isCausal = (manifest) => manifest.task.kind === 'causal-lm';
