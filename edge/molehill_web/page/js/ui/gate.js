// The card for gates: which one is in use, and which experts it may choose.

import { choosing, readGate, usable } from '../gates.js';
import { gatesOf } from '../manifest.js';
import { attempt, card, el, opener } from './dom.js';

export function gateCard(app) {
  const { engine } = app;
  const { manifest } = engine;
  const said = el('div');
  const gates = new Map([['default', { ...engine.default, name: engine.default.name || 'default' }]]);
  for (const { path, name } of gatesOf(manifest)) gates.set(gates.has(name) ? path : name, readGate(app.gates.get(path), manifest, path));
  const picker = el('select', { id: 'gate', ariaLabel: 'Gate', onchange: () => use() });
  const boxes = el('div', { id: 'experts' });
  const may = usable(manifest);
  const ids = [...new Set(manifest.numbers.filter((_, i) => may[i]).map(({ slot }) => manifest.slots[slot].id))];
  for (const id of ids) {
    boxes.append(el('label', { className: 'check' }, el('input', { type: 'checkbox', value: id, checked: true, onchange: () => use() }), id));
  }
  const chosen = () => new Set([...boxes.querySelectorAll('input:checked')].map((box) => box.value));

  function list() {
    const before = picker.value;
    picker.replaceChildren(...[...gates].map(([key, gate]) => el('option', { value: key }, key === gate.name ? key : `${key} (${gate.name})`)));
    picker.value = gates.has(before) ? before : 'default';
  }

  async function use() {
    await attempt(said, null, async () => {
      const gate = gates.get(picker.value);
      engine.use(chosen().size === ids.length ? gate : choosing(gate, chosen(), manifest));
    });
    for (const again of app.again) await again();
  }

  /** Add a gate under a name, and use it. */
  app.addGate = async (key, gate) => {
    gates.set(key, gate);
    list();
    picker.value = key;
    await use();
  };
  app.removeGate = async (key) => {
    gates.delete(key);
    list();
    await use();
  };
  list();
  const file = opener('From a file', '.safetensors', (bytes, name) => attempt(said, null, () => app.addGate(name, readGate(bytes, manifest, name))));
  return card('Gate', 'side', el('p', { className: 'dim' }, 'A gate says which experts are chosen; swapping it takes no time.'),
    picker, ids.length ? [el('h3', {}, 'Experts that may be chosen'), boxes] : null, el('div', { className: 'row' }, file), said);
}
