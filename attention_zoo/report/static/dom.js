// Elements out of text: what a run says is never read as HTML, nor as a tag inside a chart.
const zoo = {};

zoo.el = (tag, given = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'data') Object.assign(node.dataset, value);
    else if (name === 'style') Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.flat().filter(child => child !== null && child !== undefined));
  return node;
};

zoo.by = id => document.getElementById(id);

// Plotly reads tags in labels and hover texts.
zoo.plain = text => String(text).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');

zoo.button = (label, onclick, given = {}) => zoo.el('button', {type: 'button', onclick, ...given}, label);

// A select that says what it chooses. Options: [value, words].
zoo.choice = (label, options, chosen, onchange, given = {}) =>
  zoo.el(
    'label',
    {class: 'choice'},
    `${label} `,
    zoo.el(
      'select',
      {...given, onchange: event => onchange(event.target.value)},
      options.map(([value, words]) => zoo.el('option', {value, selected: value === chosen}, words)),
    ),
  );

zoo.save = (name, content, type) => {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], {type}));
  const link = zoo.el('a', {href: url, download: name});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
};

// Text that a spreadsheet would take for a formula stands behind an apostrophe; numbers stay numbers.
zoo.csv = lines =>
  lines
    .map(line =>
      line
        .map(cell => {
          if (cell === null || cell === undefined) return '';
          let text = String(cell);
          if (typeof cell !== 'number' && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
          return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
        })
        .join(','),
    )
    .join('\n') + '\n';

zoo.saveCsv = (name, lines) => zoo.save(`${name}.csv`, zoo.csv(lines), 'text/csv;charset=utf-8');

// What may be wider than its place can be scrolled by keys, too, and says what it is.
zoo.scroll = headers => ({
  class: 'scroll',
  tabindex: 0,
  role: 'group',
  'aria-label': `Table: ${headers.filter(text => text !== '').join(', ')}`,
});

zoo.table = (headers, lines, given = {}) =>
  zoo.el(
    'div',
    zoo.scroll(headers),
    zoo.el(
      'table',
      given,
      zoo.el(
        'thead',
        {},
        zoo.el(
          'tr',
          {},
          headers.map(text => (text === '' ? zoo.el('td') : zoo.el('th', {scope: 'col'}, text))),
        ),
      ),
      zoo.el(
        'tbody',
        {},
        lines.map(([first, ...rest]) =>
          zoo.el(
            'tr',
            {},
            zoo.el('th', {scope: 'row'}, first),
            rest.map(text => zoo.el('td', {}, text)),
          ),
        ),
      ),
    ),
  );
