// A browser without a page: what the page does with a repository, whose files and whose memory come from a test.
//
// Reads {pinned, bundle, onnxruntime, files, cut, kept, update} as JSON, bytes in base64. Updates if it is to, then opens what
// is kept, and writes what came of both, what was asked for meanwhile, and what is kept.

import { readFileSync } from 'node:fs';

const { Refusal } = await import(new URL('bytes.js', process.argv[2]));
const { Signed } = await import(new URL('source.js', process.argv[2]));

const asked = JSON.parse(readFileSync(0));
const bytes = (text) => new Uint8Array(Buffer.from(text, 'base64'));
const kept = new Map(Object.entries(asked.kept).map(([name, text]) => [name, bytes(text)]));
const base = new URL('https://bundles.example/page/');
const requests = [];

globalThis.fetch = async (url) => {
  const path = String(url).replace('https://bundles.example/', '');
  requests.push(path);
  if (!(path in asked.files)) return new Response('', { status: 404 });
  const data = bytes(asked.files[path]);
  if (!(path in asked.cut)) return new Response(data);
  return new Response(new ReadableStream({
    start(out) {
      out.enqueue(data.subarray(0, asked.cut[path]));
      out.error(new TypeError('network error'));
    },
  }));
};

const storage = {
  base,
  get: async (name) => kept.get(name) ?? null,
  has: async (name) => kept.has(name),
  put: async (name, data) => void kept.set(name, data),
  remove: async (name) => void kept.delete(name),
  names: async () => [...kept.keys()],
};

const source = () => new Signed({ bundle: asked.bundle, onnxruntime: asked.onnxruntime, repository: '../' }, storage, bytes(asked.pinned));
const attempt = async (work) => {
  try {
    return await work();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    return { refused: error.message };
  }
};
const said = asked.update ? await attempt(() => source().update()) : {};
const looked = requests.splice(0);
const opened = await attempt(async () => {
  const { manifest } = await source().open();
  return { bundle: manifest.id, version: manifest.version };
});
const memory = Object.fromEntries([...kept].map(([name, data]) => [name, Buffer.from(data).toString('base64')]));
process.stdout.write(JSON.stringify({ said, opened, asked: looked, asked_to_open: requests, kept: memory }));
