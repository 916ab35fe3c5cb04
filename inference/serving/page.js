// Runs once a text. What comes from the model is put in as text, never as HTML.
let card = document.querySelector('.token-card');
if (!card) {
  card = part('token-card', '');
  document.body.append(card);
}

function part(name, text) {
  const made = document.createElement('div');
  made.className = name;
  made.textContent = text;
  return made;
}

function shown(text) {
  return text.replaceAll(' ', '␣').replaceAll('\n', '⏎').replaceAll('\t', '⇥') || '▯';
}

function percent(p) {
  return p < 0.0001 ? '< 0.01 %' : (100 * p).toFixed(p < 0.0995 ? 2 : 1) + ' %';
}

function row(text, p, isDrawn) {
  const line = part('row' + (isDrawn ? ' drawn' : ''), ''), bar = part('bar', ''), fill = document.createElement('i');
  fill.style.width = 100 * p + '%';
  bar.append(fill);
  line.append(part('', shown(text)), bar, part('number', percent(p)));
  return line;
}

function rows(token, data) {
  if (data.weight !== undefined) return [part('heading', 'attention'), row(token.textContent, data.weight, true)];
  if (data.looks) return [part('heading', `${data.head} attends to`), ...data.looks.map(([text, p]) => row(text, p))];
  const likely = data.likely.map(([text, p], place) => row(text, p, place === data.rank));
  const drawn = data.rank === null ? [row(token.textContent, data.p, true)] : [];
  return [part('heading', 'what the model held likely'), ...likely, ...drawn];
}

element.addEventListener('mouseover', event => {
  const token = event.target.closest('[data-card]');
  if (!token) return;
  card.replaceChildren(...rows(token, JSON.parse(token.dataset.card)));
  card.style.display = 'grid';
  const at = token.getBoundingClientRect(), size = card.getBoundingClientRect();
  const isBelow = at.bottom + 6 + size.height < innerHeight;
  card.style.left = Math.max(6, Math.min(at.left, innerWidth - size.width - 6)) + 'px';
  card.style.top = (isBelow ? at.bottom + 6 : Math.max(6, at.top - size.height - 6)) + 'px';
});
element.addEventListener('mouseout', event => {
  if (event.target.closest('[data-card]')) card.style.display = 'none';
});
element.addEventListener('click', event => {
  const token = event.target.closest('[data-at]');
  if (!token) return;
  trigger('select', { at: token.dataset.at });
  document.querySelector('.attention').scrollIntoView({ behavior: 'smooth', block: 'nearest' });
});
