// The card that says what the bundle is, where it comes from, and what this browser keeps.

import { check } from '../classify.js';
import { attempt, card, el, megabytes, percent, tell } from './dom.js';

export function aboutCard(app) {
  const { engine, source } = app;
  const { manifest } = engine;
  const { base, task, quantisation, parity, provenance } = manifest;
  const said = el('div', { id: 'said', ariaLive: 'polite' });
  const day = (seconds) => (seconds ? new Date(seconds * 1000).toISOString().slice(0, 10) : '');
  const facts = {
    bundle: `${manifest.id}, version ${manifest.version}`,
    signed: source.signed ? 'by the owner of the repository; checked here at each opening' : 'by nobody: it came with this page',
    base: base.id,
    task: `${task.kind}, at most ${task.maxLength} tokens`,
    weights: [...new Set([quantisation.base, quantisation.experts].filter(Boolean))].join(', '),
    experts: manifest.slots.map(({ id }) => id).filter(Boolean).join(', '),
    parity: parity?.texts ? `${percent(parity.agreement)} of ${parity.texts} texts as the original` : '',
    accuracy: parity?.rows ? `${percent(parity.accuracyBundle)}, originally ${percent(parity.accuracyOriginal)}` : '',
    from: [provenance?.run, provenance?.federation].filter(Boolean).join(', '),
    made: day(manifest.created),
    expires: day(manifest.expires),
    computes: app.computes,
    size: megabytes(manifest.files.reduce((sum, file) => sum + file.length, 0)),
  };
  const update = el('button', { id: 'update', className: 'plain', onclick: () => attempt(said, update, () => app.update(said)) }, 'Check for updates');
  const trial = el('button', { id: 'check', className: 'plain', onclick: () => attempt(said, trial, async () => {
    const found = await check(engine);
    if (!found.inputs) return tell(said, 'The bundle brings no inputs to check.');
    return tell(said, found.passed
      ? `It answers here as where it was made: ${found.inputs} inputs, error ${found.error.toExponential(1)}.`
      : `It answers otherwise than where it was made: ${percent(found.agreement)} alike, error ${found.error.toExponential(1)}. Use another browser.`, !found.passed);
  }) }, 'Check its answers');
  const remove = el('button', { id: 'remove', className: 'plain', onclick: () => app.forget() }, 'Remove all data');
  const rows = Object.entries(facts).filter(([, value]) => value).flatMap(([name, value]) => [el('dt', {}, name), el('dd', {}, value)]);
  const licence = (folder, name) => el('a', { href: `vendor/${folder}/LICENSE.txt` }, name);
  return card('About this bundle', 'side', el('dl', {}, ...rows),
    el('div', { className: 'row' }, source.signed ? update : null, trial, remove), said,
    el('p', { className: 'dim' }, 'Made with Molehill. It computes with ', licence('onnxruntime-web', 'onnxruntime-web'), ', ', licence('tokenizers', 'tokenizers'), ' and ', licence('jinja', 'jinja'), '.'));
}
