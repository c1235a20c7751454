// The card that fits a gate to texts of the visitor. They are kept in this browser, and leave it never.

import { Refusal, json, text as textOf, utf8 } from '../bytes.js';
import { readGate, writeGate } from '../gates.js';
import { personalise } from '../personalise.js';
import { attempt, card, el, opener, percent, save, tell } from './dom.js';

const [ROWS, OWN] = ['own rows', 'own gate'];
const MINE = 'my own'; // no gate of a bundle is called so

function isList(text) {
  try {
    return Array.isArray(JSON.parse(text));
  } catch {
    return false;
  }
}

export async function fitCard(app) {
  const { engine, storage } = app;
  const { manifest } = engine;
  if (!manifest.routers.length) return null;
  const kept = await storage.get(ROWS);
  let rows = kept ? json(kept, ROWS) : [];
  const said = el('div', { id: 'fitted', ariaLive: 'polite' });
  const listed = el('ul', { className: 'rows', id: 'rows' });
  const text = el('input', { id: 'row-text', type: 'text', ariaLabel: 'A text of yours', placeholder: 'A text of yours' });
  const label = engine.causal ? null : el('select', { id: 'row-label', ariaLabel: 'Its label' }, ...['', ...manifest.task.labels].map((name) => el('option', { value: name }, name || 'no label')));
  if (label && manifest.task.labels.length) label.value = manifest.task.labels[0];
  const progress = el('progress', { hidden: true, max: 1, value: 0 });
  const fit = el('button', { id: 'fit', type: 'button', onclick: () => fitNow() }, 'Fit a gate to them');
  const keepFile = el('button', { type: 'button', className: 'plain', hidden: true, onclick: () => app.own && save('mine.gate.safetensors', writeGate(app.own, manifest)) }, 'Save it as a file');
  const forget = el('button', { type: 'button', className: 'plain', hidden: true, onclick: () => forgetNow() }, 'Forget all of it');

  async function changed(now) {
    rows = now;
    listed.replaceChildren(...rows.map((row, i) => el('li', {}, el('span', {}, row.text), el('b', {}, row.label ?? ''), el('button', { type: 'button', className: 'plain', ariaLabel: 'Remove', onclick: () => changed(rows.toSpliced(i, 1)) }, '×'))));
    fit.disabled = rows.length === 0;
    forget.hidden = !rows.length && !app.own;
    await storage.put(ROWS, utf8(JSON.stringify(rows)));
  }

  function add(event) {
    event.preventDefault();
    if (!text.value.trim()) return;
    changed([...rows, { text: text.value.trim(), ...(label?.value ? { label: label.value } : {}) }]);
    text.value = '';
    text.focus();
  }

  const read = (bytes, name) => attempt(said, null, async () => {
    const all = textOf(bytes, name);
    if (isList(all)) throw new Refusal(`${name} is one JSON array: write an object a line.`);
    const lines = all.split('\n').filter((line) => line.trim());
    const found = lines.map((line, i) => {
      const row = line.trim().startsWith('{') ? json(utf8(line), `${name}, line ${i + 1},`) : { text: line.trim() };
      if (typeof row.text !== 'string' || !row.text.trim()) throw new Refusal(`${name}, line ${i + 1}, has no "text".`);
      if (engine.causal || (row.label ?? null) === null) return { text: row.text };
      const named = String(row.label); // as a device reads numbers, and true and false
      if (!manifest.task.labels.includes(named)) throw new Refusal(`${name}, line ${i + 1}: no label ${named}. There are: ${manifest.task.labels.join(', ')}.`);
      return { text: row.text, label: named };
    });
    await changed([...rows, ...found]);
  });

  const fitNow = () => attempt(said, fit, async () => {
    progress.hidden = false;
    try {
      const found = await personalise(engine, rows, { progress: (done, all) => (progress.value = done / all) });
      const { before, after } = found;
      const judged = `judged on ${found.heldOut} held out: loss ${before.loss.toFixed(4)} → ${after.loss.toFixed(4)}`;
      const right = before.accuracy === null ? '' : `, right ${percent(before.accuracy)} → ${percent(after.accuracy)}`;
      const what = found.kept ? 'The gate is yours now' : 'No gain on the texts held out: the gate stays as it was';
      if (found.kept) await own({ ...found.gate });
      const dropped = found.dropped.length ? `; never chosen: ${found.dropped.join(', ')}` : '';
      tell(said, `${what}. Fitted to ${found.fitted} texts, ${judged}${right}; ${found.evaluations} readings${dropped}.`);
    } finally {
      progress.hidden = true;
    }
  });

  async function own(gate) {
    app.own = gate;
    keepFile.hidden = forget.hidden = false;
    await storage.put(OWN, writeGate(gate, manifest));
    await app.addGate(MINE, gate);
  }

  async function forgetNow() {
    await storage.remove(OWN);
    app.own = null;
    keepFile.hidden = true;
    await app.removeGate(MINE);
    await changed([]);
    said.replaceChildren();
  }

  app.restore = async () => {
    const bytes = await storage.get(OWN);
    if (!bytes) return;
    try {
      app.own = readGate(bytes, manifest, 'your gate');
      keepFile.hidden = forget.hidden = false;
      await app.addGate(MINE, app.own);
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      tell(said, `The gate that was fitted here does not fit this version (${error.message}) Fit it anew.`, true);
    }
  };
  await changed(rows);
  const ask = engine.causal ? 'Texts such as you read and write' : 'Texts with the labels that you would give';
  return card('Make it yours', 'side',
    el('p', { className: 'dim' }, `${ask}: four are the least, a few dozen are better. They stay in this browser.`),
    el('form', { onsubmit: add }, text, el('div', { className: 'row' }, label, el('button', { id: 'add', type: 'submit', className: 'plain' }, 'Add'), opener('From a file', '.jsonl,.txt', read))),
    listed, el('div', { className: 'row' }, fit, keepFile, forget), progress, said);
}
