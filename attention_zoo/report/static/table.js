// The table of runs: sorted, searched, with pinned columns. Of many rows only those in sight are in the document.
zoo.runsTable = (() => {
  const height = 31,
    spare = 12,
    letter = 7.4,
    known = new Map();
  let box,
    body,
    head,
    table,
    columns = [],
    lines = [],
    widths = [];

  const pinned = () => new Set(['label', ...zoo.state.get().pin]);

  function ordered(runs) {
    const {sort} = zoo.state.get();
    if (!sort) return runs;
    const column = zoo.columns.one(sort.replace(/^-/, '')),
      sign = sort.startsWith('-') ? -1 : 1;
    if (!column) return runs;
    const keyed = runs.map(run => [column.get(run), run]);
    // who says nothing stands below, whichever way
    keyed.sort(([a], [b]) => (a === null || b === null ? zoo.order(a, b) : sign * zoo.order(a, b)));
    return keyed.map(([, run]) => run);
  }

  function prepare() {
    const pin = pinned();
    columns = zoo.columns.shown();
    columns = [...columns.filter(each => pin.has(each.name)), ...columns.filter(each => !pin.has(each.name))];
    const runs = ordered(zoo.select.shown());
    lines = zoo.state.get().rows ? grouped(runs) : runs.map(run => ({run}));
    widths = columns.map(width);
    if (innerWidth < 700) widths[0] = Math.min(widths[0], 170);
  }

  // As wide as the longest words of all runs, shown or not: a filter moves no column.
  function width(column) {
    if (!known.has(column.name)) {
      const most = Math.max(column.title.length + 4, ...zoo.runs.map(run => String(column.words(run)).length));
      known.set(column.name, Math.round(Math.min(most, column.name === 'label' ? 38 : 26) * letter + 22));
    }
    return known.get(column.name);
  }

  function grouped(runs) {
    const found = new Map();
    for (const run of runs) {
      const name = zoo.select.groupOf(run);
      if (!found.has(name)) found.set(name, []);
      found.get(name).push(run);
    }
    return [...found].flatMap(([name, held]) => [{group: name, runs: held}, ...held.map(run => ({run}))]);
  }

  function sortBy(name) {
    const {sort} = zoo.state.get();
    zoo.state.change({sort: sort === name ? `-${name}` : sort === `-${name}` ? '' : name});
    head.querySelector(`[data-column="${CSS.escape(name)}"] .sort`)?.focus();
  }

  const offset = number => widths.slice(0, number).reduce((sum, width) => sum + width, 0);

  function cell(tag, column, number, given, ...children) {
    const held = pinned().has(column.name) && (innerWidth >= 700 || number === 0);
    const classes = [column.figure ? 'figure' : '', held ? 'pinned' : ''].join(' ').trim();
    return zoo.el(
      tag,
      {class: classes || null, style: held ? {left: `${offset(number)}px`} : {}, ...given},
      ...children,
    );
  }

  function heading(column, number) {
    const {sort, pin} = zoo.state.get();
    const way = sort === column.name ? 'ascending' : sort === `-${column.name}` ? 'descending' : null;
    const fixed = pin.includes(column.name);
    return cell(
      'th',
      column,
      number,
      {scope: 'col', 'aria-sort': way ?? 'none', data: {column: column.name}},
      zoo.button(`${column.title}${way === 'ascending' ? ' ▲' : way ? ' ▼' : ''}`, () => sortBy(column.name), {
        class: 'sort',
        title: `Sort by ${column.name}`,
      }),
      column.name === 'label'
        ? null
        : zoo.button(
            fixed ? '◆' : '◇',
            () => zoo.state.change({pin: fixed ? pin.filter(name => name !== column.name) : [...pin, column.name]}),
            {
              class: 'pin',
              'aria-pressed': String(fixed),
              'aria-label': `Pin ${column.title}`,
              title: 'Pin this column',
            },
          ),
    );
  }

  function runLine({run}, place) {
    const {vs} = zoo.state.get();
    const look = zoo.select.looks()[zoo.select.groupOf(run)];
    return zoo.el(
      'tr',
      {
        'aria-rowindex': place + 2,
        tabindex: '-1',
        class: run.stale ? 'stale' : null,
        data: {key: run.key, group: zoo.select.groupOf(run)},
      },
      columns.map((column, number) =>
        number === 0
          ? cell(
              'th',
              column,
              0,
              {scope: 'row', title: zoo.title(run)},
              zoo.el('input', {
                type: 'checkbox',
                checked: vs.includes(run.key),
                data: {vs: run.key},
                tabindex: '-1',
                'aria-label': `Compare ${zoo.title(run)}`,
              }),
              zoo.swatch(look),
              column.words(run),
            )
          : cell('td', column, number, {title: column.words(run)}, column.words(run)),
      ),
    );
  }

  function groupLine({group, runs}, place) {
    return zoo.el(
      'tr',
      {class: 'group', 'aria-rowindex': place + 2, data: {group}},
      columns.map((column, number) => {
        if (number === 0) return cell('th', column, 0, {scope: 'row'}, `${group} (${runs.length})`);
        const held = column.figure ? runs.filter(run => run.n[column.name] !== undefined) : [];
        // no mean over what cannot be compared
        const alike = new Set(
          held.map(run => ['task', 'length', 'setting'].map(name => zoo.ask(run, name)).join('\n')),
        );
        if (alike.size !== 1) return cell('td', column, number, {});
        const values = held.map(run => run.n[column.name]);
        const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
        const said = column.said(mean, held);
        const ends = [Math.min(...values), Math.max(...values)].map(value => column.said(value, held));
        return cell('td', column, number, {title: `mean; ${ends[0]} to ${ends[1]}`}, `ø ${said}`);
      }),
    );
  }

  // The rows in sight, between two rows that hold the room of the others.
  function rows(every = false) {
    const from = every ? 0 : Math.max(0, Math.floor(box.scrollTop / height) - spare);
    const to = every ? lines.length : Math.min(lines.length, from + Math.ceil(box.clientHeight / height) + 2 * spare);
    const room = count =>
      zoo.el(
        'tr',
        {class: 'room', 'aria-hidden': 'true'},
        zoo.el('td', {colspan: columns.length, style: {height: `${count * height}px`}}),
      );
    const active = document.activeElement?.dataset?.key;
    body.replaceChildren(
      ...(from ? [room(from)] : []),
      ...lines.slice(from, to).map((line, number) => (line.run ? runLine : groupLine)(line, from + number)),
      ...(to < lines.length ? [room(lines.length - to)] : []),
    );
    table.setAttribute('aria-rowcount', lines.length + 1);
    (body.querySelector('tr[data-key]') ?? body).setAttribute('tabindex', '0');
    if (active) row(active)?.focus({preventScroll: true});
    mark(zoo.link.now());
  }

  const row = key => body.querySelector(`tr[data-key="${CSS.escape(key)}"]`);

  function draw() {
    prepare();
    head.replaceChildren(zoo.el('tr', {'aria-rowindex': 1}, columns.map(heading)));
    table.style.width = `${offset(widths.length)}px`;
    table
      .querySelector('colgroup')
      .replaceChildren(...widths.map(width => zoo.el('col', {style: {width: `${width}px`}})));
    rows();
  }

  function mark(what) {
    const keys = new Set(what?.keys ?? []),
      chosen = zoo.state.get().run;
    for (const line of body.querySelectorAll('tr[data-key]')) {
      line.classList.toggle(
        'linked',
        Boolean(what) && (keys.size ? keys.has(line.dataset.key) : line.dataset.group === what.group),
      );
      line.classList.toggle('chosen', line.dataset.key === chosen);
      line.setAttribute('aria-selected', String(line.dataset.key === chosen));
    }
  }

  function compare(key) {
    const {vs} = zoo.state.get();
    zoo.state.change({vs: vs.includes(key) ? vs.filter(each => each !== key) : [...vs, key].slice(-2)});
  }

  function keys(event) {
    const line = event.target.closest('tr[data-key]');
    if (!line || event.target.matches('button')) return;
    const step = {ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10}[event.key];
    if (step) {
      const runs = lines.filter(each => each.run),
        at = runs.findIndex(each => each.run.key === line.dataset.key);
      const next = runs[Math.min(Math.max(at + step, 0), runs.length - 1)].run.key;
      const place = lines.findIndex(each => each.run?.key === next);
      const top = place * height,
        room = box.clientHeight - 2 * height;
      if (top < box.scrollTop || top > box.scrollTop + room) {
        box.scrollTop = top - room / 2;
        rows();
      }
      row(next)?.focus();
      event.preventDefault();
    } else if (event.key === 'Enter') {
      zoo.link.choose(line.dataset.key);
      event.preventDefault();
    } else if (event.key === ' ') {
      compare(line.dataset.key);
      event.preventDefault();
    }
  }

  const saved = () => [
    ['key', ...columns.map(column => column.name)],
    ...ordered(zoo.select.shown()).map(run => [
      run.key,
      ...columns.map(column => (column.name === 'label' ? run.label : column.get(run))),
    ]),
  ];

  function chooser() {
    const names = () => new Set(columns.map(column => column.name));
    const list = zoo.el('div', {class: 'options', role: 'group', 'aria-label': 'columns'});
    return zoo.el(
      'details',
      {
        class: 'facet',
        id: 'columns',
        ontoggle: event => {
          if (!event.target.open) return;
          list.replaceChildren(
            ...zoo.columns
              .all()
              .filter(each => each.name !== 'label')
              .map(each =>
                zoo.el(
                  'label',
                  {class: 'option'},
                  zoo.el('input', {
                    type: 'checkbox',
                    checked: names().has(each.name),
                    onchange: change => {
                      const cols = [...names()].filter(name => name !== each.name && name !== 'label');
                      zoo.state.change({cols: change.target.checked ? [...cols, each.name] : cols});
                    },
                  }),
                  zoo.el('span', {}, each.name),
                ),
              ),
          );
        },
      },
      zoo.el('summary', {}, 'Columns'),
      list,
    );
  }

  function start(tools, node) {
    box = node;
    head = zoo.el('thead');
    body = zoo.el('tbody');
    table = zoo.el(
      'table',
      {
        class: 'runs',
        role: 'grid',
        'aria-label': 'Runs: arrow keys move, Enter opens one, Space marks it for comparison',
      },
      zoo.el('colgroup'),
      head,
      body,
    );
    box.append(table);
    tools.append(
      chooser(),
      zoo.el(
        'label',
        {class: 'check'},
        zoo.el('input', {
          type: 'checkbox',
          id: 'grouped',
          checked: zoo.state.get().rows === 'groups',
          onchange: event => zoo.state.change({rows: event.target.checked ? 'groups' : ''}),
        }),
        ' group rows',
      ),
      zoo.button('Download CSV', () => zoo.saveCsv('runs', saved()), {id: 'csv'}),
      zoo.button('Compare two', () => zoo.diff.open(), {
        id: 'compare',
        title: 'Tick two runs, then see in what they differ',
      }),
    );
    let frame = 0;
    box.addEventListener('scroll', () => {
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(() => rows());
    });
    body.addEventListener('click', event => {
      const line = event.target.closest('tr[data-key]');
      if (event.target.dataset.vs) compare(event.target.dataset.vs);
      else if (line) zoo.link.choose(line.dataset.key);
    });
    body.addEventListener('keydown', keys);
    body.addEventListener('pointerover', event => {
      const line = event.target.closest('tr[data-key]');
      if (line) zoo.link.point({group: line.dataset.group, keys: [line.dataset.key]});
    });
    box.addEventListener('pointerleave', () => zoo.link.point(null));
    addEventListener('beforeprint', () => rows(true));
    addEventListener('afterprint', () => rows());
    addEventListener('resize', draw);
    zoo.link.listen(mark);
    zoo.state.listen(changed => {
      if (
        [...changed].every(name =>
          ['run', 'off', 'theme', 'setting', 'task', 'learning', 'grouping', 'attend'].includes(name),
        )
      )
        mark(zoo.link.now());
      else draw();
      zoo.by('grouped').checked = zoo.state.get().rows === 'groups';
    });
    draw();
  }

  const again = () => {
    known.clear();
    draw();
  };
  return {start, draw, again};
})();
