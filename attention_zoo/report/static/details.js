// One run with all that is known of it, and two beside each other.
zoo.details = (() => {
  let panel,
    before = null;

  const line = ([name, value]) => [zoo.el('dt', {}, name), zoo.el('dd', {}, value)];
  const list = pairs => zoo.el('dl', {}, pairs.flatMap(line));

  // What a run says, in three parts: of itself, of its config, of its environment.
  function parts(run) {
    const said = zoo.data.fields.map(([name]) => [name, zoo.ask(run, name)]).filter(([, value]) => value !== null);
    const place = name =>
      zoo.place.get(name) < zoo.first ? 'run' : /^(environment|data)\b/.test(name) ? 'environment' : 'config';
    const figures = Object.entries(run.n).map(([name, value]) => [name, zoo.columns.one(name).words(run)]);
    const of = part => said.filter(([name]) => place(name) === part);
    const sorted = part => of(part).sort(([a], [b]) => zoo.order(a, b));
    return {run: [['key', run.key], ...of('run')], figures, config: sorted('config'), environment: of('environment')};
  }

  // What sets a run of a group apart.
  const brief = run => {
    const length = zoo.ask(run, 'task') ? '' : `, ${zoo.ask(run, 'length')} tokens`;
    return `seed ${zoo.ask(run, 'seed') ?? '?'}${length}`;
  };

  function copied(text) {
    const done = zoo.button('Copy', async () => {
      await navigator.clipboard?.writeText(text).catch(() => {});
      done.textContent = 'Copied';
    });
    return done;
  }

  function content(run) {
    const {run: own, figures, config, environment} = parts(run);
    const group = zoo.select.groupOf(run),
      alike = zoo.runs.filter(
        other =>
          other !== run &&
          other.label === run.label &&
          zoo.ask(other, 'task') === zoo.ask(run, 'task') &&
          zoo.ask(other, 'kind') === zoo.ask(run, 'kind'),
      );
    const {vs} = zoo.state.get();
    return [
      zoo.el(
        'div',
        {class: 'caption'},
        zoo.el('h2', {id: 'details-title', tabindex: '-1'}, zoo.swatch(zoo.select.looks()[group]), zoo.title(run)),
        zoo.button('Close', close, {'aria-label': 'Close the details'}),
      ),
      run.why
        ? zoo.el('p', {class: 'warn'}, zoo.el('b', {}, run.why), run.error ? zoo.el('pre', {}, run.error) : '')
        : null,
      run.stale ? zoo.el('p', {class: 'note'}, 'Stale: made by other code than that which drew this page.') : null,
      zoo.el(
        'p',
        {},
        zoo.button(vs.includes(run.key) ? 'Do not compare' : 'Compare with another', () => {
          zoo.state.change({
            vs: vs.includes(run.key) ? vs.filter(key => key !== run.key) : [...vs, run.key].slice(-2),
          });
          render();
          if (zoo.state.get().vs.length === 2) zoo.diff.open();
        }),
      ),
      zoo.el('h3', {}, 'Figures'),
      list(figures),
      alike.length
        ? zoo.el(
            'p',
            {class: 'note'},
            'Of the same group: ',
            alike
              .slice(0, 24)
              .flatMap(other => [zoo.button(brief(other), () => zoo.link.choose(other.key), {class: 'plain'}), ' ']),
          )
        : null,
      run.command
        ? [zoo.el('h3', {}, 'Command'), zoo.el('pre', {class: 'command'}, run.command), copied(run.command)]
        : null,
      zoo.el('h3', {}, 'Run'),
      list(own),
      config.length ? [zoo.el('h3', {}, 'Config'), list(config)] : null,
      zoo.el('h3', {}, 'Environment and data'),
      list(environment),
    ].flat();
  }

  function render() {
    const run = zoo.byKey.get(zoo.state.get().run);
    panel.hidden = !run;
    document.body.classList.toggle('with-details', Boolean(run));
    if (!run) return;
    panel.replaceChildren(...content(run).filter(Boolean));
  }

  function close() {
    zoo.state.change({run: ''});
  }

  function start(node) {
    panel = node;
    zoo.state.listen(changed => {
      if (!changed.has('run')) return;
      const opening = panel.hidden;
      if (opening) before = document.activeElement;
      render();
      if (panel.hidden)
        (before?.isConnected ? before : document.querySelector('.runs tr[tabindex="0"]'))?.focus?.({
          preventScroll: true,
        });
      zoo.link.again();
    });
    addEventListener('keydown', event => {
      if (event.key === 'Escape' && !panel.hidden && !document.querySelector('dialog[open]')) close();
    });
    render();
  }

  return {start, render, parts};
})();

zoo.diff = (() => {
  let dialog,
    every = false;

  function lines(one, two) {
    const [a, b] = [one, two].map(zoo.details.parts),
      found = [];
    for (const part of ['run', 'figures', 'config', 'environment']) {
      const [mine, theirs] = [new Map(a[part]), new Map(b[part])];
      for (const name of new Set([...mine.keys(), ...theirs.keys()])) {
        const pair = [mine.get(name) ?? zoo.words.none, theirs.get(name) ?? zoo.words.none];
        if (every || pair[0] !== pair[1]) found.push({part, name, pair, same: pair[0] === pair[1]});
      }
    }
    return found;
  }

  function pick(number) {
    const {vs} = zoo.state.get();
    const options = zoo.select.shown().map(run => [run.key, `${zoo.title(run)} [${run.key.slice(0, 8)}]`]);
    const mine = zoo.byKey.get(vs[number]);
    if (mine && !options.some(([key]) => key === mine.key)) options.unshift([mine.key, zoo.title(mine)]);
    return zoo.choice(number ? 'with' : 'Compare', [['', 'choose a run …'], ...options], vs[number] ?? '', key => {
      const next = [...zoo.state.get().vs];
      next[number] = key;
      zoo.state.change({vs: next.filter(Boolean)});
      render();
    });
  }

  function render() {
    const [one, two] = zoo.state.get().vs.map(key => zoo.byKey.get(key));
    const found = one && two ? lines(one, two) : [];
    dialog.replaceChildren(
      zoo.el(
        'div',
        {class: 'caption'},
        zoo.el('h2', {id: 'diff-title'}, 'In what two runs differ'),
        zoo.button('Close', () => dialog.close()),
      ),
      zoo.el(
        'div',
        {class: 'choices'},
        pick(0),
        pick(1),
        zoo.el(
          'label',
          {class: 'check'},
          zoo.el('input', {
            type: 'checkbox',
            checked: every,
            onchange: event => {
              every = event.target.checked;
              render();
            },
          }),
          ' what is the same, too',
        ),
      ),
      one && two
        ? zoo.el(
            'div',
            zoo.scroll(['setting', zoo.title(one), zoo.title(two)]),
            zoo.el(
              'table',
              {class: 'text diff'},
              zoo.el(
                'thead',
                {},
                zoo.el(
                  'tr',
                  {},
                  ['setting', 'part of', zoo.title(one), zoo.title(two)].map(text =>
                    zoo.el('th', {scope: 'col'}, text),
                  ),
                ),
              ),
              zoo.el(
                'tbody',
                {},
                found.map(({part, name, pair, same}) =>
                  zoo.el(
                    'tr',
                    {class: same ? 'same' : null, data: {field: name}},
                    zoo.el('th', {scope: 'row'}, name),
                    zoo.el('td', {class: 'note'}, part),
                    pair.map(value => zoo.el('td', {}, value)),
                  ),
                ),
              ),
            ),
          )
        : zoo.el('p', {class: 'note'}, 'Choose two runs, here or by their boxes in the table.'),
      one && two && !found.length ? zoo.el('p', {}, 'They differ in nothing.') : '',
    );
  }

  function open() {
    render();
    if (!dialog.open) dialog.showModal();
  }

  function start(node) {
    dialog = node;
    dialog.addEventListener('click', event => {
      if (event.target === dialog) dialog.close();
    });
  }

  return {start, open};
})();
