// The card that says which label a text has, and which experts it used.

import { classify, routes, usage } from '../classify.js';
import { attempt, bars, card, el, percent } from './dom.js';

export function askCard(app) {
  const text = el('textarea', { id: 'text', ariaLabel: 'Text', placeholder: 'A text to classify' });
  const button = el('button', { id: 'classify', type: 'submit' }, 'Classify');
  const shown = el('div', { id: 'answer', ariaLive: 'polite' });
  const ask = (event) => {
    event?.preventDefault();
    return attempt(shown, button, async () => {
      if (!text.value.trim()) return;
      const { engine } = app;
      const begin = performance.now();
      const found = await classify(engine, text.value);
      const took = performance.now() - begin;
      const { ids } = engine.tokens.whole(text.value, engine.manifest.task.maxLength);
      const reports = await routes(engine, ids);
      const { labels } = engine.manifest.task;
      shown.replaceChildren(
        el('p', { className: 'answer', id: 'label' }, found.label),
        bars(labels.map((label, i) => [label, found.probabilities[i]]), labels.indexOf(found.label)),
        el('p', { className: 'dim' }, `${found.tokens} tokens, ${took.toFixed(0)} ms, gate ${engine.gate.name || 'none'}${found.cut ? '; the end of the text did not fit and was left out' : ''}`),
        routeView(engine.manifest, reports),
      );
    });
  };
  app.again.push(() => shown.firstChild && ask());
  text.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) ask(event);
  });
  return card('Classify a text', 'first', el('form', { onsubmit: ask }, text, el('div', { className: 'row' }, button)), shown);
}

/** Which experts a text used: together, and for each router. */
export function routeView(manifest, reports) {
  if (!reports.length) return null;
  const names = usage(manifest, reports);
  const head = el('tr', {}, el('th', {}, 'router'), names.map(([id]) => el('th', {}, id)));
  const rows = reports.map(({ router, experts, shares }) => el('tr', {}, el('td', {}, router), names.map(([id]) => {
    const at = experts.indexOf(id);
    return el('td', { className: 'number' }, at < 0 ? '' : percent(shares[at]));
  })));
  return el('div', { id: 'route' },
    el('h3', {}, 'Experts that this text used'),
    bars(names),
    el('details', {}, el('summary', {}, `All ${reports.length} routers`), el('div', { className: 'scroll' }, el('table', {}, head, ...rows))),
  );
}
