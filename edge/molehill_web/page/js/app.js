// The page: gets the bundle, keeps it, opens it, and puts the cards up.

import { Refusal, json } from './bytes.js';
import { check, showsLong } from './classify.js';
import { Engine } from './engine.js';
import { Expired, isCausal } from './manifest.js';
import { Prompts } from './prompts.js';
import { Brought, Signed, Unreachable } from './source.js';
import { Storage } from './storage.js';
import { aboutCard } from './ui/about.js';
import { askCard } from './ui/ask.js';
import { el, megabytes, tell } from './ui/dom.js';
import { fitCard } from './ui/fit.js';
import { gateCard } from './ui/gate.js';
import { talkCard } from './ui/talk.js';

const VENDOR = new URL('../vendor/', import.meta.url);
const MOST_THREADS = 4;
const [main, status, progress, chips] = ['main', 'status', 'progress', 'chips'].map((id) => document.getElementById(id));

/** What the cards share. */
const app = { storage: new Storage(), again: [], own: null };
globalThis.molehill = app; // for whoever looks into it, and for tests

async function start() {
  if (!isSecureContext || !globalThis.caches) {
    throw new Refusal('Browsers let a page keep and check a model over HTTPS only (or on this machine itself): open it there.');
  }
  const about = json(await bytesOf('site.json'), 'site.json');
  document.title = document.getElementById('name').textContent = about.bundle;
  const ready = keepPage();
  app.source = about.repository ? new Signed(about, app.storage, await bytesOf('root.json')) : new Brought(about, app.storage);
  if (await app.source.isStale()) await download();
  const bundle = await kept();
  status.textContent = 'Opening';
  await open(bundle);
  document.getElementById('loading').remove();
  await cards();
  navigator.storage?.persist?.();
  if (app.source.signed) lookForNewer();
  if (await ready) chip('works offline', 'good', 'offline');
  else chip('needs the network', '', 'offline');
  document.documentElement.dataset.state = 'ready';
}

/** The bundle that is kept, every file checked; one that has expired gives way to a newer version. */
async function kept() {
  status.textContent = 'Checking what is kept';
  try {
    return await app.source.open();
  } catch (error) {
    if (!(error instanceof Expired && app.source.signed)) throw error;
    await download().catch((why) => {
      throw why instanceof Unreachable ? new Refusal(`${error.message} ${why.message}`) : why;
    });
    return app.source.open();
  }
}

/** A file of the page. */
async function bytesOf(path) {
  const response = await fetch(new URL(`../${path}`, import.meta.url)).catch(() => null);
  if (!response?.ok) throw new Unreachable(`${path} cannot be loaded: the server cannot be reached.`);
  return new Uint8Array(await response.arrayBuffer());
}

/** Let the browser keep the page; returns whether it does. */
async function keepPage() {
  try {
    const { active, waiting, installing } = await navigator.serviceWorker.register(new URL('../sw.js', import.meta.url), { updateViaCache: 'none' });
    const worker = active ?? waiting ?? installing;
    while (!['activated', 'redundant'].includes(worker.state)) {
      await new Promise((resolve) => worker.addEventListener('statechange', resolve, { once: true }));
    }
    return worker.state === 'activated'; // else a file of the page was not to be had, or another than was written
  } catch (error) {
    console.warn(`the page is not kept: ${error}`);
    return false;
  }
}

/** Change what is kept, while no other tab does. */
const alone = (work) => navigator.locks.request(app.storage.name, work);

async function download() {
  status.textContent = 'Downloading';
  try {
    await alone(() => app.source.update((done, total) => {
      [progress.max, progress.value] = [Math.max(total, 1), done];
      status.textContent = `Downloading: ${megabytes(done)} of ${megabytes(total)}`;
    }));
  } finally {
    progress.removeAttribute('value');
  }
}

/** Open the bundle on the processor, or on the graphics card where that pays and answers alike. */
async function open(bundle) {
  const { manifest } = bundle;
  const { Tokenizer } = await import(new URL('tokenizers/tokenizers.min.js', VENDOR));
  app.gates = new Map([...bundle.files].filter(([path]) => path.startsWith('gates/'))); // the graph has the rest
  if (manifest.quantisation.base !== 'int8' && showsLong(manifest) && (await navigator.gpu?.requestAdapter())) {
    // int8 has no kernels there; fp32 and int4 have.
    try {
      const runtime = await load('ort.webgpu.min.js', 'ort-wasm-simd-threaded.asyncify');
      const engine = await Engine.open(runtime, bundle, { providers: ['webgpu', 'wasm'], Tokenizer });
      if ((await check(engine)).passed && (!engine.causal || (await check(engine, { written: true })).passed)) {
        [app.engine, app.computes] = [engine, 'on the graphics card'];
        return;
      }
      await engine.close();
      throw new Refusal('it answers otherwise there than where the bundle was made.');
    } catch (error) {
      console.warn(`not on the graphics card: ${error}`);
    }
  }
  const runtime = await load('ort.wasm.min.js', 'ort-wasm-simd-threaded');
  app.engine = await Engine.open(runtime, bundle, { providers: ['wasm'], Tokenizer });
  app.computes = `on the processor, ${runtime.env.wasm.numThreads === 1 ? 'one thread' : `${runtime.env.wasm.numThreads} threads`}`;
}

async function load(name, core) {
  const place = new URL('onnxruntime-web/', VENDOR);
  const runtime = await import(new URL(name, place));
  runtime.env.logLevel = 'error';
  runtime.env.wasm.wasmPaths = { mjs: new URL(`${core}.js`, place).href, wasm: new URL(`${core}.wasm`, place).href };
  runtime.env.wasm.numThreads = crossOriginIsolated ? Math.max(1, Math.min(MOST_THREADS, Math.ceil(navigator.hardwareConcurrency / 2))) : 1;
  return runtime;
}

async function cards() {
  const { engine, source } = app;
  const { manifest } = engine;
  chip(`version ${manifest.version}`);
  if (source.signed) chip('signed', 'good');
  else chip('not signed', 'bad');
  if (manifest.quantisation.base === 'int4' && app.computes.includes('processor')) {
    main.append(el('p', { className: 'notice wide' }, 'The weights of this bundle are int4, which take several times as long on a browser’s processor as int8.'));
  }
  if (isCausal(manifest)) {
    const { Template } = await import(new URL('jinja/index.js', VENDOR));
    main.append(talkCard(app, new Prompts(manifest.task.generation, Template)));
  } else main.append(askCard(app));
  if (manifest.gate.length) main.append(gateCard(app));
  const fit = await fitCard(app);
  if (fit) main.append(fit);
  main.append(aboutCard(app));
  await app.restore?.();
}

function chip(text, kind = '', id = '') {
  chips.append(el('span', { className: `chip ${kind}`, id }, text));
}

/** Ask the repository for a newer version; the one that is open stays until the page is loaded again. */
app.update = async (place) => {
  const { version, before } = await alone(() => app.source.update());
  const text = version === before ? `Version ${version} is the newest.` : `Version ${version} is here: load the page again to use it.`;
  tell(place, text);
};

/** Remove all that this browser keeps of the page, and begin anew. */
app.forget = async () => {
  await app.storage.clear();
  await (await navigator.serviceWorker.getRegistration())?.unregister();
  location.reload();
};

async function lookForNewer() {
  const place = document.getElementById('said');
  try {
    await app.update(place);
  } catch (error) {
    if (error instanceof Unreachable) chip('no network', '', 'network');
    else tell(place, `${error.message} Version ${app.engine.manifest.version} stays in use.`, true);
  }
}

start().catch((error) => {
  if (!(error instanceof Refusal)) console.error(error);
  document.documentElement.dataset.state = 'refused';
  progress.hidden = true;
  status.textContent = error instanceof Refusal ? error.message : `This page fails: ${error?.message ?? error}`;
  status.className = 'notice bad';
  const again = el('button', { onclick: () => location.reload() }, 'Try again');
  const clear = el('button', { className: 'plain', onclick: () => app.forget() }, 'Remove all data');
  status.after(el('div', { className: 'row' }, again, clear));
});
